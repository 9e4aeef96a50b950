"""Every system learns from real clips with its own config: three epochs at full size."""

import csv
import json
import shutil

import numpy as np
import pytest

from avsi_jax import configs
from avsi_jax.models import build, systems
from avsi_jax.training import cli
from tests.support.dataset_builds import run

pytestmark = pytest.mark.slow  # minutes: networks of full size

SYSTEMS = (*systems.SYSTEMS, "av_s2s_136", "av_mtl_s2s_512", "av_mtl_s2s_phones", "av_mtl_s2s_mouth")
CLIPS = {"s1": 17, "s2": 15, "s26": 4}  # 32 clips of two speakers for training, 4 of an unseen one for validation


@pytest.fixture(scope="module")
def data_dir(grid_dir, tmp_path_factory):
    """A dataset of the first clips of each speaker, without reserved ones."""
    raw, data = (tmp_path_factory.mktemp("systems") / name for name in ("raw", "data"))
    reserved = (grid_dir / "RESERVED.txt").read_text().split() if (grid_dir / "RESERVED.txt").exists() else []
    for speaker, count in CLIPS.items():
        clips = [clip for clip in sorted((grid_dir / speaker).glob("*.mpg")) if clip.stem not in reserved]
        assert len(clips) >= count, f"found {len(clips)} clips of {speaker}, expected {count}"
        for clip in clips[:count]:
            align = grid_dir / "alignments" / speaker / f"{clip.stem}.align"
            for source, target in ((clip, raw / speaker / clip.name), (align, raw / "alignments" / speaker / align.name)):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
    run(f"--raw={raw}", f"--data_dir={data}", "--full_train")
    return data


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_learns_from_real_clips(name, data_dir, tmp_path):
    """Only epochs, batch size and intervals of validation and saving differ from its config."""
    fields = {"data_dir": data_dir, "epochs": 3, "batch_size": 8, "checkpoint_every": 3, "keep": 1,
              "validation_split": "validation", "validate_every": 1}  # fmt: skip
    config = configs.load(name, [(field, str(value)) for field, value in fields.items()])
    cli.train(config, tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    print(name, *(f"{row['train_loss']:.4g}" for row in rows))
    assert [row["step"] for row in rows] == [4, 8, 12] and np.isfinite([list(row.values()) for row in rows]).all()
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    system = systems.get(config.system)
    assert ("train_ctc" in rows[0]) == system.has_ctc_head and ("train_gap_l1_db" in rows[0]) == system.restores
    if system.has_ctc_head:
        assert rows[-1]["train_ctc"] < rows[0]["train_ctc"] and rows[-1]["train_ctc_infeasible"] == 0
    run_json = json.loads((tmp_path / "run.json").read_text())
    assert run_json["parameters"] == build.parameter_count(config) and run_json["dataset"]["version"] == "2.1.0"
