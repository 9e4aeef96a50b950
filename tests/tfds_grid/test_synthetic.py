"""The synthetic corpus: the same bytes again, Grid's layout, a face that is found, lips that say what is heard, no GPL code in us.

Needs the extra `synth`. Oracles: OpenCV's and the standard library's readers, the landmark networks, autocorrelation.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import wave

import numpy as np
import pytest

from avsi_jax.data import grid_text
from avsi_jax.media import clip_io, grid_mpeg
from tfds_grid import grid_ids, synthetic, visemes

ROOT = pathlib.Path(__file__).resolve().parents[2]
MISSING = [name for name in synthetic.NEEDED if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f'needs {" and ".join(MISSING)}: pip install "avsi_jax[synth]"')
EYES, LIPS = ((36, 42), (42, 48)), ((61, 67), (62, 66), (63, 65))  # iBUG-68: each eye's points, pairs across the lips' inside


def command(out, *args):
    return [sys.executable, "-m", "tfds_grid.synthetic", f"--out={out}", *args]


def run(out, *args, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(out, *args), env=env, capture_output=True, text=True, timeout=120, **options)


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two speakers, two clips each, by two workers. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    done = run(folder, "--speakers=2", "--clips=2", "--seed=5", "--workers=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """follow(speaker, clip_id) -> the clip, and the landmark networks' Track of its pictures as they come out of the .mpg."""
    if MISSING:
        pytest.skip("needs the extra synth")
    from avsi_jax.face import landmarks

    tracker, path = landmarks.FaceTracker(), tmp_path_factory.mktemp("mpeg") / "clip.mpg"

    def one(speaker, clip_id):
        clip = synthetic.make_clip(speaker, clip_id, 0)
        grid_mpeg.write_clip(path, clip.video, visemes.FPS, clip.speech.audio, synthetic.RATE)
        return clip, tracker(clip_io.read_clip(path).video.rgb)

    return one


@pytest.fixture(scope="module")
def followed(follow):
    """A clip of each speaker."""
    return [follow(speaker, synthetic.sentences(speaker, 1, 0)[0]) for speaker in synthetic.VOICES]


def lip_gap(points):
    """(T, 68, 2) -> (T,) opening between the lips over the distance of the eyes."""
    left, right = (points[:, slice(*eye)].mean(1) for eye in EYES)
    gap = np.mean([np.linalg.norm(points[:, a] - points[:, b], axis=1) for a, b in LIPS], axis=0)
    return gap / np.linalg.norm(left - right, axis=1)


# ----------------------------------------------------------------------------------------------------------------- files


@needs_extra
def test_same_seed_same_bytes_whatever_the_workers(raw, tmp_path):
    done = run(tmp_path / "one", "--speakers=2", "--clips=2", "--seed=5", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "one") == digests(raw)
    assert "4/4" in done.stderr and "clip/s" in done.stderr  # the progress bar


@needs_extra
def test_files_lie_as_in_the_zenodo_record(raw):
    names = set(digests(raw))
    wanted = {"README.txt"}
    for speaker in ("s1", "s2"):
        for clip_id in synthetic.sentences(speaker, 2, 5):
            wanted |= {f"{speaker}/{clip_id}.mpg", f"audio_25k/{speaker}/{clip_id}.wav", f"alignments/{speaker}/{clip_id}.align"}
    assert names == wanted and len(names) == 13 and not (raw / synthetic.UNFINISHED).exists()


@needs_extra
def test_video_and_audio_are_of_grids_kind(raw):
    import cv2

    for path in sorted(raw.glob("s?/*.mpg")):
        reader = cv2.VideoCapture(str(path))
        assert reader.get(cv2.CAP_PROP_FPS) == 25
        shapes = []
        while (image := reader.read())[0]:
            shapes.append(image[1].shape)
        assert shapes == [(288, 360, 3)] * 75
        with wave.open(str(raw / "audio_25k" / path.parent.name / f"{path.stem}.wav")) as audio:
            assert (audio.getframerate(), audio.getnchannels(), audio.getsampwidth(), audio.getnframes()) == (25_000, 1, 2, 75_000)
            samples = np.frombuffer(audio.readframes(75_000), "<i2")
        assert 3000 < np.abs(samples).max() < 32767


@needs_extra
def test_words_are_those_of_the_id_and_lie_where_it_is_loud(raw):
    for path in sorted(raw.glob("alignments/*/*.align")):
        rows = [line.split() for line in path.read_text().splitlines()]
        edges = [int(start) for start, _, _ in rows] + [int(rows[-1][1])]
        assert [int(end) for _, end, _ in rows] == edges[1:] and edges[0] == 0 and edges[-1] == 75_000
        assert (np.diff(edges) > 25_000 * 0.04).all()
        assert [word for *_, word in rows] == ["sil", *grid_text.words_of(path.stem), "sil"]
        with wave.open(str(raw / "audio_25k" / path.parent.name / f"{path.stem}.wav")) as audio:
            level = np.abs(np.frombuffer(audio.readframes(75_000), "<i2").astype(float))
        loud = [level[start:end].mean() for start, end in zip(edges[:-1], edges[1:])]
        assert max(loud[0], loud[-1]) * 10 < min(loud[1:-1])


@needs_extra
def test_a_build_finds_every_clip_with_its_speaker(raw, tmp_path):
    from tfds_grid import speakers

    corpus = speakers.find_clips(raw, cache=tmp_path)
    wanted = {(clip_id, speaker) for speaker in ("s1", "s2") for clip_id in synthetic.sentences(speaker, 2, 5)}
    assert {(clip.id, clip.speaker) for clip in corpus.clips} == wanted
    assert all(clip.video and clip.audio and clip.words for clip in corpus.clips)


@needs_extra
def test_readme_says_what_it_is(raw):
    said = (raw / "README.txt").read_text()
    for words in (
        "Synthetic",
        "--speakers=2 --clips=2 --seed=5",
        "espeakng-loader ",
        "GPL-3.0-or-later",
        "Credit: NASA",
        "endorse",
    ):
        assert words in said


@pytest.mark.parametrize("speaker", synthetic.VOICES)
def test_a_speaker_says_only_what_is_his_in_grid(speaker):
    ids = synthetic.sentences(speaker, 60, 0)
    assert len(set(ids)) == 60 and {grid_ids.speaker_of(i) for i in ids} == {speaker}
    assert set(synthetic.sentences(speaker, 20, 0)) < set(ids)
    assert synthetic.sentences(speaker, 60, 1) != ids == synthetic.sentences(speaker, 60, 0)


@needs_extra
def test_a_killed_run_leaves_whole_files_and_is_completed(raw, tmp_path):
    out, arguments = tmp_path / "raw", ("--speakers=2", "--clips=2", "--seed=5", "--workers=1")
    process = subprocess.Popen(command(out, *arguments), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not list(out.glob("alignments/*/*.align")) and time.monotonic() < ends:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = digests(raw)
    left = {name: digest for name, digest in digests(out).items() if not name.startswith(synthetic.UNFINISHED)}
    assert left and left.items() <= whole.items() and len(left) < len(whole) and "README.txt" not in left
    refused = run(out, "--speakers=2", "--clips=1", "--seed=5")
    assert refused.returncode == 2 and "unfinished run of other arguments" in refused.stderr
    done = run(out, *arguments)
    assert done.returncode == 0, done.stderr
    assert digests(out) == whole


# ---------------------------------------------------------------------------------------------------------- face and voice


def test_the_face_is_found_in_every_frame(followed):
    for clip, track in followed:
        assert track.valid.all() and len(track.valid) == 75 and track.warnings == (), clip.speaker


def test_the_measured_mouth_opens_as_it_was_told(followed):
    """r of the driving opening with the measured gap, all speakers pooled; each one's own closed gap and scale are taken out."""
    told, seen = [], []
    for clip, track in followed:
        driving, gap = clip.mouth[:, visemes.OPEN], lip_gap(track.points)
        assert np.corrcoef(driving, gap)[0, 1] >= 0.92, clip.speaker
        told.append((driving - driving.mean()) / driving.std())
        seen.append((gap - gap.mean()) / gap.std())
    assert np.corrcoef(np.concatenate(told), np.concatenate(seen))[0, 1] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("speaker", synthetic.VOICES)
def test_the_mouth_is_measured_as_told_over_many_clips(follow, speaker):
    """r of all pictures of eight clips, as they are."""
    clips = [follow(speaker, clip_id) for clip_id in synthetic.sentences(speaker, 8, 1)]
    assert all(track.valid.all() for _, track in clips)
    told = np.concatenate([clip.mouth[:, visemes.OPEN] for clip, _ in clips])
    seen = np.concatenate([lip_gap(track.points) for _, track in clips])
    assert np.corrcoef(told, seen)[0, 1] >= 0.95


def test_pressed_lips_are_seen_shut(followed):
    pressed = opened = 0
    for clip, track in followed:
        gap = lip_gap(track.points)
        shut, wide = clip.mouth[:, visemes.PRESS] > 0.95, clip.mouth[:, visemes.OPEN] > 0.4
        between = (np.median(gap[:8]) + np.median(gap[wide])) / 2  # of the first silence and of vowels
        assert (gap[shut] < between).all() and (gap[wide] > between).mean() > 0.9, clip.speaker
        assert set(clip.visemes[shut]) <= {"pbm"}
        pressed, opened = pressed + shut.sum(), opened + wide.sum()
    assert pressed >= 5 and opened >= 20


def test_every_p_b_and_m_is_pressed_in_some_frame(followed):
    for clip, _ in followed:
        for start, _, phone in clip.speech.phones:
            if phone.lstrip(visemes.STRESS_MARKS) in ("p", "b", "m"):
                near = np.abs(np.arange(75) / 25 - start + 0.02) < 0.05
                assert clip.mouth[near, visemes.PRESS].max() > 0.7, (clip.id, phone, start)


def test_lips_and_audio_belong_together(followed):
    """Opening against the level of the sound, all clips: best where neither is shifted by more than a picture."""
    lags = range(-6, 7)
    r = np.zeros(len(lags))
    for clip, _ in followed:
        power = (clip.speech.audio.astype(float) ** 2).reshape(-1, 500).sum(1)  # 20 ms
        level = np.log10(np.maximum(np.convolve(power, np.ones(3) / 3, "same")[::2], 1e4))
        opening = clip.mouth[:, visemes.OPEN]
        r += [np.corrcoef(np.roll(opening, lag), level)[0, 1] for lag in lags]
    assert abs(lags[int(np.argmax(r))]) <= 1 and r.max() / len(followed) > 0.6


def median_pitch(audio):
    """Hz, of the louder half-second or so of 25 kHz sound (N,): the highest peak of the autocorrelation, 60 to 400 Hz."""
    frames = np.lib.stride_tricks.sliding_window_view(audio.astype(float), 1500)[::500]
    loud = frames[(frames**2).mean(1) > 0.1 * (frames**2).mean(1).max()]
    likeness = np.fft.irfft(np.abs(np.fft.rfft(loud * np.hanning(1500), 4096)) ** 2)[:, 62:417]
    return 25_000 / np.median(62 + likeness.argmax(1))


@needs_extra
def test_voices_differ():
    """The same sentence, said by each: every two are at least 5 % apart in pitch."""
    pitch = {
        speaker: median_pitch(synthetic.speak(speaker, "bbaf2n", np.random.default_rng(0)).audio) for speaker in synthetic.VOICES
    }
    order = sorted(pitch, key=pitch.get)
    assert order == ["s5", "s1", "s3", "s2", "s4", "s6"]
    assert all(pitch[b] / pitch[a] > 1.05 for a, b in zip(order[:-1], order[1:])), pitch


@needs_extra
@pytest.mark.parametrize("speaker", ["s1", "s3", "s4", "s5"])  # one of each accent
def test_every_word_is_one_word_and_every_phone_has_a_viseme(speaker):
    rng = np.random.default_rng(0)
    slots = [list(slot) for slot in grid_text.SLOTS]
    for i in range(25):  # all 51 words
        speech = synthetic.speak(speaker, "".join(slot[i % len(slot)] for slot in slots), rng)
        names = {name.lstrip(visemes.STRESS_MARKS) for *_, name in speech.phones}
        assert {n for n in names if not n.startswith("_")} - {";"} <= set(visemes.VISEMES_OF_PHONE)


def test_mouth_track_of_made_up_phones():
    phones = [(0.4, 0.9, "'aI"), (1.0, 1.1, "b"), (1.1, 1.5, "'u:"), (1.5, 1.6, "_:"), (1.6, 1.9, "f")]
    track, names = visemes.mouth_track(phones, np.random.default_rng(0), num_frames=60)
    assert track.shape == (60, 6) and (track >= 0).all() and (track <= 1.01).all()
    at = lambda second: round(second * 25)
    assert (names[:9] == "silent").all() and names[at(0.48)] == "ah" and names[at(0.8)] == "ee"  # the diphthong's two halves
    assert track[at(0.52), visemes.OPEN] > 0.7 and track[at(0.8), visemes.SPREAD] > 0.7
    assert track[at(1.0), visemes.PRESS] > 0.9 and track[at(1.0), visemes.OPEN] < 0.05  # shut before the burst and at it
    assert track[at(1.3), visemes.ROUND] > 0.8 and track[at(1.72), visemes.TUCK] > 0.9
    assert np.abs(track[:5]).max() < 0.01


# --------------------------------------------------------------------------------------------------- licence and refusals


@needs_extra
def test_espeak_is_never_loaded_into_our_process(followed):
    """It has spoken (followed), elsewhere."""
    assert "espeakng_loader" not in sys.modules
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists():
        assert "libespeak" not in maps.read_text() and "libc" in maps.read_text()


@pytest.mark.parametrize("module", synthetic.NEEDED)
def test_without_the_extra_one_line_says_what_to_install(module, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    monkeypatch.setattr(synthetic, "_write_all", lambda *_: pytest.fail("goes on without it"))
    if MISSING and module != next(iter(MISSING)):
        pytest.skip("the other one is told first")
    assert synthetic.main([f"--out={tmp_path / 'raw'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert module in line and 'pip install "avsi_jax[synth]"' in line and not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "--out"),
        (["--out=x", "--speakers=7"], "--speakers=7: expected 1 to 6"),
        (["--out=x", "--clips=0"], "--clips=0"),
        (["--out=x", "--workers=0"], "--workers=0"),
        (["--out=x", "--seed=-1"], "--seed=-1"),
        (["--out=x", "--seed=a"], "invalid int"),
    ],
)
def test_wrong_arguments(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic.main(args)
    assert stop.value.code == 2 and says in capsys.readouterr().err


@needs_extra
def test_what_is_there_is_not_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "_write_all", lambda *_: None)
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    calls = [
        (["file"], 2, "is a file"),
        (["mine"], 2, "files that are not of this program"),
        (["mine", "--overwrite"], 2, "files that are not of this program"),
        (["new", "--clips=1001"], 2, "expected at most so many"),
        (["empty", "--speakers=2"], 0, ""),
        (["empty", "--speakers=2"], 2, "a synthetic corpus already; --overwrite replaces it"),
        (["empty", "--speakers=1", "--overwrite"], 0, ""),
    ]
    for (name, *args), code, says in calls:
        assert synthetic.main([f"--out={tmp_path / name}", "--clips=1", *args]) == code, (name, args)
        told = capsys.readouterr().err.splitlines()
        assert len(told) == (1 if says else 0) and says in "".join(told)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "dear" and not (tmp_path / "new").exists()
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["README.txt", "alignments", "audio_25k", "s1"]


# ------------------------------------------------------------------------------------------------------------- make demo


def summary_with(gains):
    """An evaluation's summary in which av_mtl_s2s is better than a_si by so many dB at each length."""
    table = [
        {"system": system, "gap_ms": ms, "metric": "gap_l1_db", "mean": 12.0 - gain * (system == "av_mtl_s2s")}
        for ms, gain in gains.items()
        for system in ("a_si", "av_mtl_s2s")
    ]
    pair = {"a": "av_mtl_s2s", "b": "a_si", "metric": "gap_l1_db"}
    paired = [pair | {"gap_ms": ms, "mean": -gain, "low": -gain - 1, "high": -gain + 1} for ms, gain in gains.items()]
    return {"table": table, "paired": paired, "num_clips": 30, "split": "test_seen"}


@pytest.mark.parametrize(
    ("gains", "code"),
    [({300: -1, 600: 3, 1500: 2}, 0), ({300: 1, 600: 3, 1500: -2}, 1), ({600: float("nan")}, 1), ({300: 1}, 1), ({}, 1)],
)
def test_the_demo_fails_where_the_lips_do_not_help(gains, code, tmp_path):
    script = (ROOT / "launch" / "demo.sh").read_text()
    compare = script[script.index("compare() {") : script.index("\n}\n", script.index("compare() {")) + 3]
    (tmp_path / "summary.json").write_text(json.dumps(summary_with(gains)))
    env = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", "-c", f"{compare}compare summary.json must"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("expected it to be" in done.stderr) == bool(code)
    if 600 in gains and gains[600] == 3:
        assert " 600 ms   12.00         9.00    3.00   2.00 to 4.00" in done.stdout
