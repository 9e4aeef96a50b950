"""The page of avsi-inpaint --report: its content, and that a browser shows and plays it without any request."""

import base64
import re

import numpy as np
import pytest
import soundfile

from avsi_jax.inpainting import html_report
from avsi_jax.inpainting.api import Gap
from avsi_jax.inpainting.cli_output import ClipOutcome
from tests.support import browser

RATE = 16_000


def restored_clip(folder, name, seconds, gaps, **fields):
    """Writes a tone, silent in its gaps, and an output with a louder tone there; the outcome."""
    x = 0.1 * np.sin(np.arange(round(seconds * RATE)) / 5).astype(np.float32)
    paths = [folder / name, folder / f"{name}.restored.wav"]
    for path, factor in zip(paths, (0.0, 3.0)):
        y = x.copy()
        for start, end in gaps:
            y[round(start * RATE) : round(end * RATE)] *= factor
        soundfile.write(path, y, RATE, format="WAV")
    restored = tuple(Gap(a, b, 0.7, "bin blue at f two now", "audio and video") for a, b in gaps)
    fields = {"seconds": {"decode": 0.1, "all": 0.5}, "duration_s": seconds} | fields
    return ClipOutcome(str(paths[0]), str(paths[1]), "restored", restored, **fields)


@pytest.fixture
def outcomes(tmp_path):
    return [
        restored_clip(tmp_path, "short.wav", 3.0, [(1.0, 1.5), (2.0, 2.2)], warnings=("half a <b>face</b>",), av_offset_s=-0.08),
        ClipOutcome("junk.wav", None, "failed", error="junk.wav: cannot be decoded"),
        restored_clip(tmp_path, "long & <u>1.wav", 90.0, [(10, 11), (12, 13), (70, 71)]),
        ClipOutcome("complete.wav", None, "no gap", duration_s=3725.5),
        ClipOutcome("b.wav", "b.restored.wav", "exists"),
    ]


def write(tmp_path, outcomes):
    path = tmp_path / "new" / "page.html"
    html_report.write(path, outcomes, command="avsi-inpaint '<u>.wav'", checkpoint="pretrained")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    return path


def test_the_page_shows_every_outcome_and_escapes_its_text(tmp_path, outcomes):
    text = write(tmp_path, outcomes).read_text()
    assert "<b>face" not in text and "<u>" not in text
    shown = ("half a &lt;b&gt;face", "cannot be decoded", "1:02:05.50", "80 ms", "leads", "1:10.00 to 1:11.00", "audio and video")
    for part in (*shown, "bin blue at f two now", "no gap", "exists"):
        assert part in text, part
    assert text.count("<audio") == 6 and text.count("data:image/png") == 6  # short: once; long: around 10 to 13 s, and 70 s


def test_short_clips_are_shown_in_full_and_long_clips_around_their_gaps(tmp_path):
    distant = [(20.0 * i, 20.0 * i + 1) for i in range(1, 9)]
    assert html_report.segments_of(restored_clip(tmp_path, "a.wav", 12, [(1, 2)])) == [(0, 12)]
    segments = html_report.segments_of(restored_clip(tmp_path, "b.wav", 170, distant))
    assert segments == [(20 * i - 1.5, 20 * i + 2.5) for i in range(1, 9)]
    close = [(1.0 * i, 1.0 * i + 0.5) for i in range(40)]
    segments = html_report.segments_of(restored_clip(tmp_path, "c.wav", 40, close))
    assert all(end - start <= html_report.MAX_SEGMENT_S for start, end in segments)
    assert all(any(start <= a and b <= end for start, end in segments) for a, b in close)


def test_the_size_of_a_page_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(html_report, "MAX_BYTES", 1000)
    text = write(tmp_path, [restored_clip(tmp_path, f"{i}.wav", 2.0, [(1, 1.5)]) for i in range(3)]).read_text()
    assert text.count("<audio") == 2 and text.count("Not shown") == 2


def test_a_clip_that_was_deleted_is_reported(tmp_path, outcomes):
    (tmp_path / "short.wav").unlink()
    text = write(tmp_path, outcomes).read_text()
    assert text.count("<audio") == 4 and text.count("Cannot be shown") == 1


def test_a_clip_with_audio_inside_its_gap_is_also_shown_as_it_was(tmp_path):
    """As with --example: an intact clip is compared with the clip with the gap, whose samples there are zero, and the result."""
    x = 0.1 * np.sin(np.arange(2 * RATE) / 5)
    soundfile.write(tmp_path / "intact.wav", x, RATE)
    soundfile.write(tmp_path / "restored.wav", x / 2, RATE)
    gaps = (Gap(0.5, 1.0, 0.5, "", "audio"),)
    outcome = ClipOutcome(str(tmp_path / "intact.wav"), str(tmp_path / "restored.wav"), "restored", gaps, duration_s=2.0)
    text = write(tmp_path, [outcome]).read_text()
    names = re.findall(r'<div class="card \w*"><b>([^<]*)</b>', text)
    assert names == ["With the gap", "Restored", "Original"]
    (tmp_path / "played.flac").write_bytes(base64.b64decode(re.search(r'src="data:audio/flac;base64,([^"]*)"', text)[1]))
    played, _ = soundfile.read(tmp_path / "played.flac")
    assert not played[round(0.5 * RATE) : RATE].any() and played[: round(0.49 * RATE)].any() and played[RATE:].any()


def test_the_page_names_no_folder_of_the_machine(tmp_path):
    """Clips of one name in two folders stay distinct; the clips are read from where they are."""
    outcomes = []
    for folder in ("anna/one", "anna/two"):
        (tmp_path / folder).mkdir(parents=True)
        outcomes.append(restored_clip(tmp_path / folder, "a.wav", 2.0, [(1, 1.5)], warnings=(f"{tmp_path}/anna/x.wav: short",)))
    outcomes.append(ClipOutcome(f"{tmp_path}/anna/b.wav", None, "failed", error=f"{tmp_path}/anna/b.wav: cannot be decoded"))
    path = tmp_path / "page.html"
    html_report.write(path, outcomes, command=f"avsi-inpaint {tmp_path}/anna -o {tmp_path}/out", checkpoint=f"{tmp_path}/runs/x")
    text = path.read_text()
    assert str(tmp_path) not in text and text.count("<audio") == 4
    for shown in ("one/a.wav", "two/a.wav", "cannot be decoded", "avsi-inpaint anna -o out", "x.wav: short"):
        assert shown in text, shown


def test_audio_that_browsers_do_not_play_is_converted(tmp_path):
    """3 channels, 96 kHz, with NaN."""
    x = np.full((96_000, 3), np.nan, np.float32)
    x[::2] = 0.1
    soundfile.write(tmp_path / "odd.wav", x, 96_000, subtype="FLOAT")
    gaps = (Gap(0, 0.5, 0.5, "", "audio"),)
    outcome = ClipOutcome(str(tmp_path / "odd.wav"), str(tmp_path / "odd.wav"), "restored", gaps, duration_s=1.0)
    assert write(tmp_path, [outcome]).read_text().count("<audio") == 3


def test_a_page_that_cannot_be_written_is_an_error(tmp_path, outcomes):
    (tmp_path / "new").write_bytes(b"")
    with pytest.raises(OSError):
        write(tmp_path, outcomes[1:2])


@pytest.mark.slow
@pytest.mark.skipif(not browser.find(), reason="no Chromium here: none on the PATH, none in $CHROMIUM")
def test_a_browser_shows_and_plays_the_page(tmp_path, outcomes):
    """Without errors or requests; everything fits, has enough contrast and plays."""
    page = write(tmp_path, outcomes)
    with browser.Browser(browser.find()) as chromium:
        for width in (1280, 400):
            chromium.open(page.as_uri(), width)
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            assert chromium.evaluate(browser.OUTSIDE_WINDOW) == [] and chromium.evaluate(browser.CLIPPED) == 0
            assert chromium.evaluate(browser.LOW_CONTRAST) == []
        assert chromium.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
        players = chromium.evaluate(browser.PLAYERS)
        assert [p["error"] for p in players] == [None] * 6
        np.testing.assert_allclose([p["seconds"] for p in players], [3, 3, 6, 6, 4, 4], atol=0.01)
        assert chromium.console_errors() == [] and chromium.requested() == {page.as_uri()}
