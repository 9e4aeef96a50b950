"""Report pages of fake evaluations in a headless Chromium: no errors, no requests, everything fits, can be read and plays.

Set CHROMIUM to a program if there is none on the PATH.
"""

import numpy as np
import pytest

from avsi_jax.evaluation import report
from tests.support import browser, fake_evaluations

pytestmark = pytest.mark.skipif(not browser.find(), reason="no Chromium here: none on the PATH, none in $CHROMIUM")
WIDTHS = (1280, 400)


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser(browser.find()) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report.write_report(fake_evaluations.make(tmp_path_factory.mktemp("pages") / "eval"))


def screenshot(chromium, path):
    from PIL import Image

    chromium.screenshot(path)
    return Image.open(path)


@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_loads_and_fits_the_window(chromium, page, tmp_path, width):
    chromium.events.clear()
    chromium.open(page.as_uri(), width)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate(browser.OUTSIDE_WINDOW) == [] and chromium.evaluate(browser.CLIPPED) == 0
    assert chromium.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert chromium.console_errors() == [] and chromium.requested() == {page.as_uri()}
    image = screenshot(chromium, tmp_path / "page.png")
    assert image.width == width and image.height > 3000
    colours = np.asarray(image.convert("RGB"))
    assert (colours.min(-1) < 100).mean() > 0.01 and (colours.min(-1) > 230).mean() > 0.4  # dark text on white


@pytest.mark.slow
def test_every_player_plays(chromium, page):
    """The audio lasts 1.5 s; it is embedded in the page, which the page's content security policy allows."""
    chromium.events.clear()
    chromium.open(page.as_uri(), 1280)
    players = chromium.evaluate(browser.PLAYERS)
    assert len(players) == 10
    for player in players:
        assert player["error"] is None and player["state"] >= 2 and player["seconds"] == pytest.approx(1.5, abs=0.01)
    assert chromium.console_errors() == []


@pytest.mark.slow
def test_text_has_contrast_and_images_have_names(chromium, page):
    """Contrast of at least 4.5 to 1 (WCAG 2.2, AA); names of images and regions in the accessibility tree."""
    chromium.open(page.as_uri(), 1280)
    assert chromium.evaluate(browser.LOW_CONTRAST) == []
    chromium("Accessibility.enable")
    nodes = chromium("Accessibility.getFullAXTree")["nodes"]
    named = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in ("image", "region", "table", "Audio")]
    roles = {n["role"]["value"] for n in named}
    assert {"image", "region"} <= roles
    assert all(n["name"]["value"] for n in named if n["role"]["value"] in ("image", "region"))


@pytest.mark.slow
def test_a_comparison_loads(chromium, tmp_path):
    options = {"cases": fake_evaluations.CASES, "examples": False, "suite": "lengths"}
    folders = [fake_evaluations.make(tmp_path / n / "eval" / "x", shift=i, **options) for i, n in enumerate("ab")]
    page = report.write_comparison(folders, tmp_path / "both.html")
    chromium.events.clear()
    chromium.open(page.as_uri(), 400)
    assert chromium.evaluate("document.documentElement.scrollWidth") <= 400
    assert chromium.evaluate(browser.OUTSIDE_WINDOW) == []
    assert chromium.evaluate("document.images.length") >= 3 and chromium.console_errors() == []


@pytest.mark.slow
def test_the_checks_detect_a_bad_page(chromium, tmp_path):
    """With a script, an image from elsewhere and audio that cannot be decoded."""
    page = tmp_path / "bad.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    page.write_text(f'<!doctype html>{policy}<script>1</script><img src="x.png"><audio src="data:audio/wav;base64,AAAA"></audio>')
    chromium.events.clear()
    chromium.open(page.as_uri(), 400)
    assert len(chromium.console_errors()) >= 2
    assert [p["error"] is not None for p in chromium.evaluate(browser.PLAYERS)] == [True]
