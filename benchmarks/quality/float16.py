"""Measures what rounding the parameters to float16, as in shipped weights, changes in restored levels (dB) and transcripts.

python -m benchmarks.quality.float16 --workdir=RUN [--split=test] [--gap_ms=900]   # uses the dataset that the run was trained on
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import stft
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import conditions, protocols, run_systems
from avsi_jax.inference import restorer, trained_run


def rounded(params: Any) -> Any:
    """Parameters after weights.write and weights.read."""
    return jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)


def main() -> None:
    """The command `python -m benchmarks.quality.float16`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, help="workdir of a training")
    parser.add_argument("--split", default="test", help="default: %(default)s")
    parser.add_argument("--gap_ms", type=int, default=900, help="length of the gap (default: %(default)s)")
    args = parser.parse_args()
    run = trained_run.read(args.workdir)
    original, half_precision = restorer.Restorer(*run), restorer.Restorer(*run._replace(params=rounded(run.params)))
    dataset = input_pipeline.find_dataset(run.config.data_dir, run.config.builder_config)
    records = input_pipeline.Records(dataset, args.split, mouth=False)
    clips = run_systems.Clips(records, run_systems.select_clips(records, 0))
    changes, errors, same = [], [], []
    for batch in clips.batches(16):
        gap = protocols.in_speech(batch, conditions.Case(args.gap_ms))
        a, b = (r.restore(batch, gap) for r in (original, half_precision))
        mask = np.asarray(a.features.mask) & (batch["weight"] > 0)[:, None]
        to_db = lambda level: np.asarray(stft.to_db(jnp.asarray(level), original.spec))
        x, y, target = (to_db(level)[mask] for level in (a.level, b.level, a.features.target))
        changes.append(np.abs(x - y).ravel())
        errors.append((np.abs(y - target) - np.abs(x - target)).ravel())
        same += [i == j for i, j, weight in zip(a.transcript, b.transcript, batch["weight"], strict=True) if weight]
    change, error = np.concatenate(changes), np.concatenate(errors)
    print(f"{args.split}, {len(clips.raw)} clips, gaps of {args.gap_ms} ms, step {run.step}: {change.size} values in the gaps")
    quantile = np.quantile(change, 0.999)
    print(f"level: mean change {change.mean():.2g} dB, 99.9 % below {quantile:.2g} dB, largest {change.max():.2g} dB")
    print(f"error in the gap: larger by {error.mean():.2g} dB; same transcript: {sum(same)} of {len(same)} clips")


if __name__ == "__main__":
    main()
