"""A batch of eight clips of unequal lengths, one without text and one of weight 0, for tests of training steps."""

import numpy as np

from tests.support import tiny_data

TEXTS = ["lay red at t seven now", "bin blue at t one now"] * 4
TEXTS[2] = ""
WEIGHTS = np.float32([1, 1, 1, 1, 1, 0, 1, 1])


def make_batch() -> dict:
    """The batch, as from input_pipeline.train_batches."""
    from avsi_jax.data import input_pipeline

    examples = []
    for seed, clip_id in enumerate(list(tiny_data.clip_ids())[:8]):
        raw = tiny_data.measurement(seed) | {"id": clip_id, "speaker": "s1", "text": TEXTS[seed], "words": []}
        raw["audio"] = raw["audio"][: 48_000 - 2_500 * seed]
        examples.append(input_pipeline.to_example(raw))
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
    return batch | {"clip_id": [e["clip_id"] for e in examples], "weight": WEIGHTS}


def arrays(batch: dict) -> dict:
    """The arrays of a batch, which are the input of a training step."""
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def run(step, batch: dict, count: int, state):
    """Runs a training step `count` times on one batch; returns the states after each step and the metrics of each as means."""
    import jax

    states, metrics = [], []
    for _ in range(count):
        state, sums = jax.device_get(step(state, batch))
        states.append(state)
        metrics.append({k: float(s) / float(n) for k, (s, n) in sums.items()})
    return states, metrics
