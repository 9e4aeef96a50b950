"""The build with Apache Beam gives the bytes that avsi-prepare writes. Run by `make test-beam`, in an environment of its own."""

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tfds_grid import beam_build, grid_ids, measuring, speakers

ROOT = Path(__file__).resolve().parents[2]
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="apache-beam is not in this environment: make test-beam"
)
RUNNER = "--runner=FnApiRunner"  # runs in this process; the DirectRunner may download a program first
CLIPS_OF = {"s1": 6, "s2": 1}  # all in a seen split
KINDS = (("", ".mpg"), ("alignments/", ".align"), ("audio_25k/", ".wav"))
BROKEN_SPEAKER = "s26"  # its broken clip is the only one of validation, so that the split is left out
FLAGS = ("--max_skipped=0.2", "--max_shard_mb=0.3")
MAY_DIFFER = {"seconds", "clips_per_s", "peak_memory_mb"}  # in build_report.json


def run(module, *args, code=0, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


def copy_real_clips(grid, raw):
    """Copies clips of the corpus with their words, one of them with the original wav."""
    reserved = speakers.reserved_ids(grid)
    for speaker, count in CLIPS_OF.items():
        names = sorted(p.stem for p in (grid / speaker).glob("*.mpg") if p.stem not in reserved)[:count]
        if speaker == "s2":
            names = sorted(p.stem for p in (grid / "audio_25k" / speaker).glob("*.wav"))[:count]
        assert len(names) == count, f"{grid}: found {len(names)} clips of {speaker}, expected {count}"
        for place in (f"{folder}{speaker}/{n}{end}" for n in names for folder, end in KINDS):
            if (grid / place).is_file():
                (raw / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(grid / place, raw / place)


@pytest.fixture(scope="module")
def raw(request, tmp_path_factory):
    """Seven real clips, or six synthetic ones without the corpus, and one that can't be decoded."""
    raw = tmp_path_factory.mktemp("beam") / "raw"
    try:
        copy_real_clips(request.getfixturevalue("grid_dir"), raw)
    except pytest.skip.Exception:
        shutil.copytree(request.getfixturevalue("synthetic_dir"), raw)
    broken = raw / BROKEN_SPEAKER / f"{grid_ids.ids_of(BROKEN_SPEAKER)[0]}.mpg"
    broken.parent.mkdir()
    broken.write_bytes(b"no video" * 1000)
    return raw


@pytest.fixture(scope="module")
def local(raw, tmp_path_factory):
    """The data_dir of a build of all configs by avsi-prepare."""
    data_dir = tmp_path_factory.mktemp("local")
    run("tfds_grid.prepare", f"--raw={raw}", f"--data_dir={data_dir}", "--builder_config=all", *FLAGS)
    return data_dir


def version_folder(data_dir, config):
    (folder,) = (data_dir / "grid" / config).iterdir()
    return folder


def compare(here, there, *, without=()):
    """Checks that two folders have the same files with the same bytes; returns their names."""
    names = {p.name for p in here.iterdir()} - set(without)
    assert names == {p.name for p in there.iterdir()} - set(without)
    for name in names - {"build_report.json"}:
        assert (here / name).read_bytes() == (there / name).read_bytes(), name
    return names


# ------------------------------------------------------------------------------------------------------------------ records


@needs_beam
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("speaker_independent", []),
        # workers in processes of their own, as on a cluster: all data is serialised
        ("speaker_independent_mouth", ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]),
    ],
)
def test_beam_builds_the_same_bytes(raw, local, tmp_path, config, options):
    flags = (f"--raw={raw}", f"--data_dir={tmp_path}", f"--builder_config={config}", *FLAGS)
    run("tfds_grid.beam_build", *flags, "--", RUNNER, *options)
    here, there = version_folder(local, config), version_folder(tmp_path, config)
    names = compare(here, there)
    assert any("of-0000" in n and not n.endswith("of-00001") for n in names), "no split has several files"
    ours, theirs = (json.loads((folder / "build_report.json").read_text()) for folder in (here, there))
    assert set(ours) == set(theirs) and theirs["clips_per_s"] > 0 and theirs["seconds"].keys() == {"pipeline"}
    assert {k: v for k, v in ours.items() if k not in MAY_DIFFER} == {k: v for k, v in theirs.items() if k not in MAY_DIFFER}
    assert len(theirs["skipped"]) == 1 and "validation" in theirs["splits_without_a_clip"]
    assert len(json.loads((there / "metadata.json").read_text())["train_statistics"]) > 1


@needs_beam
def test_tfds_build_gives_the_same_bytes(raw, tmp_path):
    """`tfds build` measures one clip after the other and writes no report."""
    pytest.importorskip("mlcroissant", reason="the command tfds needs the package mlcroissant: make test-beam")
    valid = shutil.copytree(raw, tmp_path / "raw", ignore=shutil.ignore_patterns(BROKEN_SPEAKER))
    run("tfds_grid.prepare", f"--raw={valid}", f"--data_dir={tmp_path / 'ours'}")
    flags = ("--imports=tfds_grid.grid_dataset_builder", f"--manual_dir={valid}", f"--data_dir={tmp_path / 'theirs'}")
    run("tensorflow_datasets.scripts.cli.main", "build", "grid/speaker_independent", *flags, cwd=tmp_path)
    ours, theirs = (version_folder(tmp_path / who, "speaker_independent") for who in ("ours", "theirs"))
    assert len(compare(ours, theirs, without=["build_report.json"])) >= 4


def measure_or_crash(clip, cache, mouth):
    """Replaces measuring.measure_one in the child process."""
    if clip.id.endswith("n"):
        os.kill(os.getpid(), signal.SIGKILL)
    return measuring.Measured(clip.id, None, unusable="reached")


@needs_beam
def test_a_clip_that_kills_its_process_is_skipped(monkeypatch):
    from tfds_grid import beam_pipeline

    monkeypatch.setattr(measuring, "measure_one", measure_or_crash)
    jobs = [beam_pipeline.Job(speakers.RawClip(i, "s1", None), "train") for i in ("bbaf1s", "bbaf2n", "bbaf3s")]
    results = beam_pipeline.MakeRecords(None, mouth=False, workers=1, code={}).process(jobs)
    unusable = {r.measured.id: r.measured.unusable for r in results}
    assert "SIGKILL" in unusable.pop("bbaf2n")
    assert unusable == {"bbaf1s": "reached", "bbaf3s": "reached"}


@needs_beam
def test_a_worker_with_other_package_versions_is_refused():
    from tfds_grid import beam_pipeline

    code = beam_pipeline.code_here()
    with pytest.raises(RuntimeError, match=rf"av {code['av']}, not 0\.0"):
        beam_pipeline.MakeRecords(None, mouth=False, workers=1, code=code | {"av": "0.0"}).setup()


# ------------------------------------------------------------------------------------------------------------------ command


@needs_beam
def test_too_many_unusable_clips_leave_no_dataset(raw, tmp_path):
    broken = tmp_path / "raw"
    shutil.copytree(raw / BROKEN_SPEAKER, broken / BROKEN_SPEAKER)
    done = run("tfds_grid.beam_build", f"--raw={broken}", f"--data_dir={tmp_path / 'data'}", "--", RUNNER, code=2)
    last = done.stderr.splitlines()[-1]
    assert "1 of 1 clips" in last and "--max_skipped=0.02" in last
    assert not list((tmp_path / "data" / "grid" / "speaker_independent").iterdir())


@needs_beam
def test_errors_take_one_line(raw, local, capsys):
    flags = [f"--raw={raw}", f"--data_dir={local}"]
    for argv, message in {
        (*flags,): "no runner given",
        (*flags, "--", "--parallelism=2"): "-- --runner=DataflowRunner, FlinkRunner, SparkRunner",
        (*flags, "--", RUNNER): "--overwrite",
        (f"--raw={raw}/none", f"--data_dir={local}", "--", RUNNER): "no such folder",
    }.items():
        assert beam_build.main(argv) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("beam_build: ")]
        assert message in line


def test_missing_beam_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)  # as if it were not installed
    assert beam_build.main([f"--raw={tmp_path}", f"--data_dir={tmp_path}", "--", RUNNER]) == 2
    assert 'pip install "avsi_jax[prepare,beam]" -c constraints/beam.txt' in capsys.readouterr().err


def test_help_needs_neither_beam_nor_tensorflow():
    forbidden = "{'apache_beam', 'tensorflow', 'tensorflow_datasets', 'jax'}"
    code = f"import sys; from tfds_grid import beam_build; assert not {forbidden} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    assert "-- BEAM OPTIONS" in run("tfds_grid.beam_build", "--help").stdout


# ------------------------------------------------------------------------------------------------------------- docs and pins


def commands_of(page):
    """The Beam build commands of a docs page, as lists of words."""
    blocks = page.read_text().replace("\\\n", "").split("```")[1::2]
    return [shlex.split(b) for b in blocks if b.strip().startswith("python -m tfds_grid.beam_build") and "RUNNER [" not in b]


@needs_beam
def test_the_commands_in_the_docs_have_only_known_options():
    from apache_beam.options.pipeline_options import PipelineOptions

    commands = commands_of(ROOT / "docs" / "beam.md")
    assert len(commands) == 3
    for words in commands:
        ours, beams = words[: (cut := words.index("--"))], words[cut + 1 :]
        beam_build._parser().parse_args(ours[3:])
        options = PipelineOptions(beams)
        assert options.get_all_options(retain_unknown_options=True).keys() == options.get_all_options().keys(), beams
        assert len(options.get_all_options(drop_default=True)) == len(beams)


def pins_of(name):
    lines = (ROOT / "constraints" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_pins_differ_only_where_beam_requires_it():
    """Records depend on av, opencv, ai-edge-litert and soxr: the same bytes need the same versions."""
    tests, beam = pins_of("tests.txt"), pins_of("beam.txt")
    assert {name for name in tests.keys() & beam.keys() if tests[name] != beam[name]} == {"protobuf"}
    assert int(beam["protobuf"].split(".")[0]) < 7 and "apache-beam" in beam
    assert {"av", "opencv-python-headless", "ai-edge-litert", "soxr", "soundfile", "numpy", "jax", "tensorflow"} <= beam.keys()
