"""benchmarks/speed/train_step.py, its neighbours and ablation.py: what they count, refuse and write, against values worked by hand."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train_step():
    from benchmarks.speed import train_step

    return train_step


@pytest.fixture(scope="module")
def ablation():
    from benchmarks.results import ablation

    return ablation


# ------------------------------------------------------------------------------------------------------------ train_step.py


def test_multiplications_are_those_of_the_networks_kernels(train_step):
    """Every kernel is used once a step and clip, forward; twice more backward, but for what leads to the features themselves."""
    import jax

    from avsi_jax import configs
    from avsi_jax.models import build

    config = configs.load("av_mtl_s2s")
    params = jax.eval_shape(lambda: build.init_params(config))
    size = sum(v.size for k, v in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(k))
    features = (136 + 64) * 2 * 4 * 256  # of the first layers' kernels, two directions, four gates: what sees lips and sound
    scale = 2 * 32 * 149 / 1e9
    assert train_step.gflop(32) == pytest.approx((size * scale, (3 * size - features) * scale))


GPU_LANES = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
]


SPACE = "void at::native::(anonymous namespace)::"  # of two kernels that are not one
OF_JAX = [{"ph": "X", "pid": 1, "tid": 7, "name": n, "dur": d} for n, d in (("gemm_1", 1500), ("gemm_2", 1500), ("add(f*)", 1000))]
OF_TORCH = [
    {"ph": "X", "cat": "kernel", "pid": 0, "tid": 7, "name": n, "dur": d}
    for n, d in (("gemm_1", 3000), ("gemm_9", 0), (f"{SPACE}foo(int)", 750), (f"{SPACE}bar(int)", 250))
]


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (
            [*GPU_LANES, *OF_JAX, {"ph": "X", "pid": 1, "tid": 8, "name": "op", "dur": 9000}]
            + [{"ph": "X", "pid": 2, "tid": 7, "name": "cpu", "dur": 9}],
            "4.00 ms in kernels: 75% gemm x 2, 25% add x 1",
        ),
        (
            [*OF_TORCH, {"ph": "X", "cat": "cpu_op", "pid": 0, "tid": 1, "name": "aten::mm", "dur": 9000}],
            "4.00 ms in kernels: 75% gemm x 2, 19% void at::native::foo x 1, 6% void at::native::bar x 1",
        ),
    ],
    ids=["jax", "torch"],
)
def test_dearest_kernels(events, said):
    """Of jax: the streams of the device, not the lanes that say the same again; of torch: what is called a kernel."""
    from benchmarks.speed import traces

    assert traces.dearest({"traceEvents": events}) == said
    assert traces.dearest({"traceEvents": events[-1:]}) == "no kernels on a GPU"


def test_a_cpu_is_not_held_against_a_gpu(train_step):
    on = lambda name, where: types.SimpleNamespace(name=name, facts=where)
    train_step.refuse_other_machines([on("ours", {"platform": "gpu"}), on("keras", {}), on("torch", {"platform": "gpu"})])
    with pytest.raises(ValueError, match="ours on a gpu, torch on a cpu"):
        train_step.refuse_other_machines([on("ours", {"platform": "gpu"}), on("torch", {"platform": "cpu"})])


@pytest.mark.parametrize("words", [["--dtype=bfloat16"], ["--precision=bfloat16"]])
def test_types_go_together(train_step, words, capsys):
    with pytest.raises(SystemExit):
        train_step.main(words)
    assert "expected bfloat16 for both or for neither" in capsys.readouterr().err


def test_a_sweep_keeps_what_it_has(train_step, monkeypatch, capsys):
    """One of its cells runs out of memory."""
    given = []

    class SystemOutput:
        def __init__(self, name, args, called, short, **more):
            given.append((called, short, more["batch_size"], more["precision"], more["lstm"]))
            if called == "torch" and more["batch_size"] == 1024 and more["precision"] == "tf32":
                raise RuntimeError("torch ended with status 1")
            self.name, self.facts = called, {"platform": "gpu", "does": ["step"]}

        def do(self, what, counts=True):
            return None

        def ms(self, what):
            return {"scan": 4.0, "torch": 2.0, "cudnn": 1.0}[self.name]

        def close(self):
            given.append("closed")

    monkeypatch.setattr(train_step, "Contender", SystemOutput)
    row = train_step.sweep(types.SimpleNamespace(rounds=1, profile=""))
    assert row["ms_scan_32_float32"] == 4.0 and row["ratio_torch_over_scan_32_tf32"] == 0.5
    assert row["ratio_torch_over_cudnn_256_float32"] == 2.0 and row["ratio_scan_over_cudnn_1024_float32"] == 4.0
    assert row["failed_1024_tf32"] == "torch ended with status 1" and "ms_scan_1024_tf32" not in row
    assert "ms_cudnn_32_bfloat16" not in row and ("scan", True, 32, "bfloat16", "joined") in given
    assert "ratio_torch_over_scan_32_tf32" in capsys.readouterr().out
    made = sum(g != "closed" for g in given)
    assert given.count("closed") == made - 1  # all that were made; the one that failed never was


def test_sweep_wants_a_gpu(train_step, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "backend_of_jax", lambda: "cpu")
    assert train_step.main(["--sweep"]) == 2
    assert capsys.readouterr().err == (
        "benchmarks/speed/train_step.py: --sweep: found jax on a cpu, expected a GPU that jax and torch can both use\n"
    )


@pytest.mark.slow
def test_last_line_is_one_flat_object():
    """Two contenders that are always there, for real."""
    command = [sys.executable, ROOT / "benchmarks" / "train_step.py", "--json", "--short", "--batch_size=2", "--rounds=1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--only", "ours", "flax"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert not [v for v in row.values() if isinstance(v, dict | list)]
    assert row["ratio_flax_over_ours"] == pytest.approx(row["ms_flax"] / row["ms_ours"], rel=1e-3)
    assert 0 < row["share_of_peak"] < 1.1 and row["ms_ours_forward"] < row["ms_ours"]


# ------------------------------------------------------------------------------------------------------------ ablation.py


def run_of(own, other, reading=None):
    """What `rows_of` gives: two lengths of gap, three clips of two speakers."""
    speakers = ["s1", "s1", "s2"]
    return {"errors": {"own": {"300": own, "600": [x + 2 for x in own]}, "other": other}, "reading": reading, "speakers": speakers}


def test_a_row_holds_means_and_the_paired_difference(ablation):
    first = run_of([4.0, 5.0, 9.0], {"300": [8.0] * 3, "600": [10.0] * 3})
    run = run_of([3.0, 4.0, 8.0], {"300": [8.0] * 3, "600": [8.0] * 3}, reading=0.25)
    assert ablation.row_of(first, first, unseen=False) == {
        "gap_l1_db": {"300": 6.0, "600": 8.0}, "own": 7.0, "other": 9.0, "reading": None, "clips": 3
    }  # fmt: skip
    row = ablation.row_of(run, first, unseen=True)
    assert row["own"] == 6.0 and row["reading"] == 0.25
    assert row["difference"] == [-1.0, -1.0, -1.0]  # every clip 1 dB better: no width


def test_tables_stand_where_they_are_marked(ablation):
    row = {"gap_l1_db": {str(ms): 8.0 for ms in ablation.GAPS_MS}, "own": 8.0, "other": 11.0, "reading": None, "clips": 100}
    better = row | {"own": 7.5, "none": 9.25, "lips": 10.0, "reading": 0.5, "difference": [-0.5, -0.75, -0.25]}
    run = lambda r, differs: {s: r for s in ablation.SPLITS} | {"differs": differs, "parameters": 4_666_049, "epochs": 8}
    shared = {"preset": "wide", "stack": 2}
    kept = {
        "unified": {"single": run(row, {"motion": "pose"}), "u_base": run(row, shared), "u_new": run(better, shared | {"x": 1})}
    }
    page = ablation.page("before\n<!-- unified -->\nold\n<!-- end -->\nafter\n<!-- encoder -->\nstays\n<!-- end -->\n", kept)
    assert page.startswith("before\n<!-- unified -->\n\nAll but") and "old" not in page
    assert page.endswith("<!-- end -->\nafter\n<!-- encoder -->\nstays\n<!-- end -->\n")
    assert "All but single: preset=wide, stack=2.\n" in page
    assert "| single | see the text | 4,666,049 | 8 |" in page and "| u_base |  | 4,666,049 | 8 |" in page
    assert "| u_new | x=1 | 4,666,049 | 8 |" in page
    assert page.count("| 7.50 | -0.50 [-0.75, -0.25] | 11.00 | 9.25 | 10.00 | 0.500 |") == 2
    with pytest.raises(SystemExit, match="no place for unified"):
        ablation.page("nothing", kept)


def test_what_a_run_differs_in(ablation, trained, tmp_path):
    import shutil

    from avsi_jax.training import run_directory

    other = tmp_path / "other"
    shutil.copytree(trained, other)
    config = json.loads((other / run_directory.CONFIG).read_text())
    config["loss"]["ctc"], config["data_dir"] = 0.5, "elsewhere"
    (other / run_directory.CONFIG).write_text(json.dumps(config))
    facts = ablation.facts_of(other, trained)
    assert facts["differs"] == {"loss.ctc": 0.5}  # where the data lies is no choice
    rows = run_directory.read_rows(trained / run_directory.METRICS)
    assert facts["epochs"] == len(rows) and facts["best_val_gap_l1_db"] == min(r["val_gap_l1_db"] for r in rows)


def test_runs_are_told_apart_and_have_a_place_before_any_is_evaluated(ablation, tmp_path):
    with pytest.raises(SystemExit, match="two runs of one name"):
        ablation.add("unified", [tmp_path / "a" / "run", tmp_path / "b" / "run"], "", "", None)
    with pytest.raises(SystemExit, match="no place for uniform"):
        ablation.add("uniform", [tmp_path / "a"], "", "", None)


def test_errors_say_what_to_give(ablation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "add", "unified"])
    with pytest.raises(SystemExit) as left:
        ablation.main()
    assert left.value.code == 2 and "expected GROUP, --data_dir and workdirs" in capsys.readouterr().err
