"""The library changes nothing of its caller's process: environment, logging, signals, warnings, random state, settings of jax."""

import json
import os
import subprocess
import sys

# The state that a library could change, as JSON. Libraries that are imported for the first time may add to it themselves, so all
# modules are imported before the first look, in a process that has imported nothing of ours before.
SCRIPT = """
import importlib, json, logging, os, pkgutil, signal, sys, warnings

before = dict(os.environ)
import avsi_jax
skipped = ("avsi_jax.app", "avsi_jax.pretrained")
names = [m.name for m in pkgutil.walk_packages(avsi_jax.__path__, "avsi_jax.") if not m.name.startswith(skipped)]
for name in names:
    importlib.import_module(name)
import cv2, jax, matplotlib, pesq, pystoi, soxr, numpy as np
from orbax import checkpoint

changed = {k: v for k, v in os.environ.items() if before.get(k) != v}
ours = [k for k in changed if k.startswith(("EPATH", "JAX", "TF_", "XLA", "OMP", "OPENBLAS", "MPL"))]

def state():
    loggers = [logging.getLogger(n) for n in ("", "absl", "orbax", "jax", "avsi_jax")]
    return {
        "environment": dict(os.environ),
        "logging": [(l.name, l.level, len(l.filters), len(l.handlers), l.disabled) for l in loggers],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "warnings": [str(f) for f in warnings.filters],
        "random": np.random.get_state()[1].tolist(),
        "jax": {k: str(v) for k, v in jax.config.values.items()},
        "backend": matplotlib.get_backend(),
        "threads": cv2.getNumThreads(),
    }

first = state()
import pathlib, tempfile
from avsi_jax.evaluation import metrics
from avsi_jax.training.checkpoints import Checkpoints
folder = pathlib.Path(tempfile.mkdtemp())
tree = {"params": {"a": jax.numpy.ones(3)}}
saved = Checkpoints(folder)
saved.save(1, tree, {}, 0.5)
saved.close()
Checkpoints(folder, read_only=True).restore_params(1, tree["params"])
noise = np.random.RandomState(0).normal(0, 0.1, 16_000).astype(np.float32)
metrics.score(noise, noise * np.float32(0.5), 8_000, ((0.5, 0.8),))
last = state()
print(json.dumps([names, ours, {k: [first[k], last[k]] for k in first if first[k] != last[k]}]))
"""


def test_the_library_leaves_its_callers_process_as_it_is(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k not in ("EPATH_USE_TF", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names, in_environment, changed = json.loads(done.stdout.splitlines()[-1])
    assert len(names) > 80 and not in_environment and not changed
    assert "orbax" not in done.stderr and "absl" not in done.stderr, "Orbax logs nothing either"
