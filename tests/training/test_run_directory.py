"""The run directory's facts about the code."""

import shutil
import subprocess

import pytest

from avsi_jax.training import run_directory

OWN, OTHER = '[project]\nname = "avsi_jax"\n', '[project]\nname = "thesis"\n'


def commit(folder, **files) -> str:
    """Makes `folder` a repository with one commit of these files; returns the first digits of its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)
    done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return done.stdout[:12]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_revision_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    """Not of a repository around an installed package, of one that holds a copy of it, or of the one whose hook is running."""
    revision = commit(tmp_path / "own", pyproject__toml=OWN)
    assert run_directory.git_revision(tmp_path / "own") == revision
    (tmp_path / "own" / "pyproject.toml").write_text(OWN + "# changed\n")
    assert run_directory.git_revision(tmp_path / "own") == f"{revision}-dirty"
    other = commit(tmp_path / "other", pyproject__toml=OTHER)
    installed = tmp_path / "other" / ".venv" / "lib" / "site-packages"
    installed.mkdir(parents=True)
    unpacked = tmp_path / "other" / "avsi_jax-0.1.0"
    unpacked.mkdir()
    (unpacked / "pyproject.toml").write_text(OWN)
    for root in (installed, unpacked, tmp_path / "other", tmp_path):
        assert run_directory.git_revision(root) == "unknown", root
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "own"))
    assert run_directory.git_revision(tmp_path / "own") == f"{revision}-dirty" and revision != other
