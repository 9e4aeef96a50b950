"""benchmarks/scaling*.py: formulas against values worked by hand or published, what is read out of a program, and the page."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling():
    from benchmarks.tpu import scaling

    return scaling


@pytest.fixture(scope="module")
def paper(scaling):
    return scaling.scaling_paper


@pytest.fixture(scope="module")
def tables(scaling):
    return scaling.scaling_page


# ----------------------------------------------------------------------------------------------------------------------- formulas


def test_a_ring_of_two_axes_has_the_published_bandwidth(paper):
    """A v5e pod sums at 51.2 TB/s, 200 GB/s a chip (cloud.google.com/tpu/docs/v5e); every byte goes out and comes back."""
    size = 256e9
    took = paper.allreduce_s(size, (16, 16), paper.CHIPS["v5e"])
    assert took == pytest.approx(2 * size * 255 / 256 / (51.2e12 / 256), rel=1e-4)


def test_a_v4_pod_too(paper):
    """1.1 PB/s over 4096 chips."""
    size = 1e12
    assert size / paper.allreduce_s(size, (16, 16, 16), paper.CHIPS["v4"]) * 2 * 4096 == pytest.approx(1.1e15, rel=0.02)


def test_an_axis_that_is_no_ring_has_half_of_it(paper):
    """The worked answer of scaling-book, part 3: 34 MB gathered along 4 chips of v5e at 45 GB/s take 560 us; a sum twice that."""
    chip = paper.CHIPS["v5e"]._replace(link=45e9)
    size = 2048 * 8192 * 2
    assert paper.allreduce_s(size, (4,), chip) == pytest.approx(2 * 560e-6, rel=0.02)


def test_small_sums_cost_the_hops(paper):
    assert paper.allreduce_s(0, (16, 16), paper.CHIPS["v5e"]) == pytest.approx(2 * (8 + 8) * 1e-6)
    assert paper.allreduce_s(0, (2, 4), paper.CHIPS["v5e"]) == pytest.approx(2 * (1 + 3) * 1e-6)
    assert paper.allreduce_s(1e9, (1, 1), paper.CHIPS["v5e"]) == 0


def test_two_hosts_send_what_they_have_once_each_way(paper):
    assert paper.ring_s(25e9, 2, 25e9) == pytest.approx(1 + 2 * paper.NET_HOP_S)


def test_hosts_of_a_slice(paper):
    """As docs/launch.md has them."""
    assert [paper.hosts_of(n) for n in (1, 8, 16, 256)] == [1, 1, 4, 64]


def test_a_clip_is_what_training_hands_over(paper):
    """16-bit sound of 3 s, 75 x 68 points of two floats, a byte a picture, two texts, and a few numbers."""
    known = 48_000 * 2 + 75 * 68 * 2 * 4 + 75 + 41 * 4 + 23 * 4
    assert known < paper.clip_bytes() <= known + 12 * 8


def test_cost_is_straight_between_what_is_known(paper):
    points = {1: 10.0, 32: 41.0, 64: 105.0}
    assert [paper.cost(points, b) for b in (0.5, 1, 2, 48, 64, 96)] == [10, 10, 11, 73, 105, 169]


@pytest.fixture
def model(paper):
    """Ten seconds whatever the batch up to 10 clips, then a second a clip; sums cost nothing."""
    return paper.Model({1: 10.0, 10: 10.0, 110: 110.0}, size=0.0)


def test_a_chip_that_has_too_little_to_do(paper, model, monkeypatch):
    monkeypatch.setattr(paper, "HOP_S", 0.0)
    assert model.efficiency(256, 110) == pytest.approx(1) and model.efficiency(256, 5) == pytest.approx(0.5)
    assert model.least_b(256, 0.5) == 5 and model.least_b(256, 0.8) == 8
    assert model.speedup_share(8, 80) == pytest.approx(1) and model.speedup_share(16, 80) == pytest.approx(0.5)


def test_a_reader_that_is_too_slow(model):
    """One host of 8 chips eats 8 clips a second; a reader of 4 gives half, and no batch mends that."""
    slow = model._replace(clips_s=4.0)
    assert slow.step_s(8, 110) == 8 * 110 / 4 and slow.efficiency(8, 110) == pytest.approx(0.5)
    assert slow.least_b(8, 0.8) is None
    assert slow.efficiency(16, 110) == pytest.approx(1, rel=1e-5), "four hosts of 4 chips: 4 clips a second each"


def test_the_batch_that_leaves_enough_steps(paper):
    """100 epochs of 20,000 clips in 5,500 steps."""
    assert paper.UPDATES == 5500 and paper.largest_batch() == 363


# -------------------------------------------------------------------------------------------------------------- reading, writing

PROGRAM = """HloModule step, is_scheduled=true

%add (p0: f32[], p1: f32[]) -> f32[] {
  %p0 = f32[] parameter(0)
  %p1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%p0, %p1)
}

ENTRY %main (a: f32[8,16], b: bf16[4], c: f32[]) -> f32[] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = bf16[4]{0} parameter(1)
  %c = f32[] parameter(2)
  %all-reduce = (f32[8,16]{1,0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %all-reduce.1 = f32[] all-reduce(%c), channel_id=2, replica_groups=[1,256]<=[256], to_apply=%add
}
"""


def test_sums_of_a_program(scaling):
    """Both ways in which XLA prints groups."""
    assert scaling.reduced(PROGRAM) == [{"arrays": 2, "bytes": 520, "devices": 4}, {"arrays": 1, "bytes": 4, "devices": 256}]


def test_a_table_comes_back(tables):
    rows = [{"system": "a", "chips": 8, "ms": 26.125, "GB": None}, {"system": "b", "chips": 1256, "ms": 0.5, "GB": 2.0}]
    text = tables.table(rows)
    assert text.splitlines()[1] == "| --- | ---: | ---: | ---: |"
    assert tables.rows_of("words\n" + text + "\nmore") == [
        {"system": "a", "chips": 8, "ms": 26.1, "GB": ""}, {"system": "b", "chips": 1256, "ms": 0.5, "GB": 2}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="found no table in 'nothing', expected one"):
        tables.rows_of("nothing")


def test_a_part_of_the_page(tables):
    page = "x\n<!-- compiled -->\nold\n<!-- end -->\ny\n<!-- paper -->\n<!-- end -->\n"
    page = tables.with_part(page, "paper", "new")
    assert tables.part(page, "paper").strip() == "new" and tables.part(page, "compiled") == "old\n" and page.startswith("x\n")
    with pytest.raises(ValueError, match="found no mark <!-- measured -->"):
        tables.part(page, "measured")


def test_the_page_is_what_its_tables_give(tables, paper):
    page = tables.PAGE.read_text()
    compiled = tables.rows_of(tables.part(page, "compiled"))
    again = {"paper": paper.paper_text(compiled), "summary": tables.table(paper.summary(compiled))}
    for name, text in again.items():
        assert tables.part(page, name).strip() == text.strip(), "run python -m benchmarks.tpu.scaling"


def test_what_is_compiled_fits_the_network(tables):
    """Gradients of every parameter, in two sums over all chips, whatever their number."""
    rows = tables.rows_of(tables.part(tables.PAGE.read_text(), "compiled"))
    assert rows and {r["all-reduces"] for r in rows} == {2}
    parameters = {"av_mtl_s2s": 8_148_802}  # docs/systems.md
    for row in rows:
        if row["system"] in parameters:
            assert 4 * parameters[row["system"]] <= 1e6 * row["MB reduced"] + 5e3 < 4 * parameters[row["system"]] + 10e3


@pytest.mark.parametrize(
    ("words", "said"), [(["--compile"], "expected --cache=DIR"), (["--measure", "--json"], "expected them alone")]
)
def test_mistakes_are_told_before_any_work(scaling, words, said, capsys):
    with pytest.raises(SystemExit) as left:
        scaling.main(words)
    assert left.value.code == 2 and said in capsys.readouterr().err
