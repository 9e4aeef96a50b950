"""Real clips -> records: the splits, the content of a record, and the report."""

import collections
import hashlib
import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from avsi_jax.data import input_pipeline as pipeline
from tests.support.dataset_builds import ROOT, make, run, run_code, splits_of
from tfds_grid import clips, prepare, speakers

# bbizzn starts with damaged frames, lrae3s has 74 frames, swwp2s has a wav
KEPT = {"bbaz5s": "s1", "bbizzn": "s1", "lrae3s": "s1", "swwp2s": "s2", "bbac3n": "s30", "bgbsza": "s26"}
ALLOW_SKIPPED = ["--max_skipped=0.2"]  # one of seven is broken
NO_WORDS, RESERVED, BROKEN, EXCLUDED = "bbaz5s", "lwwz2p", "pwij3p", "pwbj8s"


# ------------------------------------------------------------------------------------------------------------------- splits


def ids_of_corpus(n=3000):
    from itertools import product

    from avsi_jax.data import grid_text

    return ["".join(p) for _, p in zip(range(n), product(*grid_text.SLOTS))]


def test_the_published_speakers_are_unseen():
    # Morrone et al. 2021, section 4.1, and the paper's code: 25 train, 4 validation, 4 test (s21 has no video).
    assert speakers.UNSEEN == {"validation": ("s26", "s27", "s29", "s31"), "test": ("s30", "s32", "s33", "s34")}
    for n in (*range(1, 21), *range(22, 35)):
        split = speakers.split_of("bbaf2n", f"s{n}", "speaker_independent", full_train=True)
        assert split == {26: "validation", 27: "validation", 29: "validation", 31: "validation"}.get(
            n, "test" if n in (30, 32, 33, 34) else "train"
        )


@pytest.mark.parametrize(("protocol", "seen"), [("speaker_independent", "_seen"), ("speaker_dependent", "")])
def test_hashed_splits_have_shares_of_80_10_and_10(protocol, seen):
    splits = [speakers.split_of(i, "s5", protocol) for i in ids_of_corpus()]
    assert splits == [speakers.split_of(i, "s5", protocol) for i in ids_of_corpus()]
    for split, share in {"train": 0.8, f"validation{seen}": 0.1, f"test{seen}": 0.1}.items():
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.02)


def test_splits_use_the_sha256_of_the_id():
    for clip_id in ids_of_corpus(200):
        tenth = int.from_bytes(hashlib.sha256(clip_id.encode()).digest()[:4], "big") % 10
        expected = {8: "validation_seen", 9: "test_seen"}.get(tenth, "train")
        assert speakers.split_of(clip_id, "s1", "speaker_independent") == expected


def test_unknown_speakers_are_only_in_train():
    assert {speakers.split_of(i, "unknown1", "speaker_independent") for i in ids_of_corpus(200)} == {"train"}


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
    run(f"--raw={raw}", f"--data_dir={data_dir}", "--builder_config=all", *ALLOW_SKIPPED, f"--exclude={raw / 'exclude.txt'}")
    return data_dir


@pytest.fixture(scope="module")
def folder(data_dir):
    return pipeline.find_dataset(data_dir)


@pytest.fixture(scope="module")
def examples(folder):
    return {x["id"]: x | {"split": s} for s in splits_of(folder) for x in pipeline.Records(folder, s)}


def test_every_clip_is_in_the_right_split(examples):
    assert {i: x["speaker"] for i, x in examples.items()} == KEPT
    for clip_id, x in examples.items():
        assert x["split"] == speakers.split_of(clip_id, x["speaker"], "speaker_independent")
    assert examples["bbac3n"]["split"] == "test" and examples["bgbsza"]["split"] == "validation"


@pytest.mark.parametrize("config", prepare.CONFIGS)
def test_no_clip_is_in_two_splits(data_dir, config):
    folder = pipeline.find_dataset(data_dir, config)
    ids = [i for s in splits_of(folder) for i in pipeline.Records(folder, s).clip_ids]
    assert sorted(ids) == sorted(KEPT)


def test_records_have_the_documented_shapes_and_types(examples):
    for clip_id, x in examples.items():
        frames = 74 if clip_id == "lrae3s" else 75  # grid/README.md
        assert x["landmarks"].shape == (frames, 68, 2) and x["landmarks"].dtype == np.float32
        assert x["landmarks_valid"].shape == (frames,) and x["landmarks_valid"].dtype == bool
        assert (~x["landmarks_valid"]).sum() == (12 if clip_id == "bbizzn" else 0)
        assert x["frame_size"].tolist() == [360, 288] and x["fps"] == 25
        eyes, mouth = x["landmarks"][:, 36:48].mean((0, 1)), x["landmarks"][:, 48:].mean((0, 1))
        assert 100 < eyes[0] < 260 and eyes[1] + 20 < mouth[1] < 288
        assert x["audio"].shape == ((48_000,) if clip_id == "swwp2s" else (47_647,)) and x["audio"].dtype == np.int16


def test_records_have_text_and_timed_words(examples):
    x = examples["swwp2s"]
    assert x["text"] == "set white with p two soon"
    # alignments/s2/swwp2s.align: 12250 to 19250 is "set", the last word ends at 55250
    assert x["words"][0] == {"word": "set", "start_s": pytest.approx(0.49), "end_s": pytest.approx(0.77)}
    assert x["words"][-1]["end_s"] == pytest.approx(2.21)
    for clip_id, x in examples.items():
        assert " ".join(w["word"] for w in x["words"]) == ("" if clip_id == NO_WORDS else x["text"])


def test_audio_of_the_video_is_the_mean_of_its_channels(raw, examples):
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


def test_audio_of_the_wav_has_no_offset_to_the_video(raw, examples):
    import soundfile
    import soxr

    samples, rate = soundfile.read(raw / "audio_25k/s2/swwp2s.wav", dtype="float32")
    expected = np.clip(np.rint(32_768 * soxr.resample(samples, rate, 16_000)), -32_768, 32_767)
    np.testing.assert_allclose(examples["swwp2s"]["audio"], expected, atol=1)
    assert abs(examples["swwp2s"]["offset_s"]) < 0.0003


def test_mouth_crops_are_only_in_the_mouth_configs(data_dir, folder):
    assert "mouth" not in pipeline.Records(folder, "test")[0]
    folder = pipeline.find_dataset(data_dir, "speaker_independent_mouth")
    x = pipeline.Records(folder, "test")[0]
    assert "mouth" not in pipeline.Records(folder, "test", mouth=False)[0]
    assert x["mouth"].shape == (75, 96, 96) and x["mouth"].dtype == np.uint8
    assert x["mouth"].std(axis=(1, 2)).min() > 5  # an image, not plain grey


def test_the_report_lists_the_result_for_every_clip(folder):
    report = json.loads((folder / "build_report.json").read_text())
    assert report["clips"] == {"found": 10, "written": 6, "left_out": 3, "skipped": 1} and report["reserved_ids_left_out"] == 2
    assert sum(report["splits"].values()) == 6 and not set(report["splits"]) & set(report["splits_without_a_clip"])
    assert set(report["splits"]) | set(report["splits_without_a_clip"]) == set(speakers.SPLITS["speaker_independent"])
    assert report["speakers"]["test"] == {"s30": 1}
    assert set(report["left_out"]) == {f"s1/{RESERVED}.mpg", f"s1/{EXCLUDED}.mpg", "unknown1/unknown1a.mpg"}
    assert set(report["skipped"]) == {BROKEN} and report["notes"]["frames"] == {"lrae3s": "74, not 75"}
    assert set(report["notes"]["face"]) == {"bbizzn"}
    assert report["invalid_landmark_frames"] == {"total": 12, "clips": {"bbizzn": 12}}
    assert report["clips_without_words_file"] == [NO_WORDS] and report["clips_with_wav"] == ["swwp2s"]
    assert report["clips_per_s"] > 0 and report["peak_memory_mb"]["main"] > 100 and len(report["face_models_sha256"]) == 64
    assert report["versions"]["dataset"] == "2.1.0" and "numpy" in report["versions"]


def test_an_existing_dataset_is_kept_without_overwrite(raw, data_dir, folder):
    before = {p.name: p.stat().mtime for p in folder.iterdir()}
    done = run(f"--raw={raw}", f"--data_dir={data_dir}", *ALLOW_SKIPPED, code=2)
    assert "--overwrite" in done.stderr
    assert before == {p.name: p.stat().mtime for p in folder.iterdir()}


@pytest.mark.slow
def test_a_second_build_gives_the_same_bytes(raw, data_dir, folder, tmp_path):
    """With one worker, one cached clip, in another folder."""
    cached = next((data_dir / prepare.CACHE).glob("bbaz5s-*.npz"))
    (tmp_path / prepare.CACHE).mkdir()
    shutil.copy(cached, tmp_path / prepare.CACHE)
    run(f"--raw={raw}", f"--data_dir={tmp_path}", "--workers=1", *ALLOW_SKIPPED, f"--exclude={raw / 'exclude.txt'}")
    again = pipeline.find_dataset(tmp_path)
    names = sorted(p.name for p in folder.iterdir())
    assert names == sorted(p.name for p in again.iterdir()) and any("tfrecord" in n for n in names)
    for name in set(names) - {"build_report.json"}:
        assert (folder / name).read_bytes() == (again / name).read_bytes(), name


def test_a_killed_build_leaves_no_partial_files(raw, tmp_path):
    """Killed while it measures: its workers end too, and the files in the cache can be read."""
    command = [sys.executable, "-m", "tfds_grid.prepare", f"--raw={raw}", f"--data_dir={tmp_path}", "--workers=1"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as build:
        while not list(tmp_path.glob(f"{prepare.CACHE}/*.npz")):
            assert build.poll() is None
            time.sleep(0.05)
        build.kill()
        build.stderr.read()  # returns when the last process that holds the pipe has ended
    files = list((tmp_path / prepare.CACHE).glob("*.npz"))
    assert 1 <= len(files) < len(KEPT) and all("landmarks" in clips.load_measured(f) for f in files)
    assert not (tmp_path / "grid").exists()


# ---------------------------------------------------------------------------------------------------------------------- tfds


TFDS_READS = """
import sys
import numpy as np, tensorflow_datasets as tfds
from avsi_jax.data import input_pipeline as pipeline
builder = tfds.builder_from_directory(sys.argv[1])
assert "Grid" in builder.info.description and builder.info.metadata["full_train"] is False and len(builder.info.citation) > 99
assert "CC BY 4.0" in builder.info.redistribution_info.license
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


@pytest.mark.slow
def test_tfds_and_our_reader_give_the_same_records(folder):
    run_code(TFDS_READS, folder)


@pytest.mark.slow
def test_the_builder_passes_the_tests_of_tfds(synthetic_dir):
    """On synthetic data, as `tfds build` does it: no cache, the builder measures the clips itself."""
    pytest.importorskip("dill", reason="TFDS's test class needs the package dill")
    splits = (speakers.split_of(p.stem, p.parent.name, "speaker_independent") for p in synthetic_dir.glob("s*/*.mpg"))
    run_code(TFDS_TESTS.replace("{SPLITS}", repr(dict(collections.Counter(splits)))), synthetic_dir)
