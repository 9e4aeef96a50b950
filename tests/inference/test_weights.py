"""Weights: written parameters are read back, rounded once to float16; names and folders; facts and model cards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.evaluation import conditions
from avsi_jax.inference import model_card, weights
from avsi_jax.runtime import shown_paths
from tests.support import fake_evaluations, tiny_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    return tiny_weights.run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tests must not change it."""
    return tiny_weights.written(tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture
def copied(folder, tmp_path):
    return tiny_weights.copied(folder, tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------------------------- round trip


def test_parameters_are_read_back_rounded_to_float16(run, folder):
    import jax

    found = weights.read(folder)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), run.params)
    assert jax.tree.structure(found.params) == jax.tree.structure(rounded)
    jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    assert (found.step, found.normalisation, found.facts) == (7, run.normalisation, {"note": "fake", "measured": {}})
    expected = run.config.to_dict() | {"data_dir": ""}  # belongs to the user's machine
    assert found.config.to_dict() == expected and found.config.is_locked


def test_the_safetensors_library_reads_the_file(run, folder):
    """Every number is stored once, as float16."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    kernel = run.params["decoder"]["blstm_1"]["forward"]["ii"]["kernel"]
    np.testing.assert_array_equal(tensors["decoder.blstm_1.forward.ii.kernel"], kernel.astype(np.float16))
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    count = sum(t.size for t in tensors.values())
    size = (folder / "model.safetensors").stat().st_size
    assert 2 * count < size < 2 * count + 200 * len(tensors)


def test_no_path_of_the_machine_is_stored(folder):
    for path in folder.iterdir():
        assert b"/somewhere" not in path.read_bytes(), path


def test_a_parameter_beyond_the_range_of_float16_is_refused(run, tmp_path):
    params = {**run.params, "output": {**run.params["output"], "bias": np.full_like(run.params["output"]["bias"], 1e6)}}
    with pytest.raises(weights.WeightsError, match=r"step 7: output\.bias .*float16"):
        weights.write(tmp_path / "w", run._replace(params=params), {})
    assert not (tmp_path / "w").exists()


def test_existing_weights_are_replaced_only_with_overwrite(run, copied):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(FileExistsError, match="exists; .*--overwrite"):
        weights.write(copied, run, {})
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    (copied / "own.txt").write_text("mine")
    weights.write(copied, run._replace(step=8), {}, overwrite=True)
    assert weights.read(copied).step == 8 and (copied / "own.txt").read_text() == "mine"


def test_the_config_of_a_run_directory_is_not_replaced(run, copied):
    """A run directory has a config.json too."""
    (copied / "checkpoints").mkdir()
    before = (copied / "config.json").read_bytes()
    with pytest.raises(weights.WeightsError, match=r"is a run directory, whose config\.json"):
        weights.write(copied, run, {}, overwrite=True)
    assert (copied / "config.json").read_bytes() == before


# -------------------------------------------------------------------------------------------------------------------- finding


def test_shipped_weights_are_found_by_name(folder, tmp_path, monkeypatch):
    from avsi_jax.inference import restorer

    monkeypatch.setattr(weights, "HOME", tmp_path / "none")
    assert weights.names() == []
    with pytest.raises(weights.WeightsError, match=r"^no weights shipped in this version; .*--checkpoint=DIR$"):
        restorer.read_run("pretrained")
    monkeypatch.setattr(weights, "HOME", folder.parent)
    assert weights.names() == ["small"] and weights.find("small") == folder
    with pytest.raises(weights.WeightsError, match="no weights 'pretrained' in this version .*expected one of pretrained, small"):
        weights.find()
    monkeypatch.setattr(weights, "DEFAULT", "small")
    assert restorer.read_run("pretrained").step == restorer.read_run("small").step == restorer.read_run(folder).step == 7
    with pytest.raises(weights.WeightsError, match="no weights 'av_unifed' in this version"):
        restorer.read_run("av_unifed")
    for name in ("../small", "", "..", "small/"):
        with pytest.raises(weights.WeightsError):
            weights.find(name)


def test_a_folder_precedes_shipped_weights_of_the_same_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "HOME", folder.parent)
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert weights.locate("small") is None, "not a folder of weights: read as a run directory"


def test_an_evaluation_of_weights_needs_a_data_folder(folder, tmp_path, capsys):
    from avsi_jax.evaluation import cli

    assert cli.main([f"--checkpoint={folder}", f"--workdir={tmp_path}"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("avsi-evaluate: ") and "--config.data_dir=DIR" in message and message.count("\n") == 1


@pytest.mark.slow
def test_a_restorer_of_weights_needs_no_heavy_library(folder, tmp_path):
    heavy = "orbax librosa numba tensorflow tensorflow_datasets matplotlib grain cv2 av soundfile optax".split()
    code = (
        "import sys; from avsi_jax.inference.restorer import Restorer; r = Restorer.load(sys.argv[1]); "
        f"print(r.name, r.step, [m for m in {heavy} if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "av_unified 7 []\n", done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------------------------------- facts


LENGTHS = [conditions.Case(ms) for ms in (300, 900)]
STREAMS = [conditions.Case(600), conditions.Case(600, "no_video", 1), conditions.Case(3000, "whole_clip", 1)]


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The files of a run directory with five evaluations, one of another step and one by another protocol."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    command = f"avsi-evaluate --workdir={workdir} --config.split=test"
    common = {"by_speaker": True, "runs": {"av_mtl_s2s": {"step": 7}}, "command": command}
    evaluate = lambda name, cases, **more: fake_evaluations.make(
        workdir / "eval" / name, cases=cases, examples=False, **common | more
    )
    evaluate("waveform-test-lengths", LENGTHS, suite="lengths", split="test")
    evaluate("waveform-test-streams", STREAMS, suite="streams", split="test")
    evaluate("waveform-test_seen-lengths", LENGTHS, suite="lengths", split="test_seen", shift=-1.0)
    evaluate("waveform-test-robustness", LENGTHS, suite="robustness", split="test", runs={"av_mtl_s2s": {"step": 3}})
    evaluate("paper-test-lengths", LENGTHS, suite="lengths", split="test", protocol="paper")
    data = {"builder_config": "speaker_independent", "version": "2.1.0", "clips": {"train": 5}, "fingerprint": {"train": "f0"}}
    (workdir / "run.json").write_text(json.dumps({"revision": "abc", "devices": ["cpu"], "parameters": 9, "dataset": data}))
    (workdir / "metrics.csv").write_text("step,epoch,val_loss,val_gap_l1_db\n4,1,0.5,9.5\n7,2,0.25,8.5\n9,3,0.1,1.0\n")
    return workdir


@pytest.fixture(scope="module")
def facts(run, evaluated):
    return model_card.facts_of(evaluated, run)


def test_measured_quality_is_that_of_unseen_speakers(facts):
    """tests/support/fake_evaluations.py: 20 - 5 x 2 places + gap in s + mean of clips 0 1 2, plus 1.5 with a changed input."""
    measured = facts["measured"]
    assert {k: sorted(v, key=int) for k, v in measured.items()} == {
        "audio and video": ["300", "600", "900"], "audio": ["600"], "video": ["3000"],
    }  # fmt: skip
    error = lambda inputs, ms: measured[inputs][str(ms)]["gap_l1_db"]
    assert error("audio and video", 300) == pytest.approx(11.3)
    assert error("audio and video", 900) == pytest.approx(11.9)
    assert error("audio", 600) == pytest.approx(13.1)
    assert error("video", 3000) == pytest.approx(15.5)
    assert measured["audio and video"]["900"]["stoi"] == pytest.approx(0.62)
    weights.check_measured(measured, "here")


def test_facts_are_those_of_the_chosen_step(facts):
    assert sorted((e["split"], e["suite"]) for e in facts["evaluations"]) == [
        ("test", "lengths"), ("test", "streams"), ("test_seen", "lengths"),
    ]  # fmt: skip
    assert facts["training"]["validation"] == {"val_loss": 0.25, "val_gap_l1_db": 8.5} and facts["training"]["epochs_done"] == 2
    assert facts["evaluations"][0]["speakers"] == {"s1": 1, "s10": 1, "s2": 1}
    assert facts["evaluations"][0]["command"] == "avsi-evaluate --workdir=run --config.split=test"


def test_the_card_shows_what_was_measured(run, facts):
    import yaml

    card = model_card.text("av_unified", run.config, facts)
    _, head, body = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "avsi_jax" and metadata["datasets"] == ["grid"]
    results = metadata["model-index"][0]["results"]
    found = {r["dataset"]["name"]: {m["type"]: m["value"] for m in r["metrics"]} for r in results}
    assert found["Grid, unseen speakers, gap of 900 ms, n=3"]["gap_l1_db"] == pytest.approx(11.9)
    assert "CC BY 4.0" in body and "evidence" in body and "809" not in body, "the number of another dataset"
    # three clips of 10.3 to 12.3: their mean, and an interval inside that range
    row = next(line for line in body.splitlines() if line.startswith("| 300 | audio and video | 11.3 ["))
    low, high = map(float, row.split("[")[1].split("]")[0].split(","))
    assert 10.3 <= low < 11.3 < high <= 12.3
    assert "| 300 | masked audio | 21.3 [" in body and "n = 3 clips (s1 1, s10 1, s2 1)" in body
    assert "| 3000 | video | 15.5 [" in body and "| 600 | audio | 13.1 [" in body
    assert "`avsi-evaluate --workdir=run --config.split=test`" in body


def test_the_card_of_an_audio_only_system_does_not_mention_video(run, evaluated):
    config = run.config.copy_and_resolve_references()
    config.system = "a_si"
    facts = model_card.facts_of(evaluated, run._replace(config=config))
    assert set(facts["measured"]) == {"audio"}, "the confidence of audio-only inpainting depends on it"
    assert facts["measured"]["audio"]["900"]["stoi"] == pytest.approx(0.62)
    card = model_card.text("a_si", config, facts)
    assert "| 300 | audio | 11.3 [" in card and "(it uses no video)" in card
    assert not any(text in card for text in ("audio and video", "lip-reading", "audio-visual speech", "predicts the words"))


def test_the_shipped_cards_are_those_of_their_facts():
    """To write them again: `model_card.text(name, config, facts)` of the shipped weights."""
    for name in weights.names():
        shipped = weights.read(weights.find(name))
        assert (weights.find(name) / weights.CARD).read_text() == model_card.text(name, shipped.config, shipped.facts), name


def test_a_card_without_any_measurement_says_so(run):
    card = model_card.text("x", run.config, model_card.facts_of("no such folder", run))
    assert "Not measured yet." in card and "model-index" not in card


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("avsi-evaluate --workdir=/a/b/run --config.split=test", "avsi-evaluate --workdir=run --config.split=test"),
        ("avsi-evaluate --workdir /a/b/run --raw ~/grid", "avsi-evaluate --workdir run --raw grid"),
        ("avsi-evaluate --config=configs/eval.py --workdir=runs/1", "avsi-evaluate --config=configs/eval.py --workdir=runs/1"),
        ("avsi-evaluate --baseline=../../b/run", "avsi-evaluate --baseline=run"),
    ],
)
def test_paths_of_the_machine_are_removed_from_commands(command, expected):
    assert shown_paths.without_folders(command) == expected


# --------------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """A run directory with a checkpoint of the parameters."""
    from avsi_jax.training import checkpoints
    from avsi_jax.training import run_directory as files

    folder = tmp_path_factory.mktemp("untrained") / "run"
    files.check_config(run.config, folder, run.normalisation)
    saved = checkpoints.Checkpoints(folder)
    saved.save(0, {"params": run.params}, {}, 0.0)
    saved.close()
    return folder


def test_the_command_writes_weights_with_added_facts(run, workdir, tmp_path, capsys):
    import jax

    more = tmp_path / "more.json"
    more.write_text(json.dumps({"data": {"speakers": {"train": {"s1": 8, "s2": 1}}}, "note": "a test"}))
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path / "tiny"), "--facts", str(more)]
    assert weights.main(arguments) == 0
    output = capsys.readouterr()
    assert "model.safetensors" in output.out and output.err.startswith("avsi_jax.weights: no evaluation of unseen speakers")
    found = weights.read(tmp_path / "tiny")
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25)  # half a unit of float16, and of its smallest numbers
    assert found.facts["note"] == "a test" and found.facts["data"]["speakers"] == {"train": {"s1": 8, "s2": 1}}
    assert found.step == found.facts["training"]["step"] == 0 and found.normalisation == run.normalisation
    assert "9 clips, 8 of one speaker (s1)" in (tmp_path / "tiny" / "README.md").read_text()
    assert weights.main(arguments) == 2
    assert "exists; pass --overwrite" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir=none", "--out=x"], "no config.json in none"),
        (["--workdir={run}", "--out={out}", "--facts=pyproject.toml"], "pyproject.toml is not a JSON file of facts"),
        (["--workdir={run}", "--out={out}", "--checkpoint=9"], "no checkpoint 9 in"),
    ],
)
def test_the_command_reports_errors_in_one_line(arguments, says, workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert weights.main([a.format(run=workdir, out=tmp_path / "w") for a in arguments]) == 2
    message = capsys.readouterr().err
    assert says in message and message.startswith("avsi_jax.weights: ") and message.count("\n") == 1
    assert not (tmp_path / "w").exists()
