"""The page of avsi-inpaint --report: what it shows of which clip, and that a browser shows and plays it without asking anyone."""

import numpy as np
import pytest
import soundfile

from avsi_jax.inpainting import html_report
from avsi_jax.inpainting.api import Gap
from avsi_jax.inpainting.cli_output import ClipOutcome
from tests.app.test_pages import PLAYED, TOO_PALE, TOO_TIGHT, TOO_WIDE
from tests.support import browser

RATE = 16_000


def outcome(folder, name, seconds, gaps, **facts):
    """A clip on the disk and what was made of it: a tone, with a louder one in its gaps."""
    x = 0.1 * np.sin(np.arange(round(seconds * RATE)) / 5).astype(np.float32)
    paths = [folder / name, folder / f"{name}.restored.wav"]
    for path, loud in zip(paths, (0.0, 3.0)):
        y = x.copy()
        for start, end in gaps:
            y[round(start * RATE) : round(end * RATE)] *= loud
        soundfile.write(path, y, RATE, format="WAV")
    found = tuple(Gap(a, b, 0.7, "bin blue at f two now", "sound and lips") for a, b in gaps)
    facts = {"seconds": {"decode": 0.1, "all": 0.5}, "duration_s": seconds} | facts
    return ClipOutcome(str(paths[0]), str(paths[1]), "restored", found, **facts)


@pytest.fixture
def outcomes(tmp_path):
    return [
        outcome(tmp_path, "short.wav", 3.0, [(1.0, 1.5), (2.0, 2.2)], warnings=("half a <b>face</b>",), av_offset_s=-0.08),
        ClipOutcome("junk.wav", None, "failed", error="junk.wav: cannot be decoded"),
        outcome(tmp_path, "long & <u>1.wav", 90.0, [(10, 11), (12, 13), (70, 71)]),
        ClipOutcome("whole.wav", None, "no hole found", duration_s=3725.5),
        ClipOutcome("b.wav", "b.restored.wav", "there already"),
    ]


def write(tmp_path, outcomes):
    path = tmp_path / "new" / "page.html"
    html_report.write(path, outcomes, command="avsi-inpaint '<u>.wav'", checkpoint="pretrained")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    return path


def test_what_it_tells(tmp_path, outcomes):
    text = write(tmp_path, outcomes).read_text()
    assert "<b>face" not in text and "<u>" not in text
    for said in ("half a &lt;b&gt;face", "cannot be decoded", "1:02:05.50", "80 ms", "before its picture", "1:10.00 to 1:11.00"):
        assert said in text, said
    assert text.count("<audio") == 6 and text.count("data:image/png") == 6  # short: once; long: around 10 to 13 s, and 70 s


def test_what_is_shown_of_a_clip(tmp_path):
    far = [(20.0 * i, 20.0 * i + 1) for i in range(1, 9)]
    assert html_report.stretches_of(outcome(tmp_path, "a.wav", 12, [(1, 2)])) == [(0, 12)]
    assert html_report.stretches_of(outcome(tmp_path, "b.wav", 170, far)) == [(20 * i - 1.5, 20 * i + 2.5) for i in range(1, 9)]
    close = [(1.0 * i, 1.0 * i + 0.5) for i in range(40)]
    stretches = html_report.stretches_of(outcome(tmp_path, "c.wav", 40, close))
    assert all(end - start <= html_report.MOST_S for start, end in stretches)
    assert all(any(start <= a and b <= end for start, end in stretches) for a, b in close)


def test_a_page_does_not_grow_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MOST_BYTES", 1000)
    text = write(tmp_path, [outcome(tmp_path, f"{i}.wav", 2.0, [(1, 1.5)]) for i in range(3)]).read_text()
    assert text.count("<audio") == 2 and text.count("Not shown, to keep this page small.") == 2


def test_what_is_gone_is_told(tmp_path, outcomes):
    (tmp_path / "short.wav").unlink()
    text = write(tmp_path, outcomes).read_text()
    assert text.count("<audio") == 4 and "Can&#39;t be shown" in text and "no such file" in text


def test_odd_waveforms_are_made_to_play(tmp_path):
    """Of 3 channels, 96 kHz and not finite."""
    x = np.full((96_000, 3), np.nan, np.float32)
    x[::2] = 0.1
    soundfile.write(tmp_path / "odd.wav", x, 96_000, subtype="FLOAT")
    found = ClipOutcome(
        str(tmp_path / "odd.wav"), str(tmp_path / "odd.wav"), "restored", (Gap(0, 0.5, 0.5, "", "sound"),), duration_s=1.0
    )
    text = write(tmp_path, [found]).read_text()
    assert text.count("<audio") == 2 and "none read" in text


def test_a_page_that_can_not_be_written(tmp_path, outcomes):
    (tmp_path / "new").write_bytes(b"")
    with pytest.raises(OSError):
        write(tmp_path, outcomes[1:2])


@pytest.mark.skipif(not browser.find(), reason="no Chromium here: none on the PATH, none in $CHROMIUM")
def test_in_a_browser(tmp_path, outcomes):
    """Nothing complains, nothing is asked of the network, all fits, can be read and plays."""
    page = write(tmp_path, outcomes)
    with browser.Browser(browser.find()) as chromium:
        for width in (1280, 400):
            chromium.open(page.as_uri(), width)
            assert chromium.ask("document.documentElement.scrollWidth") <= width
            assert chromium.ask(TOO_WIDE) == [] and chromium.ask(TOO_TIGHT) == 0 and chromium.ask(TOO_PALE) == []
        assert chromium.ask("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
        players = chromium.ask(PLAYED)
        assert [p["error"] for p in players] == [None] * 6
        np.testing.assert_allclose([p["seconds"] for p in players], [3, 3, 6, 6, 4, 4], atol=0.01)
        assert chromium.complaints() == [] and chromium.requested() == {page.as_uri()}
