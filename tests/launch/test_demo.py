"""The comparison at the end of launch/demo.sh, which `make demo` runs."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def summary_with(gains):
    """The summary.json of an evaluation; gains: by how many dB av_mtl_s2s is better than a_si, by gap length in ms."""
    table = [
        {"system": system, "gap_ms": ms, "metric": "gap_l1_db", "mean": 12.0 - gain * (system == "av_mtl_s2s")}
        for ms, gain in gains.items()
        for system in ("a_si", "av_mtl_s2s")
    ]
    pair = {"a": "av_mtl_s2s", "b": "a_si", "metric": "gap_l1_db"}
    paired = [pair | {"gap_ms": ms, "mean": -gain, "low": -gain - 1, "high": -gain + 1} for ms, gain in gains.items()]
    return {"table": table, "paired": paired, "num_clips": 30, "split": "test_seen"}


@pytest.mark.parametrize(
    ("gains", "code"),
    [({300: -1, 600: 3, 1500: 2}, 0), ({300: 1, 600: 3, 1500: -2}, 1), ({600: float("nan")}, 1), ({300: 1}, 1), ({}, 1)],
)
def test_the_demo_fails_if_video_does_not_help(gains, code, tmp_path):
    script = (ROOT / "launch" / "demo.sh").read_text()
    compare = script[script.index("compare() {") : script.index("\n}\n", script.index("compare() {")) + 3]
    (tmp_path / "summary.json").write_text(json.dumps(summary_with(gains)))
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", f"{compare}compare summary.json must"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert bool(done.stderr) == bool(code)
    if 600 in gains and gains[600] == 3:
        assert " 600 ms   12.00         9.00    3.00   2.00 to 4.00" in done.stdout
