"""The documentation matches its sources: no placeholders, the generated pages are up to date, and the site builds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.results import results_long, results_page, runs

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TABLES = ROOT / "docs" / "results" / "tables"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_pages_have_no_placeholder(page):
    assert "@@" not in page.read_text() and "TODO" not in page.read_text()


# ----------------------------------------------------------------------------------------------------------- pages of results


@pytest.fixture(scope="module")
def tables():
    return results_page.Tables.read(TABLES)


def test_the_results_page_is_made_from_its_tables(tables):
    assert results_page.page(tables) == (ROOT / "docs" / "results.md").read_text(), "run python -m benchmarks.results.results"


def test_every_mean_of_the_results_is_that_of_the_clips_scores(tables):
    """All means, without the bootstrap, which takes half a minute."""
    for protocol in runs.PROTOCOLS:
        for split in runs.SPLITS:
            for preset, names in results_page.runs_by_preset().items():
                values = {}
                for row in runs.read_scores([f"references-{preset}", *names], protocol, split):
                    for metric in results_page.MEANS_METRICS:
                        if row[metric]:
                            values.setdefault((row["system"], int(row["gap_ms"]), metric), []).append(float(row[metric]))
                place = {"protocol": protocol, "split": split, "preset": preset}
                means = {(e["system"], e["gap_ms"], e["metric"]): e["mean"] for e in tables.means if place.items() <= e.items()}
                assert means == pytest.approx({k: float(np.mean(v)) for k, v in values.items()}, abs=1e-5), place


def test_the_intervals_of_the_results_are_those_of_the_clips_scores(tables, tmp_path):
    """Recomputes one protocol, and the other tables of the unseen speakers."""
    again = {name: getattr(results_page, f"{name}_of")("test") for name in ("gains", "seeds", "speakers")}
    tables._replace(means=results_page.means_of("paper", "test"), **again).write(tmp_path)
    for name, wanted in {"means": {"protocol": "paper", "split": "test"}, **dict.fromkeys(again, {"split": "test"})}.items():
        with (tmp_path / f"{name}.csv").open() as new, (TABLES / f"{name}.csv").open() as committed:
            kept = [row for row in csv.DictReader(committed) if wanted.items() <= row.items()]
            assert list(csv.DictReader(new)) == kept, "run python -m benchmarks.results.results"


def test_the_table_of_trainings_is_that_of_the_summaries(tables, tmp_path):
    tables._replace(trainings=results_page.trainings()).write(tmp_path)
    assert (tmp_path / "trainings.csv").read_text() == (TABLES / "trainings.csv").read_text()


def test_the_page_of_longer_trainings_is_generated(tmp_path):
    results_long.write(tmp_path)
    for name in ("results_long.md", *(f"results/tables/{p.name}" for p in TABLES.glob("long_*.csv"))):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / name).read_text(), "run python -m benchmarks.results.results_long"


# ----------------------------------------------------------------------------------------------------------------------- site


def test_the_site_builds_without_a_warning(tmp_path):
    """Checks links, anchors, navigation and the API reference, and that pages load no fonts or scripts from other sites."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    assert 'id="avsi_jax.inpainting.api.Inpainter.inpaint"' in api and 'src="http' not in api and "fonts.googleapis" not in api
