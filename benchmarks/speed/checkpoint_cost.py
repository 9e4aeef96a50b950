"""What checkpoints cost a training: the same steps with a save among them and without, in turns.

python -m benchmarks.speed.checkpoint_cost [--config=av_mtl_s2s --steps=8 --rounds=6 --interval=60]

A block is `--steps` steps on one batch of noise; a save is begun before its first one and goes on beside them, its files hashed and
renamed, as in avsi-train. The cost of a save is how much longer its block takes than the one without, medians of pairs; over
`--interval` seconds (config.checkpoint_seconds) that is the share of a training. Blocks must be longer than a save takes in all.
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="av_mtl_s2s", help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help="of a block (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="pairs of blocks (default: %(default)s)")
    parser.add_argument("--interval", type=float, default=60, help="seconds from save to save (default: %(default)s)")
    parser.add_argument("--folder", help="where checkpoints go; default: a temporary folder")
    args = parser.parse_args(argv)
    if min(args.batch_size, args.steps, args.rounds, args.interval) <= 0:
        parser.error("expected --batch_size, --steps, --rounds and --interval above 0")
    try:
        config = configs.load(args.config, [("batch_size", str(args.batch_size))], like="base")
    except ValueError as error:
        parser.error(str(error))
    devices.use_every_core(args.batch_size)
    import jax

    from avsi_jax.training import objective, train_step

    batch = raw_batch(args.batch_size)
    step = devices.map_train_step(train_step.make_train_step(config, objective.make_optimiser(config, 1)))
    state = devices.replicate(train_step.init_state(config, 1))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    saves, blocking, in_all = 0, [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoints = Checkpoints(folder)

        def block(save: bool) -> float:
            nonlocal state, saves
            began = time.perf_counter()
            if save:
                saves += 1
                checkpoints.save(saves, devices.to_global(state), {}, None)
                blocking.append(time.perf_counter() - began)
            for _ in range(args.steps):
                state, metrics = step(state, devices.split(batch))
                jax.block_until_ready((state, metrics))
            took = time.perf_counter() - began
            if save:
                still = checkpoints.is_saving()
                checkpoints.wait()
                in_all.append(still)
            return took

        for save in (False, True):  # the first compiles
            block(save)
        blocking.clear()
        pairs = []
        for index in range(args.rounds):
            order = (True, False) if index % 2 else (False, True)
            found = {save: block(save) for save in order}
            pairs.append((found[True], found[False]))
            print(f"with {found[True]:.2f} s, without {found[False]:.2f} s", file=sys.stderr)
        checkpoints.close()
    costs = [a - b for a, b in pairs]
    found = {
        "config": args.config, "state_mb": round(size / 1e6, 1), "devices": jax.device_count(),
        "device": jax.devices()[0].device_kind,
        "block_s": round(statistics.median(b for _, b in pairs), 3), "save_blocks_s": round(statistics.median(blocking), 3),
        "save_costs_s": round(statistics.median(costs), 3), "costs_s": [round(c, 3) for c in costs],
        "saves_longer_than_their_block": sum(in_all), "interval_s": args.interval,
        "share": round(statistics.median(costs) / args.interval, 5),
    }  # fmt: skip
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
