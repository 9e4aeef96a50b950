"""Clip files in and out: decoding, writing, channels, and plots of waveforms."""
