"""Networks, losses and CTC decoding: LSTM layers, every system of the registry, and how to build one from a config."""
