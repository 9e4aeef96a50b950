"""The exported program: lowered once for all platforms, equal to Restorer, and usable with jax and numpy alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.inference import export, weights
from tests.support import tiny_weights

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "load_export.py"
N = 48_000  # of preset wide: 3 s at 16 kHz
# Runs the example in a process that cannot import our packages or their dependencies.
ALONE = """
import runpy, sys
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("avsi_jax", "flax", "orbax", "safetensors", "ml_collections", "librosa", "tfds_grid"):
            raise ImportError(f"{name} is blocked in this test")
sys.meta_path.insert(0, Refuses())
example, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(example)
assert not {"avsi_jax", "flax", "orbax"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def run():
    """Parameters are small float16 numbers, so that nothing saturates."""
    import jax

    run = tiny_weights.run()
    return run._replace(params=jax.tree.map(lambda x: (0.1 * x).astype(np.float16).astype(np.float32), run.params))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """The output of avsi-export for a folder of weights. Tests must not change it."""
    home = tmp_path_factory.mktemp("export")
    weights.write(home / "weights", run, {"note": "fake", "measured": {}})
    assert export.main([f"--checkpoint={home / 'weights'}", f"--out={home / 'program'}"]) == 0
    return home / "program"


@pytest.fixture(scope="module")
def program(folder):
    from jax import export as jax_export

    return jax_export.deserialize(bytearray((folder / "model.jaxexport").read_bytes()))


@pytest.fixture(scope="module")
def clips():
    """Two clips of 60 video frames: one with two gaps, and a shorter one with one gap; samples are 16-bit values."""
    rng = np.random.default_rng(0)
    time = np.arange(N) / 16_000
    voice = 0.1 * np.sin(2 * np.pi * 140 * time) * np.clip(np.sin(9 * time), 0, None) + 0.01 * rng.normal(size=(2, N))
    length = np.array([N, 40_000], np.int32)
    audio = np.where(np.arange(N) < length[:, None], np.rint(voice * 32_768) / 32_768, 0).astype(np.float32)
    return {
        "audio": audio, "audio_length": length,
        "gaps": np.array([[[16_000, 24_000], [30_000, 32_000]], [[5_000, 20_000], [0, 0]]], np.int32),
        "landmarks": (150 + 30 * rng.normal(size=(2, 60, 68, 2))).astype(np.float32), "landmarks_valid": rng.random((2, 60)) < 0.9,
        "num_frames": np.array([60, 50], np.int32), "fps": np.full(2, 25, np.float32), "offset_s": np.array([0, 0.011], np.float32),
        "frame_size": np.full((2, 2), (360, 288), np.int32), "seed": np.array([3, 2**32 - 1], np.uint32),
    }  # fmt: skip


def test_the_program_is_lowered_for_every_platform_without_custom_calls(program):
    """Except jax's own check of free shapes: b, g and t are free."""
    assert program.platforms == ("cpu", "cuda", "tpu")
    text = program.mlir_module()
    called = set(re.findall(r"custom_call\s*@?\"?(\w+)", text)) | set(re.findall(r'call_target_name = "(\w+)"', text))
    assert called <= {"shape_assertion"}
    shapes = {str(a.shape) for a in program.in_avals}
    assert {"(b, 48000)", "(b, g, 2)", "(b, t, 68, 2)"} <= shapes


@pytest.mark.slow
def test_the_program_equals_the_restorer_and_needs_only_jax_and_numpy(run, folder, clips, tmp_path):
    from avsi_jax.inference.restorer import Restorer

    with_nan = clips | {"audio": clips["audio"].copy()}
    with_nan["audio"][0, 16_000:24_000] = np.nan  # samples inside a gap are ignored
    np.savez(tmp_path / "clips.npz", **with_nan)
    command = [sys.executable, "-c", ALONE, str(EXAMPLE), str(folder), "clips.npz", "restored.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    exported = np.load(tmp_path / "restored.npz")

    restorer = Restorer(*run)
    batch = {k: v for k, v in clips.items() if k not in ("gaps", "seed")} | {"id_hash": clips["seed"]}
    batch["audio"] = np.rint(clips["audio"] * 32_768).astype(np.int16)
    restored = restorer.restore(batch, clips["gaps"])
    np.testing.assert_allclose(exported["level"], restored.level, atol=1e-5)
    np.testing.assert_allclose(exported["logits"], restored.logits, atol=1e-5)
    np.testing.assert_array_equal(exported["num_steps"], restored.num_steps)
    audio = restorer.to_audio(restored.level, batch, clips["gaps"])
    np.testing.assert_allclose(exported["audio"], audio, atol=1e-5)
    missing = np.zeros((2, N), bool)
    missing[0, 16_000:24_000] = missing[0, 30_000:32_000] = missing[1, 5_000:20_000] = True
    np.testing.assert_array_equal(exported["audio"][~missing], clips["audio"][~missing])
    assert (np.abs(exported["audio"][missing]) > 0).mean() > 0.9, "the gaps contain audio"


def test_an_export_contains_weights_a_description_and_a_card(run, folder, clips):
    """export.json describes inputs and outputs; the card mentions the program."""
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "export.json", "model.jaxexport", "model.safetensors",
    ]  # fmt: skip
    loaded = weights.read(folder)
    assert loaded.facts["note"] == "fake" and loaded.step == 7
    described = json.loads((folder / "export.json").read_text())
    assert described["inputs"].keys() == clips.keys() and (described["N"], described["audio_rate"]) == (N, 16_000)
    for name, value in clips.items():
        letters = described["inputs"][name]["shape"].split()
        assert described["inputs"][name]["dtype"] == value.dtype and len(letters) == value.ndim
        assert [n for n in letters if n.isdigit()] == [str(n) for n, letter in zip(value.shape, letters) if letter.isdigit()]
    assert described["outputs"]["level"] == {"shape": "b 301 80", "dtype": "float32"}
    assert "model.jaxexport" in (folder / "README.md").read_text()


def test_parameters_are_float16_only_where_that_is_exact(run):
    import jax

    assert {x.dtype for x in jax.tree.leaves(export._smallest(run.params))} == {np.dtype(np.float16)}
    inexact = {"a": np.array([1.0, 0.1], np.float32)}  # 0.1 is not a float16 number
    assert export._smallest(inexact)["a"].dtype == np.float32


def test_the_example_is_short_and_imports_only_jax_and_numpy():
    text = EXAMPLE.read_text()
    assert text.count("\n") <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"sys", "numpy", "jax"}


def test_the_command_reports_errors_in_one_line(folder, tmp_path, capsys):
    before = (folder / "model.jaxexport").read_bytes()
    for arguments, says in (
        ([f"--checkpoint={folder}", f"--out={folder}"], "model.jaxexport exists"),
        (["--checkpoint=av_unifed", f"--out={tmp_path / 'x'}"], "weights"),
        ([f"--checkpoint={tmp_path}", f"--out={tmp_path / 'x'}"], "no config.json in"),
    ):
        assert export.main(arguments) == 2
        message = capsys.readouterr().err
        assert message.startswith("avsi-export: ") and says in message and message.count("\n") == 1
    assert (folder / "model.jaxexport").read_bytes() == before and not (tmp_path / "x").exists()


def test_a_recognizer_is_refused(run, tmp_path):
    from avsi_jax.inference import restorer

    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.system = "asr"
    with pytest.raises(ValueError, match="which restores nothing"):
        restorer.Restorer.check(run._replace(config=config), "here")
