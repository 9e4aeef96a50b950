"""A trained model applied to audio and text: loading runs and weights, restoring, recognising, exporting."""
