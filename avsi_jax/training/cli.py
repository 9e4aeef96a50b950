"""avsi-train: the command. The loop is in training/loop.py, the step in training/train_step.py.

Exit codes: 0 the training is finished, 2 something to mend, 75 a process is stuck or missing, 130 Ctrl-C, 143 SIGTERM; after the
last three the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from avsi_jax import configs
from avsi_jax.runtime import distributed, unexpected_errors
from avsi_jax.runtime.goodput import PhaseTimer
from avsi_jax.runtime.signals import Stopped, StopSignals
from avsi_jax.training.progress_log import Console


def __getattr__(name: str):
    """The loop's train and Progress, loaded when they are asked for: --help is to answer at once."""
    if name in ("Progress", "train"):
        from avsi_jax.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def show(config) -> None:
    """What `--show` prints: the config, the signal, the network's table, its shapes. Needs no data."""
    import dataclasses

    import flax.linen as nn
    import jax

    from avsi_jax import presets
    from avsi_jax.models.build import count_of, example_features, make_model

    signal = [f"{k}: {v}" for k, v in dataclasses.asdict(presets.get(config.preset)).items()]
    table = nn.tabulate(make_model(config), jax.random.key(0), depth=2, console_kwargs={"width": 160})(example_features(config))
    print(config, *signal, table, f"parameters: {count_of(config)}", sep="\n")


def parse(argv: list[str] | None):
    """(arguments, overrides of the config)."""
    names = [n for n in configs.names() if n != "eval"]
    parser = argparse.ArgumentParser("avsi-train", description="Train a system of avsi_jax; resumes by itself from its workdir.")
    parser.add_argument("--config", default="av_mtl_s2s", help=f"a name ({', '.join(names)}) or a .py file; default %(default)s")
    parser.add_argument("--workdir", help="where the run lives, a folder or gs://; an earlier run there is gone on with")
    parser.add_argument("--show", action="store_true", help="print config, signal, network and parameters, and leave")
    parser.add_argument("--replay", type=int, metavar="STEP", help="do this step of the run again and say what isn't finite")
    parser.add_argument("--parallel", choices=("pmap", "shard_map"), default="pmap", help="what maps the step over devices")
    parser.add_argument("--cache_dir", default="", help="copy the dataset here first, once a host (for gs:// or a slow disk)")
    hosts = parser.add_argument_group("several processes", "all with the same command and a workdir that all share")
    hosts.add_argument("--distributed", choices=("auto", "on", "off"), default="auto",
                       help="auto: by the environment (TPU pod, SLURM step, Open MPI, Kubernetes, JAX_* variables)")  # fmt: skip
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, where the environment doesn't say")
    hosts.add_argument("--num_processes", type=int, help="how many there must be; another number is refused")
    hosts.add_argument("--process_id", type=int, help="which one this is, from 0")
    parser.epilog = "Fields: --config.FIELD=VALUE, e.g. --config.data_dir=DATA --config.batch_size=64 --config.loss.gap=1"
    return parser.parse_known_args(argv)


@unexpected_errors.reported("avsi-train")
def main(argv: list[str] | None = None) -> int:
    known, rest = parse(argv)
    console = Console()
    try:
        config = configs.load(known.config, configs.split_overrides(rest), like="base")
        if known.show:
            show(config)
            return 0
        if not known.workdir:
            raise ValueError("no --workdir given; expected a folder for checkpoints and metrics")
        code = run(config, known, console)
    except Stopped as stopped:
        console.warn(f"avsi-train: {stopped}")
        code = stopped.exit_code
    except (ValueError, OSError, FloatingPointError) as error:
        console.warn(f"avsi-train: {error}")
        code = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        console.warn("\navsi-train: stopped; the same command goes on from the last checkpoint")
        code = 130
    except Exception as error:
        code = alone_or_left(error, console)
    distributed.leave(code)
    return code


def alone_or_left(error: Exception, console: Console) -> int:
    """The exit code where another process is gone: what jax says of a broken collective differs by device. Else 1 for an error
    that nobody expected: a line on stderr, the traceback in train.log.
    """
    import jax

    from avsi_jax.runtime import watchdog

    said = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in said:
        console.warn(f"avsi-train: out of memory ({said}); expected room for a step: a smaller --config.batch_size, or "
                     "--config.accumulate=2")  # fmt: skip
        return 2
    if distributed.is_joined() and isinstance(error, jax.errors.JaxRuntimeError):
        console.warn(f"avsi-train: another process is gone ({said}); the same command goes on")
        return watchdog.EXIT_CODE
    console.record("".join(traceback.format_exception(error)))
    console.warn(f"avsi-train: {unexpected_errors.explain(error)}")
    return 1


def run(config, known, console: Console) -> int:
    """Joins the other processes, trains or replays; the command's exit code."""
    phases, stop_signals = PhaseTimer(), StopSignals(console.warn).install()
    try:
        topology = distributed.start(known.distributed, known.coordinator, known.num_processes, known.process_id)
        import jax

        from avsi_jax.runtime import devices
        from avsi_jax.training import loop

        devices.use_every_core(config.batch_size // (topology.expected or 1))
        topology.check()
        console.rank = jax.process_index()
        if jax.process_count() > 1:
            console.say(str(topology))
        options = {"how": known.parallel, "cache_dir": known.cache_dir, "console": console}
        if known.replay is not None:
            from avsi_jax.training.replay_step import replay

            replay(config, known.workdir, known.replay, **options)
        else:
            with jax.debug_nans(config.debug_nans):
                loop.train(config, known.workdir, stop_signals=stop_signals, phases=phases, **options)
    except FloatingPointError:
        if config.debug_nans:  # the line that made it is what one looks for
            traceback.print_exc()
        raise
    finally:
        stop_signals.uninstall()
    return 0


def command() -> None:
    """What the shell runs. A training that failed leaves at once: libraries in the middle of a save would say so for pages."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    command()
