"""Weights to ship: what is written comes back, rounded once and nothing else; what was tampered with is refused in one line."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path

import evaluations
import numpy as np
import pytest
import tiny_weights

from avsi_jax import model_card, suites, weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run():
    return tiny_weights.run()


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    """Weights as they are written. Not to be changed by a test."""
    return weights.write(tmp_path_factory.mktemp("weights") / "small", run, {"note": "made up", "measured": {}})


@pytest.fixture
def copied(folder, tmp_path):
    """A copy of the folder, to be spoilt."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refusal(path) -> str:
    with pytest.raises(weights.WeightsError) as error:
        weights.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


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
    from avsi_jax import restore

    monkeypatch.setattr(weights, "HOME", tmp_path / "none")
    assert weights.names() == []
    with pytest.raises(weights.WeightsError, match=r"^no weights shipped in this version; train some .* --checkpoint=DIR$"):
        restore.read_run("pretrained")
    monkeypatch.setattr(weights, "HOME", folder.parent)
    assert weights.names() == ["small"] and weights.find("small") == folder
    with pytest.raises(weights.WeightsError, match="no weights 'pretrained' in this version .*expected one of pretrained, small"):
        weights.find()
    monkeypatch.setattr(weights, "DEFAULT", "small")
    assert restore.read_run("pretrained").step == restore.read_run("small").step == restore.read_run(folder).step == 7
    with pytest.raises(weights.WeightsError, match="no weights 'av_unifed' in this version and no folder of that name"):
        restore.read_run("av_unifed")
    for name in ("../small", "", "..", "small/"):
        with pytest.raises(weights.WeightsError):
            weights.find(name)


def test_a_folder_of_the_name_of_shipped_weights_is_the_folder(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "HOME", folder.parent)
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    assert weights.locate("small") is None, "a workdir: the reader of trainings says what it lacks"


def test_an_evaluation_of_weights_is_told_where_the_data_are(folder, tmp_path, capsys):
    from avsi_jax import evaluate

    assert evaluate.main([f"--checkpoint={folder}", f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("avsi-evaluate: weights come without a dataset; expected --config.data_dir=DIR")
    assert said.count("\n") == 1


def test_a_restorer_of_weights_needs_no_heavy_library(folder, tmp_path):
    """Nor does importing what reads and restores."""
    heavy = "orbax librosa numba tensorflow tensorflow_datasets matplotlib grain cv2 av soundfile optax".split()
    code = (
        "import sys; from avsi_jax.restore import Restorer; r = Restorer.load(sys.argv[1]); "
        f"print(r.name, r.step, [m for m in {heavy} if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == "av_unified 7 []\n", done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------------------- hostile


def spoil_config(copied, change):
    told = json.loads((copied / "config.json").read_text())
    change(told)
    (copied / "config.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(format=2), "found format 2, expected 1"),
        (lambda t: t.pop("sha256"), "'sha256' is missing"),
        (lambda t: t.update(exec="rm"), "'exec' is unknown"),
        (lambda t: t.update(step="7"), "step is '7', expected int"),
        (lambda t: t.update(facts=[]), "facts is [], expected dict"),
        (lambda t: t.update(step=math.nan), "is no JSON (found NaN"),
        (lambda t: t["facts"].update(measured={"sound": {"300": {"stoi_gap": "high"}}}), "facts.measured is"),
        (lambda t: t["facts"].update(measured={"sound": 3}), "facts.measured is"),
        (lambda t: t["facts"].update(measured={"sound": {"1e9": {"stoi_gap": 1}}}), "facts.measured is"),
        (lambda t: t["config"].update(hook="os.system"), "config.'hook' is unknown"),
        (lambda t: t["config"].pop("landmarks"), "config.'landmarks' is missing"),
        (lambda t: t["config"]["gaps"].update(code=1), "config.gaps.'code' is unknown"),
        (lambda t: t["config"].update(gaps=3), "config.gaps: found 3, expected fields"),
        (lambda t: t["config"].update(units="4"), "config.units: found '4', expected int"),
        (lambda t: t["config"].update(units=True), "config.units: found True, expected int"),
        (lambda t: t["config"].update(units=10**9), "config.units: found 1000000000, expected 0 to 2048"),
        (lambda t: t["config"].update(units=10**300), "config.units: found"),
        (lambda t: t["config"].update(units=2048, layers=12), "parameters, expected at most 100000000"),
        (lambda t: t["config"].update(layers=-1), "config.layers: found -1, expected 0 to 12"),
        (lambda t: t["config"].update(units=0), "config.units: found 0, expected 1 or more"),
        (lambda t: t["config"].update(dropout=1e308), "config.dropout: found 1e+308"),
        (lambda t: t["config"].update(system="a" * 5000), "unknown system"),
        (lambda t: t["config"].update(preset="../../etc"), "unknown preset '../../etc'"),
        (lambda t: t["config"].update(motion="pixels"), "normalisation: found that of level and motion"),
        (lambda t: t["config"].update(feedback=1), "config.feedback: found 1"),
        (lambda t: t["normalisation"].update(level=None), "normalisation: found that of motion"),
        (lambda t: t["normalisation"].update(level=4), "config.json: "),
        (lambda t: t["normalisation"]["level"].update(mean=[1.0, 2.0]), "expected 80 or one for all"),
        (lambda t: t["normalisation"]["level"].update(mean=["1"]), "normalisation.level: found ['1'], expected finite numbers"),
        (lambda t: t["normalisation"].update(words=None), "normalisation: 'words' is unknown"),
        (lambda t: t.update(sha256="0" * 64), "is not the file that config.json beside it tells the sha256 of"),
        (lambda t: t["config"].update(units=5), "expected (10, 33) by config.json"),
    ],
)
def test_a_config_that_was_tampered_with(copied, change, says):
    spoil_config(copied, change)
    assert says in refusal(copied)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 200_000, b"\xff\xfe\x00", b"null", b"[1]", b" " * 2**21, b'{"step": 9' + b"9" * 9999 + b"}", b"\x80\x04K."],
    ids=["empty", "half", "deep", "no text", "null", "list", "large", "long number", "pickle"],
)
def test_a_config_that_is_none(copied, content):
    (copied / "config.json").write_bytes(content)
    assert "config.json" in refusal(copied)


def safetensors_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def changed(folder, change, sha=True):
    """The tensors' file with its header changed by change(header, data) -> data."""
    whole = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    data = change(header, data) or data
    return safetensors_of(json.dumps(header).encode(), data)


def set_bias(value):
    def change(header, data):
        start, end = header["output.bias"]["data_offsets"]
        return data[:start] + np.full((end - start) // 2, value, "<f2").tobytes() + data[end:]

    return change


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda f: b"", "found a header of"),
        (lambda f: b"\x01\x02", "found a header of"),
        (lambda f: safetensors_of(b"{}", length=2**63), "found a header of 9223372036854775808 bytes in a file of 10"),
        (lambda f: safetensors_of(b"{}" + b" " * 2**21), "found a header of 2097154 bytes"),
        (lambda f: safetensors_of(b"[" * 100_000), "its header can't be read"),
        (lambda f: safetensors_of(b"\xff\xff"), "its header can't be read"),
        (lambda f: safetensors_of(b"[]"), "its header can't be read"),
        (lambda f: safetensors_of(b'{"a": 3}'), "its header can't be read"),
        (lambda f: safetensors_of(b"{}"), "has shape None, expected"),
        (lambda f: (f / "model.safetensors").read_bytes()[:-2], "bytes, expected"),
        (lambda f: (f / "model.safetensors").read_bytes() + b"zip", "bytes, expected"),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(shape=[2**40])), "output.bias' has shape (1099511627776,)"),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(shape="160")), "output.bias' has shape"),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(dtype="F64")), "output.bias is of 'F64', expected F16 or F32"),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(dtype="F32")), "bytes, expected"),
        (lambda f: changed(f, lambda h, d: h.update(evil=h["output.bias"])), "'evil' has shape (160,), expected None"),
        (lambda f: changed(f, lambda h, d: h.pop("output.bias") and None), "'output.bias' has shape None"),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(data_offsets=[0, 320])), "model.safetensors: "),
        (lambda f: changed(f, lambda h, d: h["output.bias"].update(data_offsets=[-5, 2**70])), "model.safetensors: "),
        (lambda f: changed(f, set_bias(np.nan)), "output.bias holds numbers that are not finite"),
        (lambda f: changed(f, set_bias(-np.inf)), "output.bias holds numbers that are not finite"),
        (lambda f: b"PK\x03\x04" + bytes(1000), "found a header of"),
        (lambda f: b"\x80\x04\x95" + bytes(1000), "model.safetensors"),
    ],
)  # fmt: skip
def test_tensors_that_were_tampered_with(copied, spoil, says):
    """Whoever changes them changes the sha256 too."""
    import hashlib

    data = spoil(copied)
    (copied / "model.safetensors").write_bytes(data)
    spoil_config(copied, lambda told: told.update(sha256=hashlib.sha256(data).hexdigest()))
    assert says in refusal(copied)


def test_a_file_larger_than_any_memory_is_refused_unread(copied):
    os.truncate(copied / "model.safetensors", 2**40)
    assert "has 1099511627776 bytes, expected" in refusal(copied)


def test_a_pipe_is_not_waited_for(copied):
    (copied / "config.json").unlink()
    os.mkfifo(copied / "config.json")
    assert "no config.json in" in refusal(copied)


# ----------------------------------------------------------------------------------------------------------------------- facts


LENGTHS = [suites.Case(ms) for ms in (300, 900)]
STREAMS = [suites.Case(600), suites.Case(600, "no_video", 1), suites.Case(3000, "whole_clip", 1)]


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A workdir's files as a training and four evaluations leave them; one evaluation is of another step."""
    workdir = tmp_path_factory.mktemp("evaluated") / "run"
    command = f"avsi-evaluate --workdir={workdir} --config.split=test"
    common = {"by_speaker": True, "runs": {"av_mtl_s2s": {"step": 7}}, "command": command}
    made = lambda name, cases, **more: evaluations.make(workdir / "eval" / name, cases=cases, examples=False, **common | more)
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
    """20 - 5 x 2 places + s of gap + mean of clips 0 1 2, and 1.5 where something is done to the input (tests/evaluations.py)."""
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
    from avsi_jax import checkpoints
    from avsi_jax import workdir as files

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
