"""benchmarks.speed.train_step, its helpers and benchmarks.results.ablation, against values computed by hand."""

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


def test_the_number_of_multiplications_matches_the_networks_kernels(train_step):
    """Every kernel is used once per time step and clip in the forward pass, and twice in the backward pass.

    The exception are gradients of the input features, which are not computed.
    """
    import jax

    from avsi_jax import configs
    from avsi_jax.models import build

    config = configs.load("av_mtl_s2s")
    params = jax.eval_shape(lambda: build.init_params(config))
    size = sum(v.size for k, v in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(k))
    features = (136 + 64) * 2 * 4 * 256  # kernels of the first layers: two directions, four gates
    scale = 2 * 32 * 149 / 1e9
    assert train_step.gflop(32) == pytest.approx((size * scale, (3 * size - features) * scale))


GPU_LANES = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 7, "args": {"name": "Stream #7(Compute)"}},
    {"ph": "M", "name": "thread_name", "pid": 1, "tid": 8, "args": {"name": "XLA Ops"}},
]


SPACE = "void at::native::(anonymous namespace)::"  # common prefix of two different kernels
OF_JAX = [{"ph": "X", "pid": 1, "tid": 7, "name": n, "dur": d} for n, d in (("gemm_1", 1500), ("gemm_2", 1500), ("add(f*)", 1000))]
OF_TORCH = [
    {"ph": "X", "cat": "kernel", "pid": 0, "tid": 7, "name": n, "dur": d}
    for n, d in (("gemm_1", 3000), ("gemm_9", 0), (f"{SPACE}foo(int)", 750), (f"{SPACE}bar(int)", 250))
]


@pytest.mark.parametrize(
    ("events", "summary"),
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
def test_the_most_expensive_kernels_are_summarised(events, summary):
    """For jax: events in the device's streams, not in the lanes that repeat them; for torch: events of category kernel."""
    from benchmarks.speed import traces

    assert traces.top_kernels({"traceEvents": events}) == summary
    assert traces.top_kernels({"traceEvents": events[-1:]}) == "no kernels on a GPU"


def test_a_cpu_is_not_compared_with_a_gpu(train_step):
    on = lambda name, where: types.SimpleNamespace(name=name, facts=where)
    train_step.check_same_platform([on("ours", {"platform": "gpu"}), on("keras", {}), on("torch", {"platform": "gpu"})])
    with pytest.raises(ValueError, match="ours on a gpu, torch on a cpu"):
        train_step.check_same_platform([on("ours", {"platform": "gpu"}), on("torch", {"platform": "cpu"})])


@pytest.mark.parametrize("words", [["--dtype=bfloat16"], ["--precision=bfloat16"]])
def test_dtype_and_precision_must_agree(train_step, words, capsys):
    with pytest.raises(SystemExit):
        train_step.main(words)
    err = capsys.readouterr().err
    assert "--dtype" in err and "--precision" in err


def test_a_sweep_keeps_its_other_results_when_one_fails(train_step, monkeypatch, capsys):
    calls = []

    class FakeContender:
        def __init__(self, name, args, label, short, **more):
            calls.append((label, short, more["batch_size"], more["precision"], more["lstm"]))
            if label == "torch" and more["batch_size"] == 1024 and more["precision"] == "tf32":
                raise RuntimeError("torch ended with status 1")
            self.name, self.facts = label, {"platform": "gpu", "tasks": ["step"]}

        def do(self, task, counts=True):
            return None

        def ms(self, task):
            return {"scan": 4.0, "torch": 2.0, "cudnn": 1.0}[self.name]

        def close(self):
            calls.append("closed")

    monkeypatch.setattr(train_step, "Contender", FakeContender)
    row = train_step.sweep(types.SimpleNamespace(rounds=1, profile=""))
    assert row["ms_scan_32_float32"] == 4.0 and row["ratio_torch_over_scan_32_tf32"] == 0.5
    assert row["ratio_torch_over_cudnn_256_float32"] == 2.0 and row["ratio_scan_over_cudnn_1024_float32"] == 4.0
    assert row["failed_1024_tf32"] == "torch ended with status 1" and "ms_scan_1024_tf32" not in row
    assert "ms_cudnn_32_bfloat16" not in row and ("scan", True, 32, "bfloat16", "joined") in calls
    assert "ratio_torch_over_scan_32_tf32" in capsys.readouterr().out
    started = sum(call != "closed" for call in calls)
    assert calls.count("closed") == started - 1  # all but the one that failed


def test_a_sweep_needs_a_gpu(train_step, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "backend_of_jax", lambda: "cpu")
    assert train_step.main(["--sweep"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--sweep" in line and "cpu" in line


@pytest.mark.slow
def test_the_last_line_is_one_flat_json_object():
    """Runs the two contenders that are always installed."""
    command = [sys.executable, "-m", "benchmarks.speed.train_step", "--json", "--short", "--batch_size=2", "--rounds=1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--only", "ours", "flax"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert not [v for v in row.values() if isinstance(v, dict | list)]
    assert row["ratio_flax_over_ours"] == pytest.approx(row["ms_flax"] / row["ms_ours"], rel=1e-3)
    assert 0 < row["share_of_peak"] < 1.1 and row["ms_ours_forward"] < row["ms_ours"]


# ------------------------------------------------------------------------------------------------------------ ablation.py


def scores_of(own_video, other_video, text_error=None):
    """Scores as `ablation.scores_of` gives them: two gap lengths, three clips of two speakers."""
    speakers = ["s1", "s1", "s2"]
    errors = {"own_video": {"300": own_video, "600": [x + 2 for x in own_video]}, "other_video": other_video}
    return {"errors": errors, "text_error": text_error, "speakers": speakers}


def test_a_row_holds_means_and_the_paired_difference(ablation):
    first = scores_of([4.0, 5.0, 9.0], {"300": [8.0] * 3, "600": [10.0] * 3})
    run = scores_of([3.0, 4.0, 8.0], {"300": [8.0] * 3, "600": [8.0] * 3}, text_error=0.25)
    assert ablation.row_of(first, first, unseen=False) == {
        "gap_l1_db": {"300": 6.0, "600": 8.0}, "own_video": 7.0, "other_video": 9.0, "text_error": None, "clips": 3
    }  # fmt: skip
    row = ablation.row_of(run, first, unseen=True)
    assert row["own_video"] == 6.0 and row["text_error"] == 0.25
    assert row["difference"] == [-1.0, -1.0, -1.0]  # every clip is 1 dB better: an interval of width 0


def test_tables_are_written_between_their_marks(ablation):
    row = {"gap_l1_db": {str(ms): 8.0 for ms in ablation.GAPS_MS}, "own_video": 8.0}
    row |= {"other_video": 11.0, "text_error": None, "clips": 100}
    better = row | {"own_video": 7.5, "no_video": 9.25, "video_only": 10.0, "text_error": 0.5}
    better |= {"difference": [-0.5, -0.75, -0.25]}
    run = lambda r, differs: {s: r for s in ablation.SPLITS} | {"differs": differs, "parameters": 4_666_049, "epochs": 8}
    shared = {"preset": "wide", "stack": 2}
    results = {
        "unified": {"single": run(row, {"motion": "pose"}), "u_base": run(row, shared), "u_new": run(better, shared | {"x": 1})}
    }
    page = ablation.page("before\n<!-- unified -->\nold\n<!-- end -->\nafter\n<!-- encoder -->\nstays\n<!-- end -->\n", results)
    assert page.startswith("before\n<!-- unified -->\n\nAll but") and "old" not in page
    assert page.endswith("<!-- end -->\nafter\n<!-- encoder -->\nstays\n<!-- end -->\n")
    assert "All but single: preset=wide, stack=2.\n" in page
    assert "| single | see the text | 4,666,049 | 8 |" in page and "| u_base |  | 4,666,049 | 8 |" in page
    assert "| u_new | x=1 | 4,666,049 | 8 |" in page
    assert page.count("| 7.50 | -0.50 [-0.75, -0.25] | 11.00 | 9.25 | 10.00 | 0.500 |") == 2
    with pytest.raises(SystemExit, match="no place for unified"):
        ablation.page("nothing", results)


def test_the_fields_in_which_a_run_differs_are_listed(ablation, tmp_path):
    from avsi_jax import configs
    from avsi_jax.models import build
    from avsi_jax.training import run_directory

    config = configs.load("tiny")
    first, other = tmp_path / "first", tmp_path / "other"
    for workdir, changes in ((first, {}), (other, {"loss.ctc": 0.5, "data_dir": "elsewhere"})):
        workdir.mkdir()
        config.update_from_flattened_dict(changes)
        (workdir / run_directory.CONFIG).write_text(config.to_json())
        (workdir / run_directory.METRICS).write_text("step,epoch,val_gap_l1_db\n9,1,7.5\n18,2,6.25\n27,3,6.5\n")
    facts = ablation.facts_of(other, first)
    assert facts["differs"] == {"loss.ctc": 0.5}  # the path of the data does not count
    assert facts["epochs"] == 3 and facts["best_val_gap_l1_db"] == 6.25
    assert facts["parameters"] == build.parameter_count(config)


def test_names_of_runs_and_group_are_checked_before_any_evaluation(ablation, tmp_path):
    with pytest.raises(SystemExit, match="same name"):
        ablation.add("unified", [tmp_path / "a" / "run", tmp_path / "b" / "run"], "", "", None)
    with pytest.raises(SystemExit, match="no place for uniform"):
        ablation.add("uniform", [tmp_path / "a"], "", "", None)


def test_missing_arguments_are_reported(ablation, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "add", "unified"])
    with pytest.raises(SystemExit) as left:
        ablation.main()
    assert left.value.code == 2 and "--data_dir" in capsys.readouterr().err
