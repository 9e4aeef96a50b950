"""Eight clips of unequal lengths as a step takes them, one without text and one that doesn't count: what tests of steps share."""

import numpy as np

from tests.support import tiny_data

SAID = ["lay red at t seven now", "bin blue at t one now"] * 4
SAID[2] = ""
COUNTED = np.float32([1, 1, 1, 1, 1, 0, 1, 1])


def make_batch() -> dict:
    """As input_pipeline.train_batches gives it."""
    from avsi_jax.data import input_pipeline

    examples = []
    for seed, clip_id in enumerate(list(tiny_data.clip_ids())[:8]):
        raw = tiny_data.measurement(seed) | {"id": clip_id, "speaker": "s1", "text": SAID[seed], "words": []}
        raw["audio"] = raw["audio"][: 48_000 - 2_500 * seed]
        examples.append(input_pipeline.to_example(raw))
    batch = {k: np.stack([e[k] for e in examples]) for k in examples[0] if k != "clip_id"}
    return batch | {"clip_id": [e["clip_id"] for e in examples], "weight": COUNTED}


def arrays(batch: dict) -> dict:
    """What a step is given of it."""
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}


def run(step, batch: dict, count: int, state):
    """The states after each of `count` steps, and the metrics of each as sum / count."""
    import jax

    states, metrics = [], []
    for _ in range(count):
        state, sums = jax.device_get(step(state, batch))
        states.append(state)
        metrics.append({k: float(s) / float(n) for k, (s, n) in sums.items()})
    return states, metrics
