"""26 malicious or broken folders of weights; with the clips of tests/support/hostile_clips.py, 200 inputs."""

import gzip
import hashlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path

import numpy as np

from tests.support.hostile_clips import REFUSED, Input, Maker


def weights_of(folder: Path, good: Path, few: bool = False) -> list[Input]:
    """26 folders of weights, or (few) 1, made from those in `good` by one change each; the sha256 is updated with the tensors."""
    config, tensors = (good / "config.json").read_bytes(), (good / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", tensors[:8])[0]
    header, numbers = json.loads(tensors[8 : 8 + length]), tensors[8 + length :]
    maker = Maker(folder, few)

    def add(name: str, of_tensors=tensors, of_config=config, sha: bool = True, default: bool = False) -> None:
        def make(path: Path) -> None:
            path.mkdir()
            for file, data in (("model.safetensors", of_tensors), ("config.json", of_config)):
                if callable(data):
                    data(path / file)
                elif data is not None:
                    sum_ = hashlib.sha256(of_tensors if isinstance(of_tensors, bytes) else b"").hexdigest()
                    stored = json.loads(config)["sha256"].encode()
                    (path / file).write_bytes(data.replace(stored, sum_.encode()) if sha and file == "config.json" else data)

        maker.add("weights", name, make, REFUSED, default=default)

    def with_header(change) -> bytes:
        new = json.loads(json.dumps(header))
        change(new)
        encoded = json.dumps(new).encode()
        return struct.pack("<Q", len(encoded)) + encoded + numbers

    def with_config(change) -> bytes:
        new = json.loads(config)
        change(new)
        return json.dumps(new).encode()

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", bytes(2**25))
    name = next(k for k in header if k != "__metadata__")
    add("header of 2^60 bytes", struct.pack("<Q", 2**60) + tensors[8:], default=True)
    add("header of 2^64 - 1 bytes", b"\xff" * 8 + tensors[8:])
    add("header deep", struct.pack("<Q", 500_000) + b"[" * 500_000)
    add("header of another", with_header(lambda h: h.update(other=h[name])))
    add("shape huge", with_header(lambda h: h[name].update(shape=[2**60])))
    add("shape negative", with_header(lambda h: h[name].update(shape=[-1, -1])))
    add("shape words", with_header(lambda h: h[name].update(shape="ab")))
    add("shape less", with_header(lambda h: h[name].update(shape=[1])))
    add("type", with_header(lambda h: h[name].update(dtype="BF16")))
    add("offsets", with_header(lambda h: h[name].update(data_offsets=[0, 2**63])))
    add("cut", tensors[:-100])
    add("head alone", tensors[:8])
    add("empty", b"")
    add("nan", tensors[: 8 + length] + np.full(len(numbers) // 2, np.nan, "<f2").tobytes())
    add("bytes changed", tensors[:-2] + b"\0\1", sha=False)
    add("zip bomb", bomb.getvalue())
    add("gzip bomb", gzip.compress(bytes(2**25)))
    add("pickle", b"\x80\x04cos\nsystem\n(S'touch outside'\ntR.")
    add("endless", lambda path: path.symlink_to("/dev/zero"))
    add("pipe", os.mkfifo)
    add("sparse", lambda path: (path.touch(), os.truncate(path, 2**42)))
    add("config endless", of_config=lambda path: path.symlink_to("/dev/zero"))
    add("config large", of_config=b"[" + b" " * 2**24 + b"]")
    add("config deep", of_config=b'{"a":' * 150_000)
    add("config of a giant", of_config=with_config(lambda c: c["config"].update(units=2**40)))
    add("config elsewhere", of_config=with_config(lambda c: c["config"].update(preset="../../../etc/passwd")))
    return maker.made
