"""The command avsi-train: arguments, errors and exit codes. The training loop is in training/loop.py.

Exit codes: 0 training finished, 1 unexpected error, 2 error that the user can fix, 75 a process is stuck or has ended, 130 Ctrl-C,
143 SIGTERM. After the last three the same command resumes from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING, Any

from avsi_jax import configs
from avsi_jax.runtime import distributed, unexpected_errors
from avsi_jax.runtime.command_line import Parser
from avsi_jax.runtime.goodput import PhaseTimer
from avsi_jax.runtime.signals import Stopped, StopSignals
from avsi_jax.training.progress_log import Console

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def __getattr__(name: str) -> Any:
    """`train` and `Progress` of training/loop.py, imported on first use so that --help answers at once."""
    if name in ("Progress", "train"):
        from avsi_jax.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def show(config: ConfigDict) -> None:
    """Prints the config, the signal preset, the network's layers and its number of parameters; needs no data."""
    import dataclasses

    import flax.linen as nn
    import jax

    from avsi_jax import presets
    from avsi_jax.models.build import example_features, make_model, parameter_count

    signal = [f"{k}: {v}" for k, v in dataclasses.asdict(presets.get(config.preset)).items()]
    table = nn.tabulate(make_model(config), jax.random.key(0), depth=2, console_kwargs={"width": 160})(example_features(config))
    print(config, *signal, table, f"parameters: {parameter_count(config)}", sep="\n")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """(options, remaining arguments, which override config fields)."""
    names = [n for n in configs.names() if n != "eval"]
    parser = Parser("avsi-train", description="Train a system of avsi_jax; resumes from its workdir.")
    parser.add_argument("--config", default="av_mtl_s2s", help=f"a name ({', '.join(names)}) or a .py file; default %(default)s")
    parser.add_argument("--workdir", help="folder of the run, local or gs://; an earlier run in it is resumed")
    parser.add_argument("--show", action="store_true", help="print config, signal preset, network and parameter count, and exit")
    parser.add_argument(
        "--replay", type=int, metavar="STEP", help="repeat this training step of the run and report what is not finite"
    )
    parser.add_argument("--parallel", choices=("pmap", "shard_map"), default="pmap", help="how steps are mapped over devices")
    parser.add_argument("--cache_dir", default="", help="copy the dataset here first, once per host (for gs:// or a slow disk)")
    hosts = parser.add_argument_group("several processes", "all with the same command and a shared workdir")
    hosts.add_argument("--distributed", choices=("auto", "on", "off"), default="auto",
                       help="auto: by the environment (TPU pod, SLURM step, Open MPI, Kubernetes, JAX_* variables)")  # fmt: skip
    hosts.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, if the environment does not define it")
    hosts.add_argument("--num_processes", type=int, help="number of processes; any other number is an error")
    hosts.add_argument("--process_id", type=int, help="index of this process, from 0")
    parser.epilog = "Fields: --config.FIELD=VALUE, e.g. --config.data_dir=DATA --config.batch_size=64 --config.loss.gap=1"
    return parser.parse_known_args(argv)


@unexpected_errors.reported("avsi-train")
def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    options, overrides = parse(argv)
    console = Console()
    try:
        config = configs.load(options.config, configs.split_overrides(overrides), like="base")
        if options.show:
            show(config)
            return 0
        if not options.workdir:
            raise ValueError("no --workdir given; expected a folder for checkpoints and metrics")
        code = run(config, options, console)
    except Stopped as stopped:
        console.warn(f"avsi-train: {stopped}")
        code = stopped.exit_code
    except (ValueError, OSError, FloatingPointError) as error:
        console.warn(f"avsi-train: {error}")
        code = getattr(error, "exit_code", 2)
    except KeyboardInterrupt:
        console.warn("\navsi-train: stopped; run the same command to continue from the last checkpoint")
        code = 130
    except Exception as error:
        code = exit_code_of(error, console)
    distributed.leave(code)
    return code


def exit_code_of(error: Exception, console: Console) -> int:
    """Reports an unexpected error in one line, with the traceback in train.log, and returns the exit code.

    jax reports a broken collective differently on each device: any of its errors in a run of several processes is taken as the end
    of another process.
    """
    import jax

    from avsi_jax.runtime import watchdog

    message = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in message:
        console.warn(f"avsi-train: out of memory ({message}); expected memory for a training step: use a smaller "
                     "--config.batch_size, or --config.accumulate=2")  # fmt: skip
        return 2
    if distributed.is_joined() and isinstance(error, jax.errors.JaxRuntimeError):
        console.warn(f"avsi-train: another process has ended ({message}); run the same command to continue")
        return watchdog.EXIT_CODE
    console.log("".join(traceback.format_exception(error)))
    console.warn(f"avsi-train: {unexpected_errors.explain(error)}")
    return 1


def run(config: ConfigDict, options: argparse.Namespace, console: Console) -> int:
    """Joins the other processes, then trains or replays a step; returns the exit code."""
    phases, stop_signals = PhaseTimer(), StopSignals(console.warn).install()
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.CRITICAL)  # Orbax' threads log while they save; its exceptions are reported here
    try:
        topology = distributed.start(options.distributed, options.coordinator, options.num_processes, options.process_id)
        import jax

        from avsi_jax.runtime import devices
        from avsi_jax.training import loop

        devices.use_every_core(config.batch_size // (topology.expected or 1))
        topology.check()
        console.rank = jax.process_index()
        if jax.process_count() > 1:
            console.info(str(topology))
        shared = {"parallel": options.parallel, "cache_dir": options.cache_dir, "console": console}
        if options.replay is not None:
            from avsi_jax.training.replay_step import replay

            replay(config, options.workdir, options.replay, **shared)
        else:
            with jax.debug_nans(config.debug_nans):
                loop.train(config, options.workdir, stop_signals=stop_signals, phases=phases, **shared)
    except FloatingPointError:
        if config.debug_nans:  # the traceback shows the operation that produced the NaN
            traceback.print_exc()
        raise
    finally:
        stop_signals.uninstall()
        absl.setLevel(level)
    return 0


def command() -> None:
    """Console script. A failed training exits at once: libraries interrupted during a save would print pages of errors."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    command()
