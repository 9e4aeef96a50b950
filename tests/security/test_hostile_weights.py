"""Weights that were tampered with are refused in one line, before memory is allocated for the sizes they claim."""

import json
import math
import os
import struct

import numpy as np
import pytest

from avsi_jax.inference import weights
from tests.support import tiny_weights


@pytest.fixture(scope="module")
def run():
    return tiny_weights.run()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Shared: tests that change it use `copied`."""
    return tiny_weights.written(tmp_path_factory.mktemp("weights") / "small")


@pytest.fixture
def copied(folder, tmp_path):
    return tiny_weights.copied(folder, tmp_path / "copy")


def refusal(path) -> str:
    with pytest.raises(weights.WeightsError) as error:
        weights.read(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return str(error.value)


def change_config(copied, change):
    content = json.loads((copied / "config.json").read_text())
    change(content)
    (copied / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update(format=2), "found format 2, expected 1"),
        (lambda t: t.pop("sha256"), "'sha256' is missing"),
        (lambda t: t.update(exec="rm"), "'exec' is unknown"),
        (lambda t: t.update(step="7"), "step is '7', expected int"),
        (lambda t: t.update(facts=[]), "facts is [], expected dict"),
        (lambda t: t.update(step=math.nan), "is not JSON (found NaN"),
        (lambda t: t["facts"].update(measured={"audio": {"300": {"stoi_gap": "high"}}}), "facts.measured is"),
        (lambda t: t["facts"].update(measured={"audio": 3}), "facts.measured is"),
        (lambda t: t["facts"].update(measured={"audio": {"1e9": {"stoi_gap": 1}}}), "facts.measured is"),
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
        (lambda t: t.update(sha256="0" * 64), "sha256"),
        (lambda t: t["config"].update(units=5), "expected (10, 33) as in config.json"),
    ],
)
def test_a_config_that_was_tampered_with_is_refused(copied, change, named):
    change_config(copied, change)
    assert named in refusal(copied)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[" * 200_000, b"\xff\xfe\x00", b"null", b"[1]", b" " * 2**21, b'{"step": 9' + b"9" * 9999 + b"}", b"\x80\x04K."],
    ids=["empty", "half", "deep", "not text", "null", "list", "large", "long number", "pickle"],
)
def test_a_config_that_is_not_json_is_refused(copied, content):
    (copied / "config.json").write_bytes(content)
    assert "config.json" in refusal(copied)


def safetensors_of(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_changed(folder, change, sha=True):
    """The bytes of the tensor file after change(header, data), which may return new data."""
    content = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    data = change(header, data) or data
    return safetensors_of(json.dumps(header).encode(), data)


def set_bias(value):
    def change(header, data):
        start, end = header["output.bias"]["data_offsets"]
        return data[:start] + np.full((end - start) // 2, value, "<f2").tobytes() + data[end:]

    return change


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda f: b"", "found a header of"),
        (lambda f: b"\x01\x02", "found a header of"),
        (lambda f: safetensors_of(b"{}", length=2**63), "found a header of 9223372036854775808 bytes in a file of 10"),
        (lambda f: safetensors_of(b"{}" + b" " * 2**21), "found a header of 2097154 bytes"),
        (lambda f: safetensors_of(b"[" * 100_000), "its header cannot be read"),
        (lambda f: safetensors_of(b"\xff\xff"), "its header cannot be read"),
        (lambda f: safetensors_of(b"[]"), "its header cannot be read"),
        (lambda f: safetensors_of(b'{"a": 3}'), "its header cannot be read"),
        (lambda f: safetensors_of(b"{}"), "has shape None, expected"),
        (lambda f: (f / "model.safetensors").read_bytes()[:-2], "bytes, expected"),
        (lambda f: (f / "model.safetensors").read_bytes() + b"zip", "bytes, expected"),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(shape=[2**40])), "shape (1099511627776,)"),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(shape="160")), "output.bias' has shape"),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(dtype="F64")), "'F64', expected F16 or F32"),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(dtype="F32")), "bytes, expected"),
        (lambda f: header_changed(f, lambda h, d: h.update(evil=h["output.bias"])), "'evil' has shape (160,), expected None"),
        (lambda f: header_changed(f, lambda h, d: h.pop("output.bias") and None), "'output.bias' has shape None"),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(data_offsets=[0, 320])), "model.safetensors: "),
        (lambda f: header_changed(f, lambda h, d: h["output.bias"].update(data_offsets=[-5, 2**70])), "model.safetensors: "),
        (lambda f: header_changed(f, set_bias(np.nan)), "output.bias contains numbers that are not finite"),
        (lambda f: header_changed(f, set_bias(-np.inf)), "output.bias contains numbers that are not finite"),
        (lambda f: b"PK\x03\x04" + bytes(1000), "found a header of"),
        (lambda f: b"\x80\x04\x95" + bytes(1000), "model.safetensors"),
    ],
)  # fmt: skip
def test_tensors_that_were_tampered_with_are_refused(copied, make, named):
    """Even if the sha256 was updated."""
    import hashlib

    data = make(copied)
    (copied / "model.safetensors").write_bytes(data)
    change_config(copied, lambda content: content.update(sha256=hashlib.sha256(data).hexdigest()))
    assert named in refusal(copied)


def test_a_file_larger_than_memory_is_refused_before_it_is_read(copied):
    os.truncate(copied / "model.safetensors", 2**40)
    assert "has 1099511627776 bytes, expected" in refusal(copied)


def test_a_pipe_is_not_waited_for(copied):
    (copied / "config.json").unlink()
    os.mkfifo(copied / "config.json")
    assert "no config.json in" in refusal(copied)
