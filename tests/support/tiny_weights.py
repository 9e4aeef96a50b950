"""A network small enough to write, read and spoil many times: what the tests of weights and of their export share."""

import shutil
from pathlib import Path

import numpy as np

from avsi_jax import configs
from avsi_jax.inference.trained_run import Run


def run(**fields) -> Run:
    """A run of a tiny av_unified: numbers drawn for its parameters and made up to standardise by; nothing is compiled."""
    import jax

    from avsi_jax.data.features import Normalisation, Scale
    from avsi_jax.models import build

    wanted = {"units": 4, "layers": 1, "data_dir": "/somewhere/data", "preset": "wide"} | fields
    config = configs.load("av_unified", [(k, str(v)) for k, v in wanted.items()])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: build.init_params(config))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return Run(config, params, 7, Normalisation(Scale((-7.0,), (2.25,)), Scale((0.0,) * 272, (0.1,) * 272)))


def written(folder: Path) -> Path:
    """The weights of `run` as they are written, in `folder`."""
    from avsi_jax.inference import weights

    return weights.write(folder, run(), {"note": "made up", "measured": {}})


def copied(folder: Path, target: Path) -> Path:
    """A copy of such a folder, to be spoilt."""
    return Path(shutil.copytree(folder, target))
