"""Networks and what they are trained with: LSTM cells, the systems of the paper, losses, CTC decoding."""
