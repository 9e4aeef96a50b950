"""The files of a run's workdir: config.json, statistics.json (what levels and motion were standardised by), run.json, metrics.csv
(identical after a resume) and timing.csv (speed).
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import platform
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avsi_jax.features import Normalisation

CONFIG = "config.json"
STATISTICS = "statistics.json"
METRICS = "metrics.csv"
TIMING = "timing.csv"
PACKAGES = ("avsi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MAY_CHANGE = {"epochs", "data_dir", "validate_every", "checkpoint_every", "keep", "early_stop_patience", "lstm"}  # on a resume
LATER_FIELDS = {  # of the config: what runs did that are older than the field
    "motion": "pixels", "fidelity": "ours", "video_rate": "audio", "ctc_units": "characters", "mask_input": False,
    "bottleneck_relu": True, "skip": False, "stack": 1, "lip_layers": 0, "feedback": 0, "dropout": 0.0, "dtype": "float32",
    "gaps": {"curriculum_steps": 0}, "loss": {"near_frames": 0},
    "augment": dict.fromkeys("speed gain_db mirror stretch noise_px jitter_ms lose_video lose_sound trim".split(), 0.0),
}  # fmt: skip


def check_config(config, workdir: Path, normalisation: Normalisation | None = None) -> None:
    """Writes config.json and, of a Normalisation, statistics.json; ValueError where a run lies there whose config differs in more
    than where to stop and what to keep, or that had other statistics: then nothing is written.
    """
    path = workdir / CONFIG
    now = json.loads(config.to_json())
    if path.exists() and (workdir / METRICS).exists():  # a run that never ended an epoch binds nobody
        before = read_config(workdir)
        differ = [k for k in sorted(now.keys() | before.keys()) if k not in MAY_CHANGE and now.get(k) != before.get(k)]
        if differ:
            listed = "; ".join(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in differ)
            raise ValueError(
                f"{workdir} holds a run with another config ({listed}); resume with the same, or take another --workdir"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    check_normalisation(normalisation, workdir)
    path.write_text(json.dumps(now, indent=2, sort_keys=True) + "\n")


def read_config(workdir: Path) -> dict:
    """config.json, with fields that came later as the run did it."""
    return _filled_up(json.loads((workdir / CONFIG).read_text()), LATER_FIELDS)


def _filled_up(fields: dict, later: dict) -> dict:
    """`fields` and, in groups too, what of `later` it lacks."""
    groups = {k: _filled_up(fields.get(k, {}), v) for k, v in later.items() if isinstance(v, dict)}
    return later | fields | groups


def check_normalisation(normalisation: Normalisation | None, workdir: Path) -> None:
    """Writes statistics.json where anything is standardised; ValueError where a run lies there that had other statistics."""
    from avsi_jax.features import Normalisation

    path, normalisation = workdir / STATISTICS, normalisation or Normalisation()
    if (workdir / METRICS).exists() and (before := read_normalisation(workdir)) != normalisation:
        pairs = zip(normalisation._fields, before, normalisation, strict=True)
        differ = [f"{k}: {_shown(there)} there, {_shown(here)} here" for k, there, here in pairs if there != here]
        raise ValueError(
            f"{workdir} holds a run with other train statistics ({'; '.join(differ)}); "
            f"resume with the dataset it began with, or take another --workdir"
        )
    if any(normalisation):
        kept = {k: scale and scale._asdict() for k, scale in normalisation._asdict().items()}
        path.write_text(json.dumps(kept) + "\n")
    else:
        path.unlink(missing_ok=True)  # of a run that never ended an epoch


def read_normalisation(workdir: Path) -> Normalisation:
    """What statistics.json holds; nothing standardised where there is no such file."""
    from avsi_jax.features import Normalisation, Scale

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


def write_run(workdir: Path, *, parameters: int, devices: list[str], processes: int, dataset: dict) -> None:
    """run.json: what else decided the numbers."""
    run = {
        "revision": git_revision(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": devices,
        "processes": processes,
        "parameters": parameters,
        "dataset": dataset,
    }
    (workdir / "run.json").write_text(json.dumps(run, indent=2) + "\n")


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


def add_row(path: Path, row: dict) -> None:
    """Appends one row to a CSV file, with a header where the file is new; by the header that is there, what it lacks left out."""
    new = not path.exists() or path.stat().st_size == 0
    names = list(row) if new else path.read_text().split("\n", 1)[0].split(",")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, names, restval="nan", extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSV file of numbers; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def cut_rows(path: Path, step: int) -> None:
    """Drops the rows after `step`: a resumed run writes them again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        whole = [line for line in lines[1:] if line.endswith("\n")]  # a killed run may have left half a row
        kept = lines[:1] + [line for line in whole if float(line.split(",", 1)[0]) <= step]
        path.write_text("".join(kept))


def timing(step: int, speed: float, batch_size: int, waiting: float, seconds: float) -> dict[str, float]:
    """A row of timing.csv: steps and clips a second, share of time spent waiting for data, seconds of the epoch, peak memory."""
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "step": step,
        "steps_per_s": round(speed, 4),
        "clips_per_s": round(speed * batch_size, 2),
        "waiting_share": round(waiting, 5),
        "epoch_s": round(seconds, 3),
        "peak_rss_mb": round(peak_mb),
    }
