"""One program for every platform: lowered once, it gives what the Restorer gives, in a process that has jax and numpy alone."""

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
# Runs the example where none of our packages, nor what they are made with, can be imported.
ALONE = """
import runpy, sys
class Refuses:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("avsi_jax", "configs", "flax", "orbax", "safetensors", "ml_collections", "librosa", "tfds_grid"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuses())
example, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(example)
assert not {"avsi_jax", "flax", "orbax"} & sys.modules.keys()
"""


@pytest.fixture(scope="module")
def run():
    """Of float16 numbers, small ones, so that nothing saturates."""
    import jax

    run = tiny_weights.run()
    return run._replace(params=jax.tree.map(lambda x: (0.1 * x).astype(np.float16).astype(np.float32), run.params))


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """What avsi-export writes of a folder of weights. Not to be changed by a test."""
    made = tmp_path_factory.mktemp("export")
    weights.write(made / "weights", run, {"note": "made up", "measured": {}})
    assert export.main([f"--checkpoint={made / 'weights'}", f"--out={made / 'program'}"]) == 0
    return made / "program"


@pytest.fixture(scope="module")
def program(folder):
    from jax import export as jax_export

    return jax_export.deserialize(bytearray((folder / "model.jaxexport").read_bytes()))


@pytest.fixture(scope="module")
def clips():
    """Two clips of 60 pictures with two gaps each, one of them shorter than the other and with one gap, in 16-bit steps."""
    rng = np.random.default_rng(0)
    time = np.arange(N) / 16_000
    voice = 0.1 * np.sin(2 * np.pi * 140 * time) * np.clip(np.sin(9 * time), 0, None) + 0.01 * rng.normal(size=(2, N))
    length = np.array([N, 40_000], np.int32)
    audio = np.where(np.arange(N) < length[:, None], np.rint(voice * 32_768) / 32_768, 0).astype(np.float32)
    return {
        "sound": audio, "length": length,
        "gaps": np.array([[[16_000, 24_000], [30_000, 32_000]], [[5_000, 20_000], [0, 0]]], np.int32),
        "landmarks": (150 + 30 * rng.normal(size=(2, 60, 68, 2))).astype(np.float32), "landmarks_valid": rng.random((2, 60)) < 0.9,
        "num_pictures": np.array([60, 50], np.int32), "fps": np.full(2, 25, np.float32), "lag_s": np.array([0, 0.011], np.float32),
        "picture_size": np.full((2, 2), (360, 288), np.int32), "seed": np.array([3, 2**32 - 1], np.uint32),
    }  # fmt: skip


def test_it_is_lowered_for_every_platform_without_custom_calls(program):
    """But for jax's own check of the shapes left free; b, g and t are."""
    assert program.platforms == ("cpu", "cuda", "tpu")
    text = program.mlir_module()
    called = set(re.findall(r"custom_call\s*@?\"?(\w+)", text)) | set(re.findall(r'call_target_name = "(\w+)"', text))
    assert called <= {"shape_assertion"}
    shapes = {str(a.shape) for a in program.in_avals}
    assert {"(b, 48000)", "(b, g, 2)", "(b, t, 68, 2)"} <= shapes


def test_it_gives_what_the_restorer_gives_with_jax_and_numpy_alone(run, folder, clips, tmp_path):
    from avsi_jax.inference.restorer import Restorer

    spoilt = clips | {"sound": clips["sound"].copy()}
    spoilt["sound"][0, 16_000:24_000] = np.nan  # what stands in a gap is never looked at
    np.savez(tmp_path / "clips.npz", **spoilt)
    command = [sys.executable, "-c", ALONE, str(EXAMPLE), str(folder), "clips.npz", "restored.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "restored.npz")

    restorer = Restorer(*run)
    of = dict(length="audio_length", num_video_frames="num_frames", lag_s="offset_s", frame_size="frame_size", seed="id_hash")
    batch = {of.get(k, k): v for k, v in clips.items() if k not in ("sound", "gaps")}
    batch["audio"] = np.rint(clips["sound"] * 32_768).astype(np.int16)
    restored = restorer.restore(batch, clips["gaps"])
    np.testing.assert_allclose(found["level"], restored.level, atol=1e-5)
    np.testing.assert_allclose(found["logits"], restored.logits, atol=1e-5)
    np.testing.assert_array_equal(found["num_steps"], restored.num_steps)
    audio = restorer.to_audio(restored.level, batch, clips["gaps"])
    np.testing.assert_allclose(found["sound"], audio, atol=1e-5)
    missing = np.zeros((2, N), bool)
    missing[0, 16_000:24_000] = missing[0, 30_000:32_000] = missing[1, 5_000:20_000] = True
    np.testing.assert_array_equal(found["sound"][~missing], clips["sound"][~missing])
    assert (np.abs(found["sound"][missing]) > 0).mean() > 0.9, "something is said in the gaps"


def test_what_lies_beside_it(run, folder, clips):
    """The weights as they were, what the program takes and gives, and a card that tells of both."""
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "config.json", "export.json", "model.jaxexport", "model.safetensors",
    ]  # fmt: skip
    found = weights.read(folder)
    assert found.facts["note"] == "made up" and found.step == 7
    told = json.loads((folder / "export.json").read_text())
    assert told["inputs"].keys() == clips.keys() and (told["N"], told["sound_rate"]) == (N, 16_000)
    for name, value in clips.items():
        letters = told["inputs"][name]["shape"].split()
        assert told["inputs"][name]["dtype"] == value.dtype and len(letters) == value.ndim
        assert [n for n in letters if n.isdigit()] == [str(n) for n, at in zip(value.shape, letters) if at.isdigit()]
    assert told["outputs"]["level"] == {"shape": "b 301 80", "dtype": "float32"}
    assert "model.jaxexport" in (folder / "README.md").read_text()


def test_parameters_lie_inside_as_small_as_loses_nothing(run):
    import jax

    assert {x.dtype for x in jax.tree.leaves(export._smallest(run.params))} == {np.dtype(np.float16)}
    odd = {"a": np.array([1.0, 0.1], np.float32)}  # 0.1 has no float16
    assert export._smallest(odd)["a"].dtype == np.float32


def test_the_example_needs_no_more_than_it_says():
    text = EXAMPLE.read_text()
    assert text.count("\n") <= 30
    assert set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) == {"sys", "numpy", "jax"}


def test_command_says_what_is_wrong_in_one_line(folder, tmp_path, capsys):
    before = (folder / "model.jaxexport").read_bytes()
    for arguments, says in (
        ([f"--checkpoint={folder}", f"--out={folder}"], "exists; take --overwrite to replace it"),
        (["--checkpoint=av_unifed", f"--out={tmp_path / 'x'}"], "weights"),
        ([f"--checkpoint={tmp_path}", f"--out={tmp_path / 'x'}"], "no config.json in"),
    ):
        assert export.main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("avsi-export: ") and says in said and said.count("\n") == 1
    assert (folder / "model.jaxexport").read_bytes() == before and not (tmp_path / "x").exists()


def test_a_recogniser_is_refused(run, tmp_path):
    """It restores nothing."""
    from avsi_jax.inference import restorer

    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.system = "asr"
    with pytest.raises(ValueError, match="which restores nothing"):
        restorer.Restorer.check(run._replace(config=config), "here")
