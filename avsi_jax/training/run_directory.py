"""The files of a run's workdir: config.json, statistics.json (what levels and motion were standardised by), run.json, metrics.csv
(identical after a resume) and timing.csv (speed). On a disk or in a bucket; of several processes the first one writes them.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.runtime import storage
from avsi_jax.training import old_names

if TYPE_CHECKING:
    from avsi_jax.data.features import Normalisation

CONFIG = "config.json"
STATISTICS = "statistics.json"
METRICS = "metrics.csv"
TIMING = "timing.csv"
PACKAGES = ("avsi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
RUN = "run.json"
CHECKPOINTS = "checkpoints"
MAY_CHANGE = set(  # on a resume: what changes no number of a step that is done
    "epochs data_dir validate_every checkpoint_every checkpoint_seconds keep early_stop_patience lstm watchdog_s images_every "
    "debug_nans".split()
)
LATER_FIELDS = {  # of the config: what runs did that are older than the field
    "levels": "preset", "motion": "pixels", "fidelity": "ours", "video_rate": "audio", "ctc_units": "characters",
    "mask_input": False, "bottleneck_relu": True, "skip": False, "stack": 1, "video_layers": 0, "feedback": 0, "dropout": 0.0,
    "dtype": "float32", "accumulate": 1, "ema": 0.0, "checkpoint_seconds": 60.0, "images_every": 0, "watchdog_s": 60.0,
    "debug_nans": False, "gaps": {"curriculum_steps": 0}, "loss": {"near_frames": 0},
    "augment": dict.fromkeys("speed gain_db mirror stretch noise_px jitter_ms drop_video drop_audio trim".split(), 0.0),
}  # fmt: skip


def check_config(config, workdir, normalisation: Normalisation | None = None, dataset: dict | None = None, write=True) -> None:
    """Writes config.json and, of a Normalisation, statistics.json; ValueError where a run lies there whose config differs in more
    than where to stop and what to keep, or that had another dataset or other statistics: then nothing is written.

    dataset: as `write_run` keeps it. write: False on all processes but the first, which only compare.
    """
    workdir = storage.folder(workdir)
    now = json.loads(config.to_json())
    if (workdir / CONFIG).exists() and has_begun(workdir):  # a run that never ended a step binds nobody
        before = read_config(workdir)
        may_change = MAY_CHANGE - ({"epochs"} if config.schedule == "cosine" else set())  # it is what the cosine falls over
        differ = [k for k in sorted(now.keys() | before.keys()) if k not in may_change and now.get(k) != before.get(k)]
        if differ:
            listed = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differ)
            raise ValueError(
                f"{workdir} holds a run with another config ({listed}); resume with the same, or take another --workdir"
            )
        _check_dataset(workdir, dataset or {})
    check_normalisation(normalisation, workdir, write)
    if write:
        workdir.mkdir(parents=True, exist_ok=True)
        storage.write_text(workdir / CONFIG, json.dumps(now, indent=2, sort_keys=True) + "\n")


def has_begun(workdir) -> bool:
    """Whether there is anything of a run that a resume would go on with."""
    checkpoints = workdir / CHECKPOINTS
    return (workdir / METRICS).exists() or (checkpoints.is_dir() and any(p.name.isdigit() for p in checkpoints.iterdir()))


def _check_dataset(workdir, dataset: dict) -> None:
    """ValueError where the run there was trained on other clips, or on others of the same names."""
    try:
        before = json.loads((workdir / RUN).read_text()).get("dataset", {})
    except (OSError, ValueError):
        return
    differ = [k for k in sorted(dataset) if k in before and before[k] != dataset[k]]
    if differ:
        listed = "; ".join(f"{k}: {before[k]!r} there, {dataset[k]!r} here" for k in differ)
        raise ValueError(
            f"{workdir} holds a run on another dataset ({listed}); resume with the one it began with, or take another --workdir"
        )


def read_config(workdir) -> dict:
    """config.json, with fields that came later as the run did it."""
    return filled_up(old_names.current_config(json.loads((workdir / CONFIG).read_text())), LATER_FIELDS)


def filled_up(fields: dict, later: dict) -> dict:
    """`fields` and, in groups too, what of `later` it lacks."""
    groups = {k: filled_up(fields.get(k, {}), v) for k, v in later.items() if isinstance(v, dict)}
    return later | fields | groups


def check_normalisation(normalisation: Normalisation | None, workdir, write: bool = True) -> None:
    """Writes statistics.json where anything is standardised; ValueError where a run lies there that had other statistics."""
    from avsi_jax.data.features import Normalisation

    path, normalisation = workdir / STATISTICS, normalisation or Normalisation()
    if has_begun(workdir) and (before := read_normalisation(workdir)) != normalisation:
        pairs = zip(normalisation._fields, before, normalisation, strict=True)
        differ = [f"{k}: {_shown(there)} there, {_shown(here)} here" for k, there, here in pairs if there != here]
        raise ValueError(
            f"{workdir} holds a run with other train statistics ({'; '.join(differ)}); "
            f"resume with the dataset it began with, or take another --workdir"
        )
    if not write:
        return
    if any(normalisation):
        kept = {k: scale and scale._asdict() for k, scale in normalisation._asdict().items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(path, json.dumps(kept) + "\n")
    else:
        path.unlink(missing_ok=True)  # of a run that never ended a step


def read_normalisation(workdir) -> Normalisation:
    """What statistics.json holds; nothing standardised where there is no such file."""
    from avsi_jax.data.features import Normalisation, Scale

    path = workdir / STATISTICS
    if not path.exists():
        return Normalisation()
    kept = json.loads(path.read_text())
    return Normalisation(**{k: v and Scale(tuple(v["mean"]), tuple(v["std"])) for k, v in kept.items()})


def _shown(scale) -> str:
    """A Scale in a few words: what its values come to."""
    if not scale:
        return "none"
    mean, std = (sum(v) / len(v) for v in scale)
    return f"mean {mean:.7g} and std {std:.7g} over {len(scale.mean)}"


def write_run(workdir, *, parameters: int, devices: list[str], processes: int, dataset: dict, parallel: str = "pmap") -> None:
    """run.json: what else decided the numbers."""
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
    storage.write_text(storage.folder(workdir) / RUN, json.dumps(run, indent=2) + "\n")


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def git_revision() -> str:
    """Revision of the checkout this code runs from, 'unknown' outside of one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def add_row(path, row: dict) -> None:
    """Appends one row to a CSV file, with a header where the file is new; by the header that is there, what it lacks left out."""
    path = storage.folder(path)
    before = path.read_text() if path.exists() else ""
    text = io.StringIO()
    writer = csv.DictWriter(
        text,
        before.split("\n", 1)[0].split(",") if before else list(row),
        restval="nan",
        extrasaction="ignore",
        lineterminator="\n",
    )
    if not before:
        writer.writeheader()
    writer.writerow(row)
    storage.append_line(path, text.getvalue().removesuffix("\n"))


def read_rows(path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none where there is no file."""
    path = storage.folder(path)
    if not path.exists():
        return []
    return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(path.read_text()))]


def cut_rows(path, step: int) -> None:
    """Drops the rows after `step`: a resumed run writes them again."""
    path = storage.folder(path)
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines[1:] if line.endswith("\n")]  # a killed run may have left half a row
        kept = lines[:1] + [line for line in whole if float(line.split(",", 1)[0]) <= step]
        storage.write_text(path, "".join(kept if len(kept) > 1 else []))


def timing(
    step: int, *, steps: int, train_s: float, batch_size: int, waiting: float, seconds: float, device_mb: float, phases
) -> dict[str, float]:
    """A row of timing.csv: steps and clips a second, share of time spent waiting for data, seconds of the epoch, peak memory of
    process and device, share of the run's life that went into steps that count, and its seconds by cause (`Phases`).
    """
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = steps / train_s if steps else 0.0
    return {
        "step": step,
        "steps_per_s": round(speed, 4),
        "clips_per_s": round(speed * batch_size, 2),
        "waiting_share": round(waiting / train_s, 5) if steps else 0.0,
        "epoch_s": round(seconds, 3),
        "peak_rss_mb": round(peak_mb),
        "device_mb": round(device_mb),
        "goodput": round(phases.goodput(), 4),
        **{f"{cause}_s": round(value, 3) for cause, value in phases.seconds().items()},
    }
