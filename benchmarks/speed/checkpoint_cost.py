"""Measures what checkpoints cost a training: blocks of training steps with and without a save, alternately.

    python -m benchmarks.speed.checkpoint_cost [--config=av_mtl_s2s --steps=8 --rounds=6 --interval=60]

A block is `--steps` training steps on one batch of noise. A save starts before the first step of its block and continues in the
background, its files hashed and renamed, as in avsi-train. Its cost is the difference between blocks with and without it, median
over pairs; divided by `--interval` seconds (config.checkpoint_seconds) it is the share of a training. Blocks must take longer than
a save.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time

from avsi_jax import configs
from avsi_jax.runtime import devices
from avsi_jax.training.checkpoints import Checkpoints
from benchmarks.speed.contenders import raw_batch


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.speed.checkpoint_cost`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="av_mtl_s2s", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="training steps per block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of blocks (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=60, help="seconds between saves in a training (default: %(default)s)")
    parser.add_argument("--folder", help="folder for checkpoints; default: a temporary folder")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.steps, args.rounds, args.interval) <= 0:
        parser.error("expected --batch_size, --steps, --rounds and --interval above 0")
    try:
        config = configs.load(args.config, [("batch_size", str(args.batch_size))], like="base")
    except ValueError as error:
        parser.error(str(error))
    devices.use_every_core(args.batch_size)
    import jax

    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser

    batch = raw_batch(args.batch_size)
    step = devices.map_train_step(train_step.make_train_step(config, make_optimiser(config, 1)))
    state = devices.replicate(train_step.init_state(config, 1))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    saves, blocking, late_saves = 0, [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(folder)

        def block(save: bool) -> float:
            nonlocal state, saves
            start = time.perf_counter()
            if save:
                saves += 1
                checkpoints.save(saves, devices.to_global(state), {}, None)
                blocking.append(time.perf_counter() - start)
            for _ in range(args.steps):
                state, metrics = step(state, devices.split(batch))
                jax.block_until_ready((state, metrics))
            block_s = time.perf_counter() - start
            if save:
                late_saves.append(checkpoints.is_saving())
                checkpoints.wait()
            return block_s

        for save in (False, True):  # the first one compiles
            block(save)
        blocking.clear()
        pairs = []
        for index in range(args.rounds):
            order = (True, False) if index % 2 else (False, True)
            seconds = {save: block(save) for save in order}
            pairs.append((seconds[True], seconds[False]))
            print(f"with {seconds[True]:.2f} s, without {seconds[False]:.2f} s", file=sys.stderr)
        checkpoints.close()
    costs = [a - b for a, b in pairs]
    result = {
        "config": args.config, "state_mb": round(size / 1e6, 1), "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "block_s": round(statistics.median(b for _, b in pairs), 3), "save_blocks_s": round(statistics.median(blocking), 3),
        "save_costs_s": round(statistics.median(costs), 3), "costs_s": [round(c, 3) for c in costs],
        "saves_longer_than_their_block": sum(late_saves), "interval_s": args.interval,
        "share": round(statistics.median(costs) / args.interval, 5),
    }  # fmt: skip
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
