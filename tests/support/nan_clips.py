"""Clips with NaN landmarks, to test what a training does when a loss is not finite."""

import numpy as np


def put_nan(monkeypatch, clip_id=None) -> None:
    """Makes input_pipeline return NaN landmarks for this clip; for every clip if clip_id is None."""
    from avsi_jax.data import input_pipeline

    to_example = input_pipeline.to_example

    def to_nan_example(raw):
        example = to_example(raw)
        if clip_id in (None, example["clip_id"]):
            example["landmarks"][3, 50] = np.nan
        return example

    monkeypatch.setattr(input_pipeline, "to_example", to_nan_example)
