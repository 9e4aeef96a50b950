"""The pages say what is there: no placeholder left, and the results page is what its summaries give."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_placeholder_is_left(page):
    assert "@@" not in page.read_text() and "TODO" not in page.read_text()


def test_the_results_page_is_generated(monkeypatch, tmp_path):
    module = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("results", ROOT / "benchmarks/results.py")
    )
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    module.write()
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text(), "run python benchmarks/results.py"
