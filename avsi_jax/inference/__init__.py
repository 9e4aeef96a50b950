"""Applies trained models: loads runs and weights, restores audio, recognizes words, exports programs."""
