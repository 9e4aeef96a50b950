"""Signal processing: spectrograms, gap masks, the Griffin-Lim vocoder, gap detection."""
