"""The command avsi-prepare: messages, damaged clips, full disks, archives with swapped folders, own recordings."""

import dataclasses
import json
import shutil
import subprocess
import sys
import zipfile

import pytest
from etils import epath

from avsi_jax.data import input_pipeline as pipeline
from tests.support.dataset_builds import ROOT, make, run, run_code, splits_of
from tfds_grid import clips, measuring, prepare, raw_files, speakers

# ------------------------------------------------------------------------------------------------------------------ command


def test_help_imports_no_heavy_package():
    assert "--builder_config" in run("--help").stdout
    run_code("import sys; from tfds_grid import prepare; assert not {'tensorflow_datasets', 'av', 'cv2'} & set(sys.modules)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--raw={tmp}/none"], "https://doi.org/10.5281/zenodo.3625687"),
        (["--raw={tmp}"], "https://doi.org/10.5281/zenodo.3625687"),
        (["--raw={tmp}", "--layout=zip"], "'zip'"),
        (["--raw={tmp}", "--max_skipped=2"], "--max_skipped=2"),
        (["--raw={tmp}", "--exclude={tmp}/none.txt"], "none.txt"),
        (["--raw={tmp}", "--workers=0"], "--workers=0"),
    ],
)
def test_errors_take_one_line(tmp_path, options, message):
    done = run(*[o.format(tmp=tmp_path) for o in options], f"--data_dir={tmp_path / 'data'}", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("avsi-prepare: ") and message in last and "Traceback" not in done.stderr


def test_missing_tensorflow_names_the_extra(tmp_path, monkeypatch, capsys):
    make(tmp_path, "s1/bbaf2n.mpg")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as if it were not installed
    assert prepare.main([f"--raw={tmp_path}", f"--data_dir={tmp_path / 'data'}"]) == 2
    assert 'pip install "avsi_jax[prepare]"' in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------------- faults


def damage_clips(synthetic_dir, raw):
    """Makes a raw folder of synthetic clips, all but one of them damaged; returns {kind of damage: id}."""
    shutil.copytree(synthetic_dir, raw)
    ids = sorted(p.stem for p in raw.glob("s*/*.mpg"))
    video = {i: next(raw.glob(f"s*/{i}.mpg")) for i in ids}
    audio = {i: next(raw.glob(f"audio_25k/*/{i}.wav")) for i in ids}
    words = {i: next(raw.glob(f"alignments/*/{i}.align")) for i in ids}
    video[ids[0]].write_bytes(b"")
    data = video[ids[1]].read_bytes()
    video[ids[1]].write_bytes(data[: len(data) // 2])
    audio[ids[2]].write_bytes(b"RIFF")
    words[ids[3]].write_text("0 75000 nothing\n")
    video[ids[4]].rename(video[ids[4]].with_name(f"{ids[4]} copy é.mpg"))
    make(raw, "__MACOSX/s1/._x.mpg", "s1/.DS_Store")
    return dict(zip(("zero", "cut", "wav", "words", "name", "undamaged"), ids, strict=True))


@pytest.mark.slow
def test_every_damaged_clip_is_in_the_report(synthetic_dir, tmp_path):
    ids = damage_clips(synthetic_dir, tmp_path / "raw")
    refused = run(f"--raw={tmp_path / 'raw'}", f"--data_dir={tmp_path / 'data'}", code=2).stderr.strip().splitlines()
    assert refused[-1].startswith("avsi-prepare: 2 of 5 clips ") and "--max_skipped=0.02" in refused[-1]
    assert [line.partition(":")[0] for line in refused[-3:-1]] == sorted([ids["zero"], ids["cut"]])
    assert "--max_skipped=0.4" in refused[-1] and not (tmp_path / "data/grid").exists()
    done = run(f"--raw={tmp_path / 'raw'}", f"--data_dir={tmp_path / 'data'}", "--max_skipped=0.4")
    report = json.loads((pipeline.find_dataset(tmp_path / "data") / "build_report.json").read_text())
    assert report["clips"] == {"found": 6, "written": 3, "left_out": 1, "skipped": 2}
    assert set(report["skipped"]) == {ids["zero"], ids["cut"]} and "cut short" in report["skipped"][ids["cut"]]
    assert [place.rpartition("/")[2] for place in report["left_out"]] == [f"{ids['name']} copy é.mpg"]
    assert {kind: list(of_kind) for kind, of_kind in report["notes"].items()} == {
        "wav": [ids["wav"]],
        "words not used": [ids["words"]],
    }
    assert sum(report["clips_without_video"].values()) == 1  # the renamed clip
    assert "1 wav, 1 words not used" in done.stdout


LIMITED = """
import resource, sys
from tfds_grid import clips, measuring, prepare, raw_files, speakers
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "message"), [(100_000, "File too large"), pytest.param(300_000, "records can't be", marks=pytest.mark.slow)]
)
def test_a_full_disk_is_reported(synthetic_dir, tmp_path, limit, message):
    """Files are limited to `limit` bytes: either the cache files of 137,000 bytes fail, or the records."""
    command = [sys.executable, "-c", LIMITED, str(limit), f"--raw={synthetic_dir}", f"--data_dir={tmp_path}", "--workers=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "avsi-prepare: " in last and message in last and str(tmp_path) in last
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.npz.*tmp"))
    with pytest.raises(pipeline.RecordError, match="no records in"):  # nothing that looks like a dataset
        pipeline.find_dataset(tmp_path)


@pytest.mark.slow
def test_a_read_only_data_dir_is_reported(synthetic_dir):
    done = run(f"--raw={synthetic_dir}", "--data_dir=/proc/data", code=2)
    assert "/proc/data" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.slow
def test_swapped_folders_in_zip_files_do_not_change_speakers_or_words(grid_dir, tmp_path):
    """Four real clips; s1.zip holds those of s4 and the reverse, also in alignments.zip."""
    ids = {s: [p.stem for p in sorted(grid_dir.glob(f"{s}/*.mpg"))[:2]] for s in ("s1", "s4")}
    (tmp_path / "raw").mkdir()
    with zipfile.ZipFile(tmp_path / "raw/alignments.zip", "w", zipfile.ZIP_DEFLATED) as words:
        for speaker, other in (("s1", "s4"), ("s4", "s1")):
            with zipfile.ZipFile(tmp_path / f"raw/{other}.zip", "w") as videos:
                for clip_id in ids[speaker]:
                    videos.write(grid_dir / f"{speaker}/{clip_id}.mpg", f"{other}/{clip_id}.mpg")
                    words.write(grid_dir / f"alignments/{speaker}/{clip_id}.align", f"alignments/{other}/{clip_id}.align")
    run(f"--raw={tmp_path / 'raw'}", f"--data_dir={tmp_path / 'zipped'}")
    folder = pipeline.find_dataset(tmp_path / "zipped")
    records = {x["id"]: x for s in splits_of(folder) for x in pipeline.Records(folder, s)}
    assert {i: x["speaker"] for i, x in records.items()} == {i: s for s in ids for i in ids[s]}
    for clip_id, x in records.items():
        lines = [row.split() for row in (grid_dir / f"alignments/{x['speaker']}/{clip_id}.align").read_text().splitlines()]
        times = {word: (int(start) / 25_000, int(end) / 25_000) for start, end, word in lines if word not in ("sil", "sp")}
        assert x["text"].split() == list(times) and len(times) == 6
        assert {w["word"]: (w["start_s"], w["end_s"]) for w in x["words"]} == {w: pytest.approx(t) for w, t in times.items()}
    report = json.loads((folder / "build_report.json").read_text())
    assert report["notes"]["folder"] == {
        i: f"found under {'s4' if s == 's1' else 's1'}, belongs to {s}" for s in ids for i in ids[s]
    } and report["clips"]["skipped"] == 0  # fmt: skip


@pytest.mark.slow
def test_own_recordings_are_built_with_layout_folder(synthetic_dir, tmp_path):
    """Speakers come from the folders, words from a transcript."""
    for n, video in enumerate(sorted(synthetic_dir.glob("s1/*.mpg"))[:2]):
        make(tmp_path, f"raw/Ann A/take {n}.mpg")
        shutil.copy(video, tmp_path / f"raw/Ann A/take {n}.mpg")
    (tmp_path / "raw/Ann A/take 0.txt").write_text("Hello, there!\n")
    run(f"--raw={tmp_path / 'raw'}", f"--data_dir={tmp_path}", "--layout=folder", "--full_train")
    records = {x["id"]: x for x in pipeline.Records(pipeline.find_dataset(tmp_path), "train")}
    assert {i: (x["speaker"], x["text"], x["words"]) for i, x in records.items()} == {
        "Ann A/take 0": ("Ann A", "hello there", []),
        "Ann A/take 1": ("Ann A", "", []),
    }
    (pipeline.find_dataset(tmp_path) / "dataset_info.json").write_text('{"na')  # damaged: readers suggest --overwrite
    (tmp_path / "raw/Ann A/take 1.mpg").unlink()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / ".cache").glob("*.npz")}
    run(f"--raw={tmp_path / 'raw'}", f"--data_dir={tmp_path}", "--layout=folder", "--full_train", "--overwrite")
    assert pipeline.Records(pipeline.find_dataset(tmp_path), "train").clip_ids == ["Ann A/take 0"]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / ".cache").glob("*.npz")}  # nothing measured again


def test_a_clip_that_hangs_its_decoder_is_skipped(synthetic_dir, tmp_path, monkeypatch):
    """A clip takes 0.4 s: with a limit of 0.01 s its process is ended, and the build continues."""
    monkeypatch.setattr(measuring, "CLIP_TIMEOUT_S", 0.01)
    corpus = speakers.find_clips(synthetic_dir, cache=tmp_path)
    corpus = dataclasses.replace(corpus, clips=corpus.clips[:2])
    measured = measuring.measure_all(corpus, tmp_path, mouth=False, workers=1)
    assert [m.id for m in measured] == [c.id for c in corpus.clips]
    unusable = [m.unusable for m in measured if m.path is None]
    assert unusable and all("0.01 s" in reason for reason in unusable)


def test_the_old_dataset_is_restored_if_the_new_build_fails(tmp_path):
    old = epath.Path(tmp_path) / "2.1.0"
    make(old, "records")
    with pytest.raises(OSError, match="full"), prepare.replacing(old):
        assert not old.exists()
        raise OSError("full")
    assert (old / "records").exists() and len(list(tmp_path.iterdir())) == 1
    with prepare.replacing(old):
        make(old, "new")
    assert [p.name for p in old.iterdir()] == ["new"] and len(list(tmp_path.iterdir())) == 1


def test_an_unexpected_error_skips_only_one_clip(synthetic_dir, tmp_path, monkeypatch):
    corpus = speakers.find_clips(synthetic_dir, cache=tmp_path)
    monkeypatch.setattr(clips, "measure", lambda clip, mouth: 1 / 0)
    measured = measuring.measure_one(corpus.clips[0], tmp_path, False)
    assert measured.path is None and "ZeroDivisionError" in measured.unusable
    monkeypatch.setattr(clips, "measure", lambda clip, mouth: (_ for _ in ()).throw(raw_files.DiskFullError("/tmp/x: full")))
    with pytest.raises(OSError, match="/tmp/x: full"):  # the clip may be fine: the build stops
        measuring.measure_one(corpus.clips[0], tmp_path, False)


def test_notes_of_one_kind_are_all_kept():
    measured = measuring.Measured("a", None, notes=("face: two", "face: grey", "wav: none"))
    assert prepare._by_kind([measured]) == {"face": {"a": "two; grey"}, "wav": {"a": "none"}}


@pytest.mark.parametrize("complete", [False, True])
def test_a_dataset_survives_a_build_that_was_killed_and_one_that_fails_after_it(tmp_path, complete):
    """A killed build leaves the dataset before it aside, and its own folder: incomplete, or complete with its report."""
    folder, aside = epath.Path(tmp_path / "2.1.0"), epath.Path(tmp_path / "replaced.2.1.0")
    for path, text in ((folder, "killed"), (aside, "before")):
        path.mkdir()
        (path / "records").write_text(text)
    if complete:
        (folder / "build_report.json").write_text("{}")
    with pytest.raises(OSError), prepare.replacing(folder):
        raise OSError
    assert (folder / "records").read_text() == ("killed" if complete else "before") and not aside.exists()
