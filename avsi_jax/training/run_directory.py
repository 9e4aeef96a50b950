"""The files of a run's workdir, local or in a bucket; process 0 writes them.

config.json, statistics.json (scales of standardised inputs), run.json (versions, devices, data), metrics.csv (identical after a
resume) and timing.csv (throughput).
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import resource
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.runtime import storage
from avsi_jax.training import old_names

if TYPE_CHECKING:
    from etils import epath
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Normalisation, Scale
    from avsi_jax.runtime.goodput import PhaseTimer

CONFIG = "config.json"
STATISTICS = "statistics.json"
METRICS = "metrics.csv"
TIMING = "timing.csv"
PACKAGES = ("avsi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
RUN = "run.json"
CHECKPOINTS = "checkpoints"
CHECKOUT = Path(__file__).resolve().parents[2]  # if this is one
MAY_CHANGE = set(  # config fields that may change on a resume: they affect no step that is already done
    "epochs data_dir validate_every checkpoint_every checkpoint_seconds keep early_stop_patience lstm watchdog_s images_every "
    "debug_nans".split()
)
LATER_FIELDS = {  # config fields added later: the value that describes runs from before the field existed
    "levels": "preset", "motion": "pixels", "fidelity": "ours", "video_rate": "audio", "ctc_units": "characters",
    "mask_input": False, "bottleneck_relu": True, "skip": False, "stack": 1, "video_layers": 0, "feedback": 0, "dropout": 0.0,
    "dtype": "float32", "accumulate": 1, "ema": 0.0, "checkpoint_seconds": 60.0, "images_every": 0, "watchdog_s": 60.0,
    "debug_nans": False, "audio_only_clips": 0, "audio_only_config": "test_clean",
    "validation_gaps": "drawn", "refiner": 0, "interpolation": "time", "init": "flax", "adam_epsilon": 1e-8,
    "gaps": {"curriculum_steps": 0, "placement": "apart", "fixed": False}, "loss": {"near_frames": 0},
    "augment": dict.fromkeys("speed gain_db mirror stretch noise_px jitter_ms drop_video drop_audio trim".split(), 0.0),
}  # fmt: skip


def check_config(
    config: ConfigDict,
    workdir: epath.PathLike,
    normalisation: Normalisation | None = None,
    dataset: dict | None = None,
    write: bool = True,
) -> None:
    """Writes config.json and, with a normalisation, statistics.json.

    ValueError, before anything is written, if the workdir holds a run with another config (except for MAY_CHANGE), another dataset
    or other statistics. dataset: as in `write_run`. write: False on all processes except the first, which only compare.
    """
    workdir = storage.as_path(workdir)
    current = json.loads(config.to_json())
    if (workdir / CONFIG).exists() and has_begun(workdir):
        previous = read_config(workdir)
        may_change = MAY_CHANGE - ({"epochs"} if config.schedule == "cosine" else set())  # the cosine depends on their number
        differ = [k for k in sorted(current.keys() | previous.keys()) if k not in may_change and current.get(k) != previous.get(k)]
        if differ:
            listed = "; ".join(f"{k}: {previous.get(k)!r} there, {current.get(k)!r} here" for k in differ)
            raise ValueError(
                f"{workdir} holds a run with another config ({listed}); resume with the same one, or choose another --workdir"
            )
        _check_dataset(workdir, dataset or {})
    check_normalisation(normalisation, workdir, write)
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_text(workdir / CONFIG, json.dumps(current, indent=2, sort_keys=True) + "\n")


def has_begun(workdir: epath.Path) -> bool:
    """Whether the workdir holds metrics or checkpoints, so that a run in it would be resumed."""
    checkpoints = workdir / CHECKPOINTS
    return (workdir / METRICS).exists() or (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir()))


def _check_dataset(workdir: epath.Path, dataset: dict) -> None:
    """ValueError if the run in the workdir was trained on other clips, or on clips of the same names with other contents."""
    try:
        previous = json.loads((workdir / RUN).read_text()).get("dataset", {})
    except (OSError, ValueError):
        return
    differ = [k for k in sorted(dataset) if k in previous and previous[k] != dataset[k]]
    if differ:
        listed = "; ".join(f"{k}: {previous[k]!r} there, {dataset[k]!r} here" for k in differ)
        raise ValueError(
            f"{workdir} holds a run on another dataset ({listed}); resume with the same one, or choose another --workdir"
        )


def read_config(workdir: epath.Path) -> dict:
    """The fields of config.json under today's names, with fields that were added later (LATER_FIELDS)."""
    return with_defaults(old_names.current_config(json.loads((workdir / CONFIG).read_text())), LATER_FIELDS)


def with_defaults(fields: dict, defaults: dict) -> dict:
    """`fields` with the missing ones, also those of groups, taken from `defaults`."""
    groups = {k: with_defaults(fields.get(k, {}), v) for k, v in defaults.items() if isinstance(v, dict)}
    return defaults | fields | groups


def check_normalisation(normalisation: Normalisation | None, workdir: epath.Path, write: bool = True) -> None:
    """Writes statistics.json if anything is standardised; ValueError if the workdir holds a run with other statistics."""
    from avsi_jax.data.features import Normalisation

    path, normalisation = workdir / STATISTICS, normalisation or Normalisation()
    if has_begun(workdir) and (previous := read_normalisation(workdir)) != normalisation:
        pairs = zip(normalisation._fields, previous, normalisation, strict=True)
        differ = [f"{k}: {_shown(there)} there, {_shown(here)} here" for k, there, here in pairs if there != here]
        raise ValueError(
            f"{workdir} holds a run with other train statistics ({'; '.join(differ)}); "
            f"resume with the same dataset, or choose another --workdir"
        )
    if not write:
        return
    if any(normalisation):
        scales = {k: scale and scale._asdict() for k, scale in normalisation._asdict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, json.dumps(scales) + "\n")
    else:
        path.unlink(missing_ok=True)  # left by a run that ended before its first step


def read_normalisation(workdir: epath.Path) -> Normalisation:
    """The normalisation of statistics.json; without that file nothing is standardised."""
    from avsi_jax.data.features import Normalisation, Scale

    path = workdir / STATISTICS
    if not path.exists():
        return Normalisation()
    scales = json.loads(path.read_text())
    return Normalisation(**{k: v and Scale(tuple(v["mean"]), tuple(v["std"])) for k, v in scales.items()})


def _shown(scale: Scale | None) -> str:
    """A Scale in a few words, for a message."""
    if not scale:
        return "none"
    mean, std = (sum(v) / len(v) for v in scale)
    return f"mean {mean:.7g} and std {std:.7g} over {len(scale.mean)}"


def write_run(
    workdir: epath.PathLike, *, parameters: int, devices: list[str], processes: int, dataset: dict, parallel: str = "pmap"
) -> None:
    """Writes run.json: what determines the numbers of a run besides its config.

    parameters: their number. devices: kind of each. dataset: its config, version, clips per split and fingerprints.
    """
    run = {
        "revision": git_revision(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": devices,
        "processes": processes,
        "parallel": parallel,
        "parameters": parameters,
        "dataset": dataset,
    }
    storage.write_text(storage.as_path(workdir) / RUN, json.dumps(run, indent=2) + "\n")


def version(package: str) -> str:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def git_revision(root: Path = CHECKOUT) -> str:
    """Git revision of this package's own checkout at `root`; 'unknown' if it is installed, also inside another repository."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}  # set in hooks of another repository

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment).stdout.strip()

    try:
        project = tomllib.loads((root / "pyproject.toml").read_text()).get("project", {})
        is_own = project.get("name") == "avsi_jax" and Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve()
        return git("describe", "--always", "--dirty", "--abbrev=12") if is_own else "unknown"
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"


def add_row(path: epath.PathLike, row: dict[str, float]) -> None:
    """Appends a row to a CSV file, with a header if the file is new.

    The header of an existing file decides the columns: other values are left out, and missing ones are written as nan.
    """
    path = storage.as_path(path)
    existing = path.read_text() if path.exists() else ""
    columns = existing.split("\n", 1)[0].split(",") if existing else list(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="nan", extrasaction="ignore", lineterminator="\n")
    if not existing:
        writer.writeheader()
    writer.writerow(row)
    storage.append_line(path, text.getvalue().removesuffix("\n"))


def read_rows(path: epath.PathLike) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; [] if the file does not exist."""
    path = storage.as_path(path)
    if not path.exists():
        return []
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(path.read_text()))]


def cut_rows(path: epath.PathLike, step: int) -> None:
    """Deletes the rows after training step `step`, which a resumed run will write again."""
    path = storage.as_path(path)
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        complete = [line for line in lines[1:] if line.endswith("\n")]  # a killed run may have left part of a row
        kept = lines[:1] + [line for line in complete if float(line.split(",", 1)[0]) <= step]
        storage.write_text(path, "".join(kept if len(kept) > 1 else []))


def timing(
    step: int,
    *,
    steps: int,
    train_s: float,
    batch_size: int,
    waited_s: float,
    epoch_s: float,
    device_mb: float,
    phases: PhaseTimer,
) -> dict[str, float]:
    """A row of timing.csv.

    step: the current training step; steps: those of this epoch in this process, which took train_s seconds, waited_s of them
    waiting for data; epoch_s: with validation and checkpoints; device_mb: peak memory of the device. The columns from goodput on
    describe the run since it began: share of time spent in steps that count, and seconds by cause (runtime/goodput.py).
    """
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = steps / train_s if steps else 0.0
    return {
        "step": step,
        "steps_per_s": round(speed, 4),
        "clips_per_s": round(speed * batch_size, 2),
        "waiting_share": round(waited_s / train_s, 5) if steps else 0.0,
        "epoch_s": round(epoch_s, 3),
        "peak_rss_mb": round(peak_mb),
        "device_mb": round(device_mb),
        "goodput": round(phases.goodput(), 4),
        **{f"{cause}_s": round(value, 3) for cause, value in phases.seconds().items()},
    }
