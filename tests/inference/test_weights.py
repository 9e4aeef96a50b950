"""Weights to ship: what is written comes back, rounded once and nothing else; where they are found; what their card tells."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.evaluation import conditions
from avsi_jax.inference import model_card, weights
from tests.support import fake_evaluations, tiny_weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run():
    return tiny_weights.run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Not to be changed by a test."""
    return tiny_weights.written(tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture
def copied(folder, tmp_path):
    return tiny_weights.copied(folder, tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------------------ there and back


def test_what_is_written_comes_back_rounded_to_float16(run, folder):
    import jax

    found = weights.read(folder)
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), run.params)
    assert jax.tree.structure(found.params) == jax.tree.structure(rounded)
    jax.tree.map(np.testing.assert_array_equal, found.params, rounded)
    assert {x.dtype for x in jax.tree.leaves(found.params)} == {np.dtype(np.float32)}
    assert (found.step, found.normalisation, found.facts) == (7, run.normalisation, {"note": "made up", "measured": {}})
    expected = run.config.to_dict() | {"data_dir": ""}  # of whoever uses them
    assert found.config.to_dict() == expected and found.config.is_locked


def test_the_library_of_the_format_reads_it(run, folder):
    """And finds every number once, as float16."""
    from safetensors.numpy import load_file

    tensors = load_file(folder / "model.safetensors")
    kernel = run.params["decoder"]["blstm_1"]["forward"]["ii"]["kernel"]
    np.testing.assert_array_equal(tensors["decoder.blstm_1.forward.ii.kernel"], kernel.astype(np.float16))
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float16)}
    count = sum(t.size for t in tensors.values())
    size = (folder / "model.safetensors").stat().st_size
    assert 2 * count < size < 2 * count + 200 * len(tensors)


def test_nothing_of_the_machine_is_told(folder):
    for path in folder.iterdir():
        assert b"/somewhere" not in path.read_bytes(), path


def test_a_number_that_float16_cannot_hold_is_refused(run, tmp_path):
    params = {**run.params, "output": {**run.params["output"], "bias": np.full_like(run.params["output"]["bias"], 1e6)}}
    with pytest.raises(weights.WeightsError, match=r"step 7: output\.bias holds numbers that float16 has no room for"):
        weights.write(tmp_path / "w", run._replace(params=params), {})
    assert not (tmp_path / "w").exists()


def test_weights_that_are_there_stay(run, copied):
    before = {p.name: p.read_bytes() for p in copied.iterdir()}
    with pytest.raises(FileExistsError, match="exists; take --overwrite"):
        weights.write(copied, run, {})
    assert {p.name: p.read_bytes() for p in copied.iterdir()} == before
    (copied / "own.txt").write_text("mine")
    weights.write(copied, run._replace(step=8), {}, overwrite=True)
    assert weights.read(copied).step == 8 and (copied / "own.txt").read_text() == "mine"


def test_a_training_does_not_lose_its_config(run, copied):
    """A workdir has a config.json too; an export goes through `write` as well."""
    (copied / "checkpoints").mkdir()
    before = (copied / "config.json").read_bytes()
    with pytest.raises(weights.WeightsError, match=r"is the workdir of a training, whose config\.json is its own"):
        weights.write(copied, run, {}, overwrite=True)
    assert (copied / "config.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------- where they are


def test_names_of_shipped_weights(folder, tmp_path, monkeypatch):
    from avsi_jax.inference import restorer

    monkeypatch.setattr(weights, "HOME", tmp_path / "none")
    assert weights.names() == []
    with pytest.raises(weights.WeightsError, match=r"^no weights shipped in this version; train some .* --checkpoint=DIR$"):
        restorer.read_run("pretrained")
    monkeypatch.setattr(weights, "HOME", folder.parent)
    assert weights.names() == ["small"] and weights.find("small") == folder
    with pytest.raises(weights.WeightsError, match="no weights 'pretrained' in this version .*expected one of pretrained, small"):
        weights.find()
    monkeypatch.setattr(weights, "DEFAULT", "small")
    assert restorer.read_run("pretrained").step == restorer.read_run("small").step == restorer.read_run(folder).step == 7
    with pytest.raises(weights.WeightsError, match="no weights 'av_unifed' in this version and no folder of that name"):
        restorer.read_run("av_unifed")
    for name in ("../small", "", "..", "small/"):
        with pytest.raises(weights.WeightsError):
            weights.find(name)


def test_a_folder_of_the_name_of_shipped_weights_is_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "HOME", folder.parent)
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert weights.locate("small") is None, "a workdir: the reader of trainings says what it lacks"


def test_an_evaluation_of_weights_is_told_where_the_data_are(folder, tmp_path, capsys):
    from avsi_jax.evaluation import cli

    assert cli.main([f"--checkpoint={folder}", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("avsi-evaluate: weights come without a dataset; expected --config.data_dir=DIR")
    assert said.count("\n") == 1


def test_a_restorer_of_weights_needs_no_heavy_library(folder, tmp_path):
    """Nor does importing what reads and restores."""
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
    """A workdir's files as a training and four evaluations leave them; one evaluation is of another step."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    command = f"avsi-evaluate --workdir={workdir} --config.split=test"
    common = {"by_speaker": True, "runs": {"av_mtl_s2s": {"step": 7}}, "command": command}
    made = lambda name, cases, **more: fake_evaluations.make(workdir / "eval" / name, cases=cases, examples=False, **common | more)
    made("waveform-test-lengths", LENGTHS, suite="lengths", split="test")
    made("waveform-test-streams", STREAMS, suite="streams", split="test")
    made("waveform-test_seen-lengths", LENGTHS, suite="lengths", split="test_seen", shift=-1.0)
    made("waveform-test-robustness", LENGTHS, suite="robustness", split="test", runs={"av_mtl_s2s": {"step": 3}})
    made("paper-test-lengths", LENGTHS, suite="lengths", split="test", protocol="paper")
    data = {"builder_config": "speaker_independent", "version": "2.1.0", "clips": {"train": 5}, "fingerprint": {"train": "f0"}}
    (workdir / "run.json").write_text(json.dumps({"revision": "abc", "devices": ["cpu"], "parameters": 9, "dataset": data}))
    (workdir / "metrics.csv").write_text("step,epoch,val_loss,val_gap_l1_db\n4,1,0.5,9.5\n7,2,0.25,8.5\n9,3,0.1,1.0\n")
    return workdir


@pytest.fixture(scope="module")
def facts(run, evaluated):
    return model_card.facts_of(evaluated, run)


def test_measured_quality_is_that_of_unseen_speakers(facts):
    """20 - 5 x 2 places + s of gap + mean of clips 0 1 2, and 1.5 where something is done to the input (tests/support/fake_evaluations.py)."""
    measured = facts["measured"]
    assert {k: sorted(v, key=int) for k, v in measured.items()} == {
        "sound and lips": ["300", "600", "900"], "sound": ["600"], "lips": ["3000"],
    }  # fmt: skip
    error = lambda there, ms: measured[there][str(ms)]["gap_l1_db"]
    assert error("sound and lips", 300) == pytest.approx(11.3)
    assert error("sound and lips", 900) == pytest.approx(11.9)
    assert error("sound", 600) == pytest.approx(13.1)
    assert error("lips", 3000) == pytest.approx(15.5)
    assert measured["sound and lips"]["900"]["stoi"] == pytest.approx(0.62)
    weights.check_measured(measured, "here")


def test_facts_are_of_the_step_that_is_taken(facts):
    assert sorted((e["split"], e["suite"]) for e in facts["evaluations"]) == [
        ("test", "lengths"), ("test", "streams"), ("test_seen", "lengths"),
    ]  # fmt: skip
    assert facts["training"]["validation"] == {"val_loss": 0.25, "val_gap_l1_db": 8.5} and facts["training"]["epochs_done"] == 2
    assert facts["evaluations"][0]["speakers"] == {"s1": 1, "s10": 1, "s2": 1}
    assert facts["evaluations"][0]["command"] == "avsi-evaluate --workdir=run --config.split=test"


def test_the_card_tells_what_was_measured(run, facts):
    import yaml

    card = model_card.text("av_unified", run.config, facts)
    _, head, body = card.split("---\n", 2)
    told = yaml.safe_load(head)
    assert told["license"] == "apache-2.0" and told["library_name"] == "avsi_jax" and told["datasets"] == ["grid"]
    results = told["model-index"][0]["results"]
    found = {r["dataset"]["name"]: {m["type"]: m["value"] for m in r["metrics"]} for r in results}
    assert found["Grid, unseen speakers, 900 ms lost, n=3"]["gap_l1_db"] == pytest.approx(11.9)
    assert "CC BY 4.0" in body and "as evidence" in body and "809" not in body, "the clips of another dataset"
    # three clips of 10.3 to 12.3: their mean, and whole bootstrap intervals within
    row = next(line for line in body.splitlines() if line.startswith("| 300 | sound and lips | 11.3 ["))
    low, high = map(float, row.split("[")[1].split("]")[0].split(","))
    assert 10.3 <= low < 11.3 < high <= 12.3
    assert "| 300 | damaged | 21.3 [" in body and "n = 3 clips (s1 1, s10 1, s2 1)" in body
    assert "| 3000 | lips | 15.5 [" in body and "| 600 | sound | 13.1 [" in body
    assert "`avsi-evaluate --workdir=run --config.split=test`" in body


def test_the_card_of_a_system_that_sees_no_lips_tells_of_none(run, evaluated):
    config = run.config.copy_and_resolve_references()
    config.system = "a_si"
    facts = model_card.facts_of(evaluated, run._replace(config=config))
    assert set(facts["measured"]) == {"sound"}, "what a repair by sound takes its confidence from"
    assert facts["measured"]["sound"]["900"]["stoi"] == pytest.approx(0.62)
    card = model_card.text("a_si", config, facts)
    assert "| 300 | sound | 11.3 [" in card and "(it sees no lips)" in card
    assert not any(said in card for said in ("sound and lips", "lip-reading", "audio-visual speech", "were read"))


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
def test_commands_lose_the_folders_of_a_machine(command, expected):
    assert model_card.without_paths(command) == expected


# --------------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """What a training leaves, as far as its parameters go."""
    from avsi_jax.training import checkpoints
    from avsi_jax.training import run_directory as files

    folder = tmp_path_factory.mktemp("untrained") / "run"
    files.check_config(run.config, folder, run.normalisation)
    saved = checkpoints.Checkpoints(folder)
    saved.save(0, {"params": run.params}, {}, 0.0)
    saved.close()
    return folder


def test_command(run, workdir, tmp_path, capsys):
    import jax

    more = tmp_path / "more.json"
    more.write_text(json.dumps({"data": {"speakers": {"train": {"s1": 8, "s2": 1}}}, "note": "a test"}))
    arguments = ["--workdir", str(workdir), "--out", str(tmp_path / "tiny"), "--facts", str(more)]
    assert weights.main(arguments) == 0
    said = capsys.readouterr()
    assert "model.safetensors" in said.out and said.err.startswith("avsi_jax.weights: no evaluation of unseen speakers")
    found = weights.read(tmp_path / "tiny")
    for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(run.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25)  # half a unit of float16, and of its smallest numbers
    assert found.facts["note"] == "a test" and found.facts["data"]["speakers"] == {"train": {"s1": 8, "s2": 1}}
    assert found.step == found.facts["training"]["step"] == 0 and found.normalisation == run.normalisation
    assert "9 clips, 8 of one speaker (s1)" in (tmp_path / "tiny" / "README.md").read_text()
    assert weights.main(arguments) == 2
    assert "exists; take --overwrite" in (err := capsys.readouterr().err) and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir=none", "--out=x"], "no config.json in none"),
        (["--workdir={run}", "--out={out}", "--facts=pyproject.toml"], "pyproject.toml is no JSON of facts"),
        (["--workdir={run}", "--out={out}", "--checkpoint=9"], "no checkpoint 9 in"),
    ],
)
def test_command_says_what_is_wrong_in_one_line(arguments, says, workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert weights.main([a.format(run=workdir, out=tmp_path / "w") for a in arguments]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("avsi_jax.weights: ") and said.count("\n") == 1
    assert not (tmp_path / "w").exists()
