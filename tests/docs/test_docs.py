"""The pages say what is there: no placeholder left, and the results page is what its summaries give."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_placeholder_is_left(page):
    assert "@@" not in page.read_text() and "TODO" not in page.read_text()


@pytest.mark.parametrize("name", ["results", "results_long"])
def test_the_results_pages_are_generated(name, monkeypatch, tmp_path):
    module = importlib.import_module(f"benchmarks.results.{name}")
    monkeypatch.setattr(module, "DOCS", tmp_path)
    module.write()
    page = f"{name}.md"
    assert (tmp_path / page).read_text() == (ROOT / "docs" / page).read_text(), f"run python -m benchmarks.results.{name}"


def test_the_site_builds_without_a_warning(tmp_path):
    """Links, anchors, navigation and the API reference; and a reader's browser is sent nowhere else for fonts or scripts."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="avsi_jax.inpainting.api.Inpainter.inpaint"' in api and 'src="http' not in api and "fonts.googleapis" not in api
