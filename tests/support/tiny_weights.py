"""Weights of a tiny network, quick to write, read and modify, for tests of weights and export."""

import shutil
from pathlib import Path

import numpy as np

from avsi_jax import configs
from avsi_jax.inference.trained_run import Run


def run(**fields) -> Run:
    """A run of a tiny av_unified with random parameters and arbitrary normalisation; nothing is compiled."""
    import jax

    from avsi_jax.data.features import Normalisation, Scale
    from avsi_jax.models import build

    config_fields = {"units": 4, "layers": 1, "data_dir": "/somewhere/data", "preset": "wide"} | fields
    config = configs.load("av_unified", [(k, str(v)) for k, v in config_fields.items()])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return Run(config, params, 7, Normalisation(Scale((-7.0,), (2.25,)), Scale((0.0,) * 272, (0.1,) * 272)))


def written(folder: Path) -> Path:
    """Writes the weights of `run` to `folder`."""
    from avsi_jax.inference import weights

    return weights.write(folder, run(), {"note": "fake", "measured": {}})


def copied(folder: Path, target: Path) -> Path:
    """Copies such a folder, so that a test can modify it."""
    return Path(shutil.copytree(folder, target))
