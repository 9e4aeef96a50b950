"""The pages of made-up evaluations in a headless Chromium: nothing complains, nothing is asked of the network, everything plays.

Set CHROMIUM to a program where none is on the PATH.
"""

import numpy as np
import pytest

from avsi_jax.evaluation import report
from tests.support import browser, fake_evaluations

pytestmark = pytest.mark.skipif(not browser.find(), reason="no Chromium here: none on the PATH, none in $CHROMIUM")
WIDTHS = (1280, 400)

PLAYED = """Promise.all([...document.querySelectorAll('audio')].map(a => new Promise(done => {
    const tell = () => done({error: a.error && a.error.message, seconds: a.duration, state: a.readyState});
    a.onloadeddata = tell; a.onerror = tell; a.preload = 'auto'; a.load();
})))"""
TOO_WIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') && !e.closest('svg') &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + ': ' + e.textContent.slice(0, 40))"""
TOO_TIGHT = """[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth + 1 &&
    getComputedStyle(e).overflowX != 'auto').length"""
TOO_PALE = """(() => {
    const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 :
        ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
    const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$|transparent/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
    const written = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    return [...document.querySelectorAll('body *')].filter(written).filter(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05) < 4.5; }).map(e => e.textContent.slice(0, 40));
})()"""


@pytest.fixture(scope="module")
def chromium():
    with browser.Browser(browser.find()) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return report.write_report(fake_evaluations.make(tmp_path_factory.mktemp("pages") / "eval"))


def image(chromium, path):
    from PIL import Image

    chromium.image(path)
    return Image.open(path)


@pytest.mark.parametrize("width", WIDTHS)
def test_it_loads_and_fits(chromium, page, tmp_path, width):
    chromium.events.clear()
    chromium.open(page.as_uri(), width)
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert chromium.ask(TOO_WIDE) == [] and chromium.ask(TOO_TIGHT) == 0
    assert chromium.ask("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
    assert chromium.complaints() == [] and chromium.requested() == {page.as_uri()}
    drawn = image(chromium, tmp_path / "page.png")
    assert drawn.width == width and drawn.height > 3000
    colours = np.asarray(drawn.convert("RGB"))
    assert (colours.min(-1) < 100).mean() > 0.01 and (colours.min(-1) > 230).mean() > 0.4  # ink on white


def test_every_player_plays(chromium, page):
    """The made-up sounds last 1.5 s; they sit in the page, which the policy of the page allows."""
    chromium.events.clear()
    chromium.open(page.as_uri(), 1280)
    players = chromium.ask(PLAYED)
    assert len(players) == 10
    for player in players:
        assert player["error"] is None and player["state"] >= 2 and player["seconds"] == pytest.approx(1.5, abs=0.01)
    assert chromium.complaints() == []


def test_it_can_be_read(chromium, page):
    """Contrast of every text at least 4.5 to 1 (WCAG 2.2, AA); names for what the accessibility tree calls image and region."""
    chromium.open(page.as_uri(), 1280)
    assert chromium.ask(TOO_PALE) == []
    chromium("Accessibility.enable")
    nodes = chromium("Accessibility.getFullAXTree")["nodes"]
    named = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in ("image", "region", "table", "Audio")]
    roles = {n["role"]["value"] for n in named}
    assert {"image", "region"} <= roles
    assert all(n["name"]["value"] for n in named if n["role"]["value"] in ("image", "region"))


def test_a_comparison_loads(chromium, tmp_path):
    only = {"cases": fake_evaluations.CASES, "examples": False, "suite": "lengths"}
    folders = [fake_evaluations.make(tmp_path / n / "eval" / "x", shift=i, **only) for i, n in enumerate("ab")]
    page = report.write_comparison(folders, tmp_path / "both.html")
    chromium.events.clear()
    chromium.open(page.as_uri(), 400)
    assert chromium.ask("document.documentElement.scrollWidth") <= 400 and chromium.ask(TOO_WIDE) == []
    assert chromium.ask("document.images.length") >= 3 and chromium.complaints() == []


def test_what_complains_is_heard(chromium, tmp_path):
    """The checks above can fail: a page with a script and a picture from elsewhere is noticed."""
    page = tmp_path / "bad.html"
    policy = '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">'
    page.write_text(f'<!doctype html>{policy}<script>1</script><img src="x.png"><audio src="data:audio/wav;base64,AAAA"></audio>')
    chromium.events.clear()
    chromium.open(page.as_uri(), 400)
    assert len(chromium.complaints()) >= 2
    assert [p["error"] is not None for p in chromium.ask(PLAYED)] == [True]
