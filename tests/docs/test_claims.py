"""Sentences that repeat a number agree with the table that it comes from."""

import json
import re
from pathlib import Path

import pytest

from avsi_jax.inference import weights

ROOT = Path(__file__).resolve().parents[2]


def rows_of(text: str) -> dict[str, list[str]]:
    """First cell -> the other cells of every row of the Markdown tables in a text."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    return {first: others for first, *others in rows}


def test_the_comparison_with_pytorch_repeats_its_table():
    text = (ROOT / "docs" / "performance.md").read_text()
    rows = rows_of(text)
    ours, torch = (
        [float(re.sub(r"[^\d.]", "", cell)) for cell in next(cells for first, cells in rows.items() if first.startswith(name))]
        for name in ("ours (jax", "PyTorch")
    )
    step, _, forward, single, _, memory = (b / a for a, b in zip(ours, torch))
    paragraph = text[text.index("**Beside PyTorch**") :].split("\n\n")[0]
    found = [float(x) for x in re.findall(r"\b\d\.\d\d\b", paragraph)]
    assert found == [pytest.approx(step, abs=0.005), 1.06, pytest.approx(forward, abs=0.005), pytest.approx(single, abs=0.005)]
    assert memory == pytest.approx(1 / 3, abs=0.05) and f"{step:.2f} times" not in (ROOT / "README.md").read_text()


def pesq(name: str, kind: str) -> dict[int, float]:
    """Gap length -> wide-band PESQ of unseen speakers, from the facts of shipped weights."""
    facts = json.loads((ROOT / "avsi_jax" / "pretrained" / name / "config.json").read_text())["facts"]
    (table,) = (e["table"] for e in facts["evaluations"] if (e["split"], e["suite"]) == ("test", "lengths"))
    return {r["gap_ms"]: r["mean"] for r in table if (r["kind"], r["metric"], r["case"]) == (kind, "pesq_wb", "")}


@pytest.mark.parametrize("name", ["a_si", "av_unified"])
def test_readme_and_cards_say_where_interpolation_has_the_better_pesq(name):
    own, interpolated = pesq(name, "system"), pesq(name, "interpolation")
    readme, card = ((ROOT / path).read_text() for path in ("README.md", f"avsi_jax/pretrained/{name}/README.md"))
    shown = [int(ms) for ms in re.findall(r"^\| (\d+) ms \|", readme, re.M)]
    assert all(own[ms] < interpolated[ms] for ms in shown)
    assert "interpolation of the spectrogram has the better wide-band PESQ at\nevery length of the table" in readme
    below = [ms for ms in own if own[ms] < interpolated[ms]]
    (sentence,) = re.findall(r"Wide-band PESQ of unseen speakers is below that of plain interpolation for gaps of ([^(]*) ms", card)
    assert [int(ms) for ms in sentence.split(", ")] == below


def test_the_weights_page_names_the_preset_of_each_network():
    text = (ROOT / "docs" / "weights.md").read_text()
    preset = weights.read(weights.find("a_si")).config.preset
    assert f"audio-only network at preset `{preset}`" in text


def test_no_scores_of_the_reserved_demo_clips_are_reported():
    """The four demo clips of Morrone et al. are reserved for independent checks."""
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"their (AV|A)-MTL", page.read_text()), page
