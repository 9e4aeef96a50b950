"""Real clips -> records: who is in which split, what a record holds, and what the report says."""

import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from avsi_jax import input_pipeline as pipeline
from tfds_grid import clips, prepare, speakers

ROOT = pathlib.Path(__file__).resolve().parent.parent
# bbizzn has a damaged opening, lrae3s 74 pictures, swwp2s a wav
KEPT = {"bbaz5s": "s1", "bbizzn": "s1", "lrae3s": "s1", "swwp2s": "s2", "bbac3n": "s30", "bgbsza": "s26"}
NO_WORDS, RESERVED, BROKEN, EXCLUDED = "bbaz5s", "lwwz2p", "pwij3p", "pwbj8s"


# ------------------------------------------------------------------------------------------------------------------- splits


def ids_of_corpus(n=3000):
    from itertools import product

    from avsi_jax import text

    return ["".join(p) for _, p in zip(range(n), product(*text.SLOTS))]


def test_the_published_speakers_are_unseen():
    # Morrone et al. 2021, section 4.1, and the paper's code: 25 train, 4 validation, 4 test (s21 has no video).
    assert speakers.UNSEEN == {"validation": ("s26", "s27", "s29", "s31"), "test": ("s30", "s32", "s33", "s34")}
    for n in (*range(1, 21), *range(22, 35)):
        split = speakers.split_of("bbaf2n", f"s{n}", "speaker_independent", full_train=True)
        assert split == {26: "validation", 27: "validation", 29: "validation", 31: "validation"}.get(
            n, "test" if n in (30, 32, 33, 34) else "train"
        )


@pytest.mark.parametrize(("protocol", "seen"), [("speaker_independent", "_seen"), ("speaker_dependent", "")])
def test_hashed_shares(protocol, seen):
    found = [speakers.split_of(i, "s5", protocol) for i in ids_of_corpus()]
    assert found == [speakers.split_of(i, "s5", protocol) for i in ids_of_corpus()]
    for split, share in {"train": 0.8, f"validation{seen}": 0.1, f"test{seen}": 0.1}.items():
        assert found.count(split) / len(found) == pytest.approx(share, abs=0.02)


def test_hash_is_sha256_of_the_id():
    for clip_id in ids_of_corpus(200):
        tenth = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big") % 10
        expected = {8: "validation_seen", 9: "test_seen"}.get(tenth, "train")
        assert speakers.split_of(clip_id, "s1", "speaker_independent") == expected


def test_unknown_speakers_are_never_scored():
    assert {speakers.split_of(i, "unknown1", "speaker_independent") for i in ids_of_corpus(200)} == {"train"}


# -------------------------------------------------------------------------------------------------------------------- files


def make(raw, *names):
    for name in names:
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).touch()


def test_files_are_found_by_id(tmp_path):
    make(tmp_path, "s3/video/mpg_6000/bbaf2n.mpg", "audio_25k/s3/bbaf2n.wav", "audio_50k/bbaf2n.wav", "align/bbaf2n.align")
    make(tmp_path, "s10/bbaf3n.MPG", "unknown1/bbaf4n.mpg", ".cache/s1/bbaf5n.mpg", "s10/notes.txt")
    found = speakers.find_clips(tmp_path)
    assert [(c.id, c.speaker) for c in found.clips] == [("bbaf2n", "s3"), ("bbaf3n", "s10"), ("bbaf4n", "unknown1")]
    first = found.clips[0]
    assert (first.sound, first.words) == (tmp_path / "audio_25k/s3/bbaf2n.wav", tmp_path / "align/bbaf2n.align")
    assert found.clips[1].sound is None and found.clips[1].words is None and not found.left_out


def test_what_is_left_out_has_a_reason(tmp_path):
    make(tmp_path, "s4/bbaf2n.mpg", "re-encoded/s4/bbaf2n.mp4", "re-encoded/s4/bbaf3n.mp4", "unknown1/a.mpg", "s4/b.mpg")
    make(tmp_path, "s4/bbaf4n.mpg", "s4/bbaf5n.mpg")
    (tmp_path / "RESERVED.txt").write_text("bbaf4n  # kept for a check\n\n")
    found = speakers.find_clips(tmp_path, exclude=["bbaf5n"])
    assert [c.id for c in found.clips] == ["b", "bbaf2n", "bbaf3n"]
    assert {path: reason.split(",")[0] for path, reason in found.left_out.items()} == {
        "re-encoded/s4/bbaf2n.mp4": "second file of this id",
        "s4/bbaf4n.mpg": "reserved id",
        "s4/bbaf5n.mpg": "reserved id",
        "unknown1/a.mpg": "neither id nor speaker is known",
    }


def test_words_of_an_alignment(tmp_path):
    path = tmp_path / "bbaf2n.align"
    path.write_text("0 23750 sil\n23750 29500 bin\n29500 30000 sp\n30000 34000 blue\n\n34000 74500 sil\n")
    # 23750 = 0.95 s: the corpus' times count 1/25000 s
    bin_, blue = clips.read_words(path)
    assert bin_ == {"word": "bin", "start_s": 0.95, "end_s": 1.18} and blue == {"word": "blue", "start_s": 1.2, "end_s": 1.36}
    assert clips.read_words(None) == []
    path.write_text("0 sil\n")
    with pytest.raises(clips.UnusableClipError, match="'0 sil'"):
        clips.read_words(path)


@pytest.mark.parametrize("lag", [0.0, 176.0, -30.5, 40.25])
def test_lag_is_measured_below_a_sample(lag):
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.normal(size=16_000)) * (np.arange(8_001) < 4_000)  # below 4 kHz, as speech
    turn = np.exp(-2j * np.pi * np.arange(8_001) * lag / 16_000)
    early, late = np.fft.irfft(spectrum), np.fft.irfft(spectrum * turn)
    measured, match = clips.lag_after(late, early[:-500])
    assert measured * 16_000 == pytest.approx(lag, abs=0.05) and match > 0.85
    assert clips.lag_after(rng.normal(size=16_000), early)[1] < 0.2


# ------------------------------------------------------------------------------------------------------------------ command


def run(*args, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "tfds_grid.prepare", *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == code, done.stderr
    return done


def test_help_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert "--builder_config" in run("--help").stdout
        times.append(time.perf_counter() - start)
    assert min(times) < 1  # 0.2 s on an idle machine
    run_code("import sys; from tfds_grid import prepare; assert not {'tensorflow_datasets', 'av', 'cv2'} & set(sys.modules)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--raw={tmp}/none"], "no such folder; expected the unpacked Grid corpus"),
        (["--raw={tmp}"], "found no clip; expected videos such as"),
        (["--raw={tmp}", "--exclude={tmp}/none.txt"], "none.txt: no such file"),
        (["--raw={tmp}", "--workers=0"], "expected both above 0"),
    ],
)
def test_errors_take_one_line(tmp_path, options, message):
    done = run(*[o.format(tmp=tmp_path) for o in options], f"--data_dir={tmp_path / 'data'}", code=2)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("avsi-prepare: ") and message in last and "Traceback" not in done.stderr


def test_missing_tensorflow_names_the_extra(tmp_path, monkeypatch, capsys):
    make(tmp_path, "s1/bbaf2n.mpg")
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # as where it is not installed
    assert prepare.main([f"--raw={tmp_path}", f"--data_dir={tmp_path / 'data'}"]) == 2
    assert 'pip install "avsi_jax[prepare]"' in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------------ records


@pytest.fixture(scope="module")
def raw(grid_dir, tmp_path_factory):
    """Six real clips, one of them with the original wav and one without words, and four that must be left out."""
    raw = tmp_path_factory.mktemp("raw")
    for clip_id, speaker in KEPT.items():
        for name in (f"{speaker}/{clip_id}.mpg", f"alignments/{speaker}/{clip_id}.align", f"audio_25k/{speaker}/{clip_id}.wav"):
            if (grid_dir / name).exists() and not (clip_id == NO_WORDS and name.endswith(".align")):
                (raw / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(grid_dir / name, raw / name)
    for clip_id in (RESERVED, EXCLUDED, BROKEN):
        shutil.copy(raw / "s1/bbaz5s.mpg", raw / f"s1/{clip_id}.mpg")
    (raw / f"s1/{BROKEN}.mpg").write_bytes(b"no video")
    make(raw, "unknown1/unknown1a.mpg")
    (raw / "RESERVED.txt").write_text(f"{RESERVED}\n")
    (raw / "exclude.txt").write_text(f"{EXCLUDED}\n")
    return raw


@pytest.fixture(scope="module")
def data_dir(raw, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    run(f"--raw={raw}", f"--data_dir={data_dir}", "--builder_config=all", f"--exclude={raw / 'exclude.txt'}")
    return data_dir


@pytest.fixture(scope="module")
def folder(data_dir):
    return pipeline.find_dataset(data_dir)


def splits_of(folder):
    return [s["name"] for s in json.loads((folder / "dataset_info.json").read_text())["splits"]]


@pytest.fixture(scope="module")
def examples(folder):
    return {x["id"]: x | {"split": s} for s in splits_of(folder) for x in pipeline.Records(folder, s)}


def test_every_clip_is_in_its_split(examples):
    assert {i: x["speaker"] for i, x in examples.items()} == KEPT
    for clip_id, x in examples.items():
        assert x["split"] == speakers.split_of(clip_id, x["speaker"], "speaker_independent")
    assert examples["bbac3n"]["split"] == "test" and examples["bgbsza"]["split"] == "validation"


@pytest.mark.parametrize("config", prepare.CONFIGS)
def test_no_clip_is_in_two_splits(data_dir, config):
    folder = pipeline.find_dataset(data_dir, config)
    ids = [i for s in splits_of(folder) for i in pipeline.Records(folder, s).clip_ids]
    assert sorted(ids) == sorted(KEPT)


def test_a_record_holds_what_the_design_says(examples):
    for clip_id, x in examples.items():
        frames = 74 if clip_id == "lrae3s" else 75  # grid/README.md
        assert x["landmarks"].shape == (frames, 68, 2) and x["landmarks"].dtype == np.float32
        assert x["landmarks_valid"].shape == (frames,) and x["landmarks_valid"].dtype == bool
        assert (~x["landmarks_valid"]).sum() == (12 if clip_id == "bbizzn" else 0)
        assert x["frame_size"].tolist() == [360, 288] and x["fps"] == 25
        eyes, mouth = x["landmarks"][:, 36:48].mean((0, 1)), x["landmarks"][:, 48:].mean((0, 1))
        assert 100 < eyes[0] < 260 and eyes[1] + 20 < mouth[1] < 288
        assert x["audio"].shape == ((48_000,) if clip_id == "swwp2s" else (47_647,)) and x["audio"].dtype == np.int16


def test_text_and_words(examples):
    x = examples["swwp2s"]
    assert x["text"] == "set white with p two soon"
    # alignments/s2/swwp2s.align: 12250 to 19250 is "set", the last word ends at 55250
    assert x["words"][0] == {"word": "set", "start_s": pytest.approx(0.49), "end_s": pytest.approx(0.77)}
    assert x["words"][-1]["end_s"] == pytest.approx(2.21)
    for clip_id, x in examples.items():
        assert " ".join(w["word"] for w in x["words"]) == ("" if clip_id == NO_WORDS else x["text"])


def test_sound_of_the_video_is_the_mean_of_its_channels(raw, examples):
    import av
    import soxr

    with av.open(str(raw / "s1/bbaz5s.mpg")) as container:
        stereo = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    full_scale = 32_768 if stereo.dtype == np.int16 else 1
    mean = (stereo.astype(np.float64) / full_scale).mean(0).astype(np.float32)
    expected = np.clip(np.rint(32_768.0 * soxr.resample(mean, 44_100, 16_000)), -32_768, 32_767)
    assert np.abs(expected).max() > 1000
    np.testing.assert_allclose(examples["bbaz5s"]["audio"], expected, atol=1)
    assert examples["bbaz5s"]["offset_s"] == np.float32(0.011)  # grid/README.md: the MP2 encoder's delay


def test_sound_of_the_wav_is_in_step_with_the_picture(raw, examples):
    import soundfile
    import soxr

    samples, rate = soundfile.read(raw / "audio_25k/s2/swwp2s.wav", dtype="float32")
    expected = np.clip(np.rint(32_768 * soxr.resample(samples, rate, 16_000)), -32_768, 32_767)
    np.testing.assert_allclose(examples["swwp2s"]["audio"], expected, atol=1)
    assert abs(examples["swwp2s"]["offset_s"]) < 0.0003


def test_mouths_are_kept_apart(data_dir, folder):
    assert "mouth" not in pipeline.Records(folder, "test")[0]
    x = pipeline.Records(pipeline.find_dataset(data_dir, "speaker_independent_mouth"), "test")[0]
    assert x["mouth"].shape == (75, 96, 96) and x["mouth"].dtype == np.uint8
    assert x["mouth"].std(axis=(1, 2)).min() > 5  # a picture, no plain grey


def test_the_report_tells_what_became_of_every_clip(folder):
    report = json.loads((folder / "build_report.json").read_text())
    assert report["clips"] == {"found": 10, "written": 6, "skipped": 4} and report["reserved_ids_left_out"] == 2
    assert sum(report["splits"].values()) == 6 and not set(report["splits"]) & set(report["splits_without_a_clip"])
    assert set(report["splits"]) | set(report["splits_without_a_clip"]) == set(speakers.SPLITS["speaker_independent"])
    assert report["speakers"]["test"] == {"s30": 1}
    assert set(report["skipped_files"]) == {f"s1/{RESERVED}.mpg", f"s1/{EXCLUDED}.mpg", "unknown1/unknown1a.mpg"}
    assert set(report["skipped_clips"]) == {BROKEN}
    assert report["invalid_landmark_frames"] == {"total": 12, "clips": {"bbizzn": 12}}
    assert report["clips_without_words"] == [NO_WORDS] and report["clips_with_wav"] == ["swwp2s"]
    assert report["clips_per_s"] > 0 and report["peak_memory_mb"]["main"] > 100 and len(report["face_models_sha256"]) == 64
    assert report["versions"]["dataset"] == "1.0.0" and "numpy" in report["versions"]


def test_an_existing_dataset_is_kept(raw, data_dir, folder):
    before = {p.name: p.stat().mtime for p in folder.iterdir()}
    done = run(f"--raw={raw}", f"--data_dir={data_dir}", code=2)
    assert "holds a dataset already; --overwrite replaces it" in done.stderr
    assert before == {p.name: p.stat().mtime for p in folder.iterdir()}


def test_a_second_build_gives_the_same_bytes(raw, data_dir, folder, tmp_path):
    """One worker, nothing cached but one clip, another folder."""
    some = next((data_dir / prepare.CACHE).glob("bbaz5s-*.npz"))
    (tmp_path / prepare.CACHE).mkdir()
    shutil.copy(some, tmp_path / prepare.CACHE)
    run(f"--raw={raw}", f"--data_dir={tmp_path}", "--workers=1", f"--exclude={raw / 'exclude.txt'}")
    again = pipeline.find_dataset(tmp_path)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in again.iterdir()) and any("tfrecord" in n for n in names)
    for name in set(names) - {"build_report.json"}:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_killed_build_leaves_nothing_half(raw, tmp_path):
    """Killed while it measures: its workers end too, and what the cache holds can be read."""
    command = [sys.executable, "-m", "tfds_grid.prepare", f"--raw={raw}", f"--data_dir={tmp_path}", "--workers=1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as build:
        while not list(tmp_path.glob(f"{prepare.CACHE}/*.npz")):
            assert build.poll() is None
            time.sleep(0.05)
        build.kill()
        build.stderr.read()  # ends when the last process that holds it has ended
    files = list((tmp_path / prepare.CACHE).glob("*.npz"))
    assert 1 <= len(files) < len(KEPT) and all("landmarks" in clips.load_measured(f) for f in files)
    assert not (tmp_path / "grid").exists()


TFDS_READS = """
import sys
import numpy as np, tensorflow_datasets as tfds
from avsi_jax import input_pipeline as pipeline
builder = tfds.builder_from_directory(sys.argv[1])
assert "Grid" in builder.info.description and builder.info.metadata["full_train"] is False
for split in builder.info.splits:
    ours = pipeline.Records(sys.argv[1], split)
    theirs = list(tfds.as_numpy(builder.as_dataset(split=split, read_config=tfds.ReadConfig(interleave_cycle_length=1))))
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for name in ("audio", "landmarks", "landmarks_valid", "frame_size", "fps", "offset_s"):
            np.testing.assert_array_equal(a[name], b[name])
        assert [a[n].encode() for n in ("id", "speaker", "text")] == [b[n] for n in ("id", "speaker", "text")]
        assert [w["word"].encode() for w in a["words"]] == list(b["words"]["word"])
        np.testing.assert_array_equal([w["end_s"] for w in a["words"]], b["words"]["end_s"])
"""

TFDS_TESTS = """
import sys
import tensorflow_datasets as tfds
from tfds_grid import grid_dataset_builder

class GridTest(tfds.testing.DatasetBuilderTestCase):
    DATASET_CLASS = grid_dataset_builder.Builder
    BUILDER_CONFIG_NAMES_TO_TEST = ["speaker_independent_mouth"]
    EXAMPLE_DIR = sys.argv.pop()
    SPLITS = {SPLITS}
    MOCK_OUT_FORBIDDEN_OS_FUNCTIONS = False  # clips are read by libraries that open files themselves

tfds.testing.test_main()
"""


def run_code(code, *args):
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_tfds_reads_the_same(folder):
    run_code(TFDS_READS, folder)


def test_the_builder_passes_the_tests_of_tfds(raw, folder):
    """Also the way of `tfds build`: no cache, the clips measured by the builder itself, a broken one left out."""
    pytest.importorskip("dill", reason="TFDS's test class needs the package dill")
    splits = {s: len(pipeline.Records(folder, s)) for s in splits_of(folder)}
    # the excluded clip is not excluded here: TFDS's tests know no options
    extra = speakers.split_of(EXCLUDED, "s1", "speaker_independent")
    splits[extra] = splits.get(extra, 0) + 1
    run_code(TFDS_TESTS.replace("{SPLITS}", repr(splits)), raw)
