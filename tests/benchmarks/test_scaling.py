"""benchmarks.tpu.scaling and its helpers: formulas against published or hand-calculated values, and the generated page."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def scaling():
    from benchmarks.tpu import scaling

    return scaling


@pytest.fixture(scope="module")
def estimates(scaling):
    return scaling.scaling_estimates


@pytest.fixture(scope="module")
def scaling_page(scaling):
    return scaling.scaling_page


# ----------------------------------------------------------------------------------------------------------------------- formulas


def test_a_torus_of_two_rings_has_the_published_bandwidth(estimates):
    """A v5e pod sums at 51.2 TB/s, 200 GB/s a chip (cloud.google.com/tpu/docs/v5e); every byte is sent and received."""
    size = 256e9
    took = estimates.allreduce_s(size, (16, 16), estimates.CHIPS["v5e"])
    assert took == pytest.approx(2 * size * 255 / 256 / (51.2e12 / 256), rel=1e-4)


def test_a_v4_pod_has_the_published_bandwidth(estimates):
    """1.1 PB/s over 4096 chips."""
    size = 1e12
    assert size / estimates.allreduce_s(size, (16, 16, 16), estimates.CHIPS["v4"]) * 2 * 4096 == pytest.approx(1.1e15, rel=0.02)


def test_an_axis_that_is_no_ring_has_half_the_bandwidth(estimates):
    """An answer in scaling-book, part 3: gathering 34 MB along 4 chips of v5e at 45 GB/s takes 560 us; a sum takes twice that."""
    chip = estimates.CHIPS["v5e"]._replace(link=45e9)
    size = 2048 * 8192 * 2
    assert estimates.allreduce_s(size, (4,), chip) == pytest.approx(2 * 560e-6, rel=0.02)


def test_small_sums_cost_the_latency_of_the_hops(estimates):
    assert estimates.allreduce_s(0, (16, 16), estimates.CHIPS["v5e"]) == pytest.approx(2 * (8 + 8) * 1e-6)
    assert estimates.allreduce_s(0, (2, 4), estimates.CHIPS["v5e"]) == pytest.approx(2 * (1 + 3) * 1e-6)
    assert estimates.allreduce_s(1e9, (1, 1), estimates.CHIPS["v5e"]) == 0


def test_two_hosts_send_their_bytes_once_in_each_direction(estimates):
    assert estimates.ring_s(25e9, 2, 25e9) == pytest.approx(1 + 2 * estimates.NET_HOP_S)


def test_the_number_of_hosts_of_a_slice_is_as_documented(estimates):
    """See docs/launch.md."""
    assert [estimates.hosts_of(n) for n in (1, 8, 16, 256)] == [1, 1, 4, 64]


def test_the_bytes_of_a_clip_are_those_of_a_training_example(estimates):
    """16-bit audio of 3 s, 75 x 68 landmarks of two floats, a byte per frame, two texts, and a few numbers."""
    known = 48_000 * 2 + 75 * 68 * 2 * 4 + 75 + 41 * 4 + 23 * 4
    assert known < estimates.clip_bytes() <= known + 12 * 8


def test_cost_is_interpolated_linearly(estimates):
    points = {1: 10.0, 32: 41.0, 64: 105.0}
    assert [estimates.cost(points, b) for b in (0.5, 1, 2, 48, 64, 96)] == [10, 10, 11, 73, 105, 169]


@pytest.fixture
def model(estimates):
    """Ten seconds for up to 10 clips, then a second per clip; sums cost nothing."""
    return estimates.Model({1: 10.0, 10: 10.0, 110: 110.0}, size=0.0)


def test_small_batches_are_inefficient(estimates, model, monkeypatch):
    monkeypatch.setattr(estimates, "HOP_S", 0.0)
    assert model.efficiency(256, 110) == pytest.approx(1) and model.efficiency(256, 5) == pytest.approx(0.5)
    assert model.least_b(256, 0.5) == 5 and model.least_b(256, 0.8) == 8
    assert model.speedup_share(8, 80) == pytest.approx(1) and model.speedup_share(16, 80) == pytest.approx(0.5)


def test_a_slow_reader_limits_efficiency_for_any_batch(model):
    """A host of 8 chips needs 8 clips/s; a reader of 4 clips/s gives half of that at every batch size."""
    slow = model._replace(clips_s=4.0)
    assert slow.step_s(8, 110) == 8 * 110 / 4 and slow.efficiency(8, 110) == pytest.approx(0.5)
    assert slow.least_b(8, 0.8) is None
    assert slow.efficiency(16, 110) == pytest.approx(1, rel=1e-5), "four hosts of 4 chips need 4 clips/s each"


def test_the_largest_batch_leaves_enough_training_steps(estimates):
    """5,500 steps in 100 epochs of 20,000 clips."""
    assert estimates.UPDATES == 5500 and estimates.largest_batch() == 363


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


def test_all_reduces_of_a_program_are_read(scaling):
    """XLA prints replica groups in two ways."""
    assert scaling.all_reduces(PROGRAM) == [{"arrays": 2, "bytes": 520, "devices": 4}, {"arrays": 1, "bytes": 4, "devices": 256}]


def test_a_table_is_read_as_it_was_written(scaling_page):
    rows = [{"system": "a", "chips": 8, "ms": 26.125, "GB": None}, {"system": "b", "chips": 1256, "ms": 0.5, "GB": 2.0}]
    text = scaling_page.table(rows)
    assert text.splitlines()[1] == "| --- | ---: | ---: | ---: |"
    assert scaling_page.rows_of("words\n" + text + "\nmore") == [
        {"system": "a", "chips": 8, "ms": 26.1, "GB": ""}, {"system": "b", "chips": 1256, "ms": 0.5, "GB": 2}
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no table in 'nothing'"):
        scaling_page.rows_of("nothing")


def test_a_part_of_the_page_is_replaced(scaling_page):
    page = "x\n<!-- compiled -->\nold\n<!-- end -->\ny\n<!-- estimates -->\n<!-- end -->\n"
    page = scaling_page.with_part(page, "estimates", "new")
    assert (
        scaling_page.part(page, "estimates").strip() == "new"
        and scaling_page.part(page, "compiled") == "old\n"
        and page.startswith("x\n")
    )
    with pytest.raises(ValueError, match="<!-- measured -->"):
        scaling_page.part(page, "measured")


def test_the_page_is_generated_from_its_tables(scaling_page, estimates):
    page = scaling_page.PAGE.read_text()
    compiled = scaling_page.rows_of(scaling_page.part(page, "compiled"))
    again = {"estimates": estimates.as_text(compiled), "summary": scaling_page.table(estimates.summary(compiled))}
    for name, text in again.items():
        assert scaling_page.part(page, name).strip() == text.strip(), "run python -m benchmarks.tpu.scaling"


def test_the_compiled_programs_sum_the_networks_gradients(scaling_page):
    """Gradients of all parameters in two sums over all chips, for any number of chips."""
    rows = scaling_page.rows_of(scaling_page.part(scaling_page.PAGE.read_text(), "compiled"))
    assert rows and {r["all-reduces"] for r in rows} == {2}
    parameters = {"av_mtl_s2s": 8_148_802}  # docs/systems.md
    for row in rows:
        if row["system"] in parameters:
            assert 4 * parameters[row["system"]] <= 1e6 * row["MB reduced"] + 5e3 < 4 * parameters[row["system"]] + 10e3


@pytest.mark.parametrize(("words", "message"), [(["--compile"], "--cache"), (["--measure", "--json"], "--json")])
def test_wrong_arguments_are_reported_before_any_work(scaling, words, message, capsys):
    with pytest.raises(SystemExit) as left:
        scaling.main(words)
    assert left.value.code == 2 and message in capsys.readouterr().err
