"""Clip files in and out: decoding, writing, downmixing of channels, and plots of audio."""
