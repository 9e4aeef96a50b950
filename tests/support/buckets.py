"""A bucket on this machine (gcp-storage-emulator), and a limit on the size of files that acts like a full disk."""

import contextlib
import importlib.util
import resource
import socket

import pytest


@pytest.fixture(scope="session")
def bucket():
    """gs:// address of an empty bucket on this machine; skips the test where gcsfs or the emulator is not installed."""
    if not all(map(importlib.util.find_spec, ("gcsfs", "gcp_storage_emulator"))):
        pytest.skip("needs a bucket on this machine: pip install gcsfs gcp-storage-emulator")
    from etils.epath import gpath
    from gcp_storage_emulator.server import create_server

    with socket.socket() as unused:
        unused.bind(("localhost", 0))
        port = unused.getsockname()[1]
    server = create_server("localhost", port, in_memory=True, default_bucket="avsi-test")
    server.start()
    gpath._is_tf_installed.cache_clear()  # another test may have called it before storage.as_path set EPATH_USE_TF
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        yield "gs://avsi-test"
    server.stop()


@contextlib.contextmanager
def largest_file(num_bytes):
    """Makes writes beyond this file size fail, in the middle of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["disk", "bucket"])
def place(request, tmp_path):
    """A new folder on a disk, and one in a bucket; needs the fixture `bucket` in the same test module."""
    from avsi_jax.runtime import storage

    if request.param == "disk":
        return storage.as_path(tmp_path / "place")
    return storage.as_path(request.getfixturevalue("bucket")) / tmp_path.name
