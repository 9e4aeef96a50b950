"""The main job by the installed package: example restored, dataset built, three training steps, evaluation, export, web page.

`make test-newest` and `make test-oldest` run this file in environments of their own, with the newest releases of all dependencies
and with the oldest that pyproject.toml allows; `make test` does not collect it. The commands run in a temporary folder, so that
the package that is tested is the installed one. The tests depend on each other and run in the order of the file.
"""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ENV = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
GAP_S = (0.9, 1.5)  # of the example


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("job")


def run(folder: Path, command: str, *args: str) -> str:
    """stdout of a command that succeeds."""
    done = subprocess.run([BIN / command, *args], cwd=folder, env=ENV, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{command} {' '.join(args)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_installed_package_is_tested(folder):
    place = Path(run(folder, "python", "-c", "import avsi_jax; print(avsi_jax.__file__)").strip())
    assert "site-packages" in place.parts and place.is_relative_to(BIN.parent), f"found {place}, expected it in {BIN.parent}"


def test_example_is_restored_with_a_report(folder):
    (outcome,) = map(json.loads, run(folder, "avsi-inpaint", "--example", "--report", "--json").splitlines())
    (gap,) = outcome["gaps"]
    assert (outcome["status"], gap["start_s"], gap["end_s"]) == ("restored", *GAP_S)
    assert (folder / outcome["output"]).stat().st_size > 100_000
    assert "<html" in (folder / "inpainting.html").read_text()[:1000]
    code = """
import sys, numpy as np
from avsi_jax.inpainting import cli_jobs
from avsi_jax.media import clip_io
(given, restored), gap = [clip_io.read_clip(p).audio for p in (cli_jobs.EXAMPLE, sys.argv[1])], map(float, sys.argv[2:])
start, end = (round(given.rate * s) for s in gap)
assert restored.rate == given.rate and abs(len(restored.samples) - len(given.samples)) < given.rate / 25
assert np.abs(restored.samples[start:end]).max() > 0.01, "the gap is silent"
"""
    run(folder, "python", "-c", code, outcome["output"], *map(str, GAP_S))


def test_dataset_is_built(folder):
    run(folder, "python", "-m", "tfds_grid.synthetic", "--out=raw", "--speakers=2", "--clips=6", "--seed=0")
    assert "12 of 12 clips" in run(folder, "avsi-prepare", "--raw=raw", "--data_dir=data")


def test_three_training_steps(folder):
    steps = ("--config.epochs=3", "--config.batch_size=8", "--config.validate_every=3")
    data = ("--config.data_dir=data", "--config.validation_split=validation_seen")
    run(folder, "avsi-train", "--config=tiny", "--workdir=run", *data, *steps)
    rows = list(csv.DictReader((folder / "run" / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["step"]) == 3 and all(math.isfinite(float(rows[-1][loss])) for loss in ("train_loss", "val_loss"))


def test_evaluation(folder):
    run(folder, "avsi-evaluate", "--workdir=run", "--config.split=test_seen", "--config.gap_ms=600", "--config.max_clips=2")
    (summary,) = (folder / "run" / "eval").glob("*/summary.json")
    table = json.loads(summary.read_text())["table"]
    assert {"pesq_nb", "stoi"} <= {row["metric"] for row in table} and all(math.isfinite(row["mean"]) for row in table if row["n"])
    assert (summary.parent / "report.html").exists()


def test_export(folder):
    run(folder, "avsi-export", "--checkpoint=run", "--out=export")
    code = "from jax import export; print(export.deserialize(bytearray(open('export/model.jaxexport', 'rb').read())).platforms)"
    assert run(folder, "python", "-c", code).strip() == "('cpu', 'cuda', 'tpu')"


def test_web_page_answers(folder):
    command, output = [BIN / "avsi-app", "--port=0"], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    page = subprocess.Popen(command, cwd=folder, env=ENV, **output)
    try:
        lines = []
        for line in page.stdout:
            lines.append(line)
            if address := re.search(r"http://\S+", line):
                break
        else:
            pytest.fail("avsi-app ended: " + "".join(lines))
        with urllib.request.urlopen(address.group(), timeout=60) as answer:
            assert answer.status == 200 and b"gradio" in answer.read()
        page.send_signal(signal.SIGINT)
        assert page.wait(60) == 0
    finally:
        page.kill()
        page.wait()
