"""CTC logits -> text. Greedy best path; no grammar."""

from __future__ import annotations

import numpy as np

from avsi_jax import text


def greedy(logits: np.ndarray, num_frames: np.ndarray) -> list[str]:
    """The most likely label of each step, repeats merged, blanks (0) dropped: (B, F, C) and (B,) -> B texts."""
    best = np.asarray(logits)[..., : len(text.CHARACTERS)].argmax(-1)
    out = []
    for row, frames in zip(best, np.asarray(num_frames), strict=True):
        row = row[:frames]
        kept = row[(row != text.BLANK) & np.concatenate([[True], row[1:] != row[:-1]])] if len(row) else row
        out.append(text.decode(kept))
    return out
