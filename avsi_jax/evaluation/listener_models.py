"""Listener models: predictions of how people would rate audio, from that audio alone.

PLCMOS v2 (Diener et al. 2023, arXiv:2305.15127) was trained on people's ratings of concealed packet losses, DNSMOS P.835 (Reddy et
al. 2022, arXiv:2110.01763; here its overall score) on ratings of noise suppression. Both rate a whole clip from 1 (bad) to 5
(excellent). Their networks come with package `speechmos` (0.0.1.1, MIT) and run in onnxruntime: `pip install 'avsi_jax[eval]'`.
They have no reference, so audio can sound natural to them and still say something else than the recording.

NumPy and onnxruntime only: the workers of evaluation/metrics.py import this file.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np

NAMES = ("plcmos", "dnsmos")
RATE = 16_000  # Hz, of both
INSTALL = "pip install 'avsi_jax[eval]'"
PACKAGES = ("speechmos", "onnxruntime")


def split(text: str) -> tuple[str, ...]:
    """'plcmos,dnsmos' -> ('plcmos', 'dnsmos'); '' -> ()."""
    return tuple(filter(None, text.split(",")))


def missing_packages() -> list[str]:
    """The packages of the extra `eval` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def plcmos(audio: np.ndarray) -> float:
    """PLCMOS v2 of audio (N,) float32 at RATE: the mean over the 15 random raters of the package, here the same for every clip."""
    model = _plcmos()
    features = np.float32(model.stft_transform(_playable(audio)))[None, None]
    raters = np.random.RandomState(0).normal(size=(model.embed_rounds, 1, 64)).astype(np.float32)  # as the package draws them
    ratings = [model.session.run(None, {"degraded_audio": features, "rater_embed": rater})[0] for rater in raters]
    return float(np.mean(ratings))


def dnsmos(audio: np.ndarray) -> float:
    """Overall DNSMOS P.835 of audio (N,) float32 at RATE, computed as the package does, without its second network.

    Audio shorter than 9.01 s is repeated; the score is the mean over windows of 9.01 s, one every second.
    """
    from speechmos import dnsmos as package

    audio = _playable(audio)
    window = int(package.INPUT_LENGTH * RATE)
    while len(audio) < window:
        audio = np.append(audio, audio)
    count = int(len(audio) // RATE - package.INPUT_LENGTH) + 1
    windows = [audio[start : start + window] for start in range(0, count * RATE, RATE)]
    raw = [_dnsmos().onnx_sess.run(None, {"input_1": x[None]})[0][0] for x in windows if len(x) == window]
    return float(np.mean([_dnsmos().get_polyfit_val(*values, False)[2] for values in raw]))


def load(names: tuple[str, ...]) -> None:
    """Loads the networks, so that the first clip does not have to wait for them."""
    for name in names:
        {"plcmos": _plcmos, "dnsmos": _dnsmos}[name]()


def _playable(audio: np.ndarray) -> np.ndarray:
    """Audio limited to full scale, as it would be played; the networks refuse other values."""
    return np.clip(audio, -1, 1).astype(np.float32)


@functools.cache
def _plcmos() -> Any:
    from speechmos import plcmos as package

    model = package.PLCMOS()
    model.session = _one_thread(model.model_path)
    return model


@functools.cache
def _dnsmos() -> Any:
    from pathlib import Path

    from speechmos import dnsmos as package

    networks = Path(package.__file__).parent / "dnsmos_models"
    model = package.DNSMOS(str(networks / "sig_bak_ovr.onnx"), str(networks / "model_v8.onnx"))
    model.onnx_sess = _one_thread(str(networks / "sig_bak_ovr.onnx"))
    return model


def _one_thread(path: str) -> Any:
    """A session that uses one core: the clips are spread over processes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
