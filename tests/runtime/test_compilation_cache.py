"""Compiled programs are kept where the user can write, and truncated entries are removed."""

import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

from avsi_jax.runtime import compilation_cache

SCRIPT = "import jax; from avsi_jax.runtime import compilation_cache as c; c.enable(); print(jax.config.jax_compilation_cache_dir)"


def cache_folder(**variables) -> str:
    """The folder of jax's cache in a new process with these environment variables."""
    env = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"} | {k: str(v) for k, v in variables.items()}
    return subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env).stdout.strip()


@pytest.mark.slow
def test_programs_are_kept_where_the_user_can_write(tmp_path):
    assert cache_folder(XDG_CACHE_HOME=tmp_path).startswith(str(tmp_path / "avsi_jax" / "programs-"))
    (tmp_path / "file").touch()
    assert cache_folder(XDG_CACHE_HOME=tmp_path / "file") == "None"
    assert cache_folder(XDG_CACHE_HOME=tmp_path, JAX_COMPILATION_CACHE_DIR=tmp_path / "own") == str(tmp_path / "own")


def test_truncated_entries_are_removed(tmp_path):
    program = zlib.compress(np.random.default_rng(0).bytes(10_000))
    for name, data in (("complete", program), ("short", program[:5_000]), ("empty", b""), ("zstd", b"\x28\xb5\x2f\xfd")):
        (tmp_path / f"{name}-cache").write_bytes(data)
    compilation_cache.remove_truncated_entries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["complete-cache", "zstd-cache"]


def test_the_oldest_entries_beyond_the_limit_are_removed_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_BYTES", 250)
    for age, name in enumerate("abcd"):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(b"\x28" + bytes(99))
        os.utime(path, (1e9 - age, 1e9 - age))
    compilation_cache.remove_truncated_entries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-cache", "b-cache"]


def test_an_inpainter_leaves_the_settings_of_jax_as_they_are(tmp_path):
    script = """
import jax
from avsi_jax import configs
from avsi_jax.inference.restorer import Restorer
from avsi_jax.inpainting.api import Inpainter
from avsi_jax.models import build
config = configs.load("tiny", [("system", "a_si"), ("units", "4")])
params = build.init_params(config)
before = {k: str(v) for k, v in jax.config.values.items()}
Inpainter(Restorer(config, params, step=0))
try:
    Inpainter.load("no such weights")
except ValueError:
    pass
print({k: str(v) for k, v in jax.config.values.items()} == before)
"""
    env = {"PATH": "", "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
    assert not (tmp_path / "avsi_jax").exists()
