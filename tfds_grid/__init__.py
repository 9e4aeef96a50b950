"""The Grid corpus as a TensorFlow Datasets dataset: raw files -> records. Imports no model, and avsi_jax never imports it."""
