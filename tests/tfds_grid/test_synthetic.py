"""The synthetic corpus: reproducible bytes, Grid's layout, a detectable face, lips in sync with the audio, no GPL code loaded.

Needs the extra `synth`. Oracles: OpenCV's and the standard library's readers, the landmark networks, autocorrelation.
"""

import hashlib
import importlib.util
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
MISSING = [name for name in synthetic.REQUIRED_MODULES if importlib.util.find_spec(name) is None]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f'needs {" and ".join(MISSING)}: pip install "avsi_jax[synth]"')
EYES, LIPS = ((36, 42), (42, 48)), ((61, 67), (62, 66), (63, 65))  # iBUG-68: points of each eye, pairs across the inner lips


def command(out, *args):
    return [sys.executable, "-m", "tfds_grid.synthetic", f"--out={out}", *args]


def run(out, *args, **options):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command(out, *args), env=env, capture_output=True, text=True, timeout=120, **options)


def digests(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Two speakers, two clips each, written by two workers. Tests must not change it."""
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    done = run(folder, "--speakers=2", "--clips=2", "--seed=5", "--workers=2")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def track_clip(tmp_path_factory):
    """track_clip(speaker, clip_id) -> the clip, and the landmark Track of its frames as decoded from the .mpg."""
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
def tracked_clips(track_clip):
    """One clip of each speaker, with its Track."""
    return [track_clip(speaker, synthetic.sentences(speaker, 1, 0)[0]) for speaker in synthetic.VOICES]


def lip_distance(points):
    """(T, 68, 2) -> (T,) distance between the lips, relative to the distance of the eyes."""
    left, right = (points[:, slice(*eye)].mean(1) for eye in EYES)
    opening = np.mean([np.linalg.norm(points[:, a] - points[:, b], axis=1) for a, b in LIPS], axis=0)
    return opening / np.linalg.norm(left - right, axis=1)


# ----------------------------------------------------------------------------------------------------------------- files


@needs_extra
@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_for_any_number_of_workers(raw, tmp_path):
    done = run(tmp_path / "one", "--speakers=2", "--clips=2", "--seed=5", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "one") == digests(raw)
    assert "4/4" in done.stderr and "clip/s" in done.stderr  # the progress bar


@needs_extra
def test_files_are_laid_out_as_in_the_zenodo_record(raw):
    names = set(digests(raw))
    wanted = {"README.txt"}
    for speaker in ("s1", "s2"):
        for clip_id in synthetic.sentences(speaker, 2, 5):
            wanted |= {f"{speaker}/{clip_id}.mpg", f"audio_25k/{speaker}/{clip_id}.wav", f"alignments/{speaker}/{clip_id}.align"}
    assert names == wanted and len(names) == 13 and not (raw / synthetic.UNFINISHED).exists()


@needs_extra
def test_video_and_audio_have_grids_formats(raw):
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
def test_words_are_those_of_the_id_and_are_louder_than_the_silence(raw):
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
def test_the_readme_states_versions_licences_and_credits(raw):
    text = (raw / "README.txt").read_text()
    for words in (
        "Synthetic",
        "--speakers=2 --clips=2 --seed=5",
        "espeakng-loader ",
        "GPL-3.0-or-later",
        "Credit: NASA",
        "endorse",
    ):
        assert words in text


@pytest.mark.parametrize("speaker", synthetic.VOICES)
def test_speakers_have_only_their_sentences_in_grid(speaker):
    ids = synthetic.sentences(speaker, 60, 0)
    assert len(set(ids)) == 60 and {grid_ids.speaker_of(i) for i in ids} == {speaker}
    assert set(synthetic.sentences(speaker, 20, 0)) < set(ids)
    assert synthetic.sentences(speaker, 60, 1) != ids == synthetic.sentences(speaker, 60, 0)


@needs_extra
@pytest.mark.slow
def test_a_killed_run_leaves_complete_files_and_can_be_continued(raw, tmp_path):
    out, arguments = tmp_path / "raw", ("--speakers=2", "--clips=2", "--seed=5", "--workers=1")
    process = subprocess.Popen(command(out, *arguments), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    ends = time.monotonic() + 60
    while not list(out.glob("alignments/*/*.align")) and time.monotonic() < ends:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    complete = digests(raw)
    left = {name: digest for name, digest in digests(out).items() if not name.startswith(synthetic.UNFINISHED)}
    assert left and left.items() <= complete.items() and len(left) < len(complete) and "README.txt" not in left
    refused = run(out, "--speakers=2", "--clips=1", "--seed=5")
    assert refused.returncode == 2 and "unfinished run" in refused.stderr
    done = run(out, *arguments)
    assert done.returncode == 0, done.stderr
    assert digests(out) == complete


# ---------------------------------------------------------------------------------------------------------- face and voice


@pytest.mark.slow
def test_the_face_is_detected_in_every_frame(tracked_clips):
    for clip, track in tracked_clips:
        assert track.valid.all() and len(track.valid) == 75 and track.warnings == (), clip.speaker


def test_the_measured_lip_distance_follows_the_mouth_track(tracked_clips):
    """Correlation of the rendered opening with the measured distance, pooled over speakers after normalising each."""
    rendered, measured = [], []
    for clip, track in tracked_clips:
        opening, distance = clip.mouth[:, visemes.OPEN], lip_distance(track.points)
        assert np.corrcoef(opening, distance)[0, 1] >= 0.92, clip.speaker
        rendered.append((opening - opening.mean()) / opening.std())
        measured.append((distance - distance.mean()) / distance.std())
    assert np.corrcoef(np.concatenate(rendered), np.concatenate(measured))[0, 1] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("speaker", synthetic.VOICES)
def test_the_measured_lip_distance_follows_the_mouth_track_over_eight_clips(track_clip, speaker):
    clips = [track_clip(speaker, clip_id) for clip_id in synthetic.sentences(speaker, 8, 1)]
    assert all(track.valid.all() for _, track in clips)
    rendered = np.concatenate([clip.mouth[:, visemes.OPEN] for clip, _ in clips])
    measured = np.concatenate([lip_distance(track.points) for _, track in clips])
    assert np.corrcoef(rendered, measured)[0, 1] >= 0.95


def test_pressed_lips_are_measured_as_closed(tracked_clips):
    pressed = opened = 0
    for clip, track in tracked_clips:
        distance = lip_distance(track.points)
        closed, wide = clip.mouth[:, visemes.PRESS] > 0.95, clip.mouth[:, visemes.OPEN] > 0.4
        threshold = (np.median(distance[:8]) + np.median(distance[wide])) / 2  # between the initial silence and vowels
        assert (distance[closed] < threshold).all() and (distance[wide] > threshold).mean() > 0.9, clip.speaker
        assert set(clip.visemes[closed]) <= {"pbm"}
        pressed, opened = pressed + closed.sum(), opened + wide.sum()
    assert pressed >= 5 and opened >= 20


def test_every_p_b_and_m_is_pressed_in_some_frame(tracked_clips):
    for clip, _ in tracked_clips:
        for start, _, phone in clip.speech.phones:
            if phone.lstrip(visemes.STRESS_MARKS) in ("p", "b", "m"):
                near = np.abs(np.arange(75) / 25 - start + 0.02) < 0.05
                assert clip.mouth[near, visemes.PRESS].max() > 0.7, (clip.id, phone, start)


def test_lips_and_audio_are_synchronous(tracked_clips):
    """The correlation of mouth opening and audio level, over all clips, is highest within one frame of zero lag."""
    lags = range(-6, 7)
    r = np.zeros(len(lags))
    for clip, _ in tracked_clips:
        power = (clip.speech.audio.astype(float) ** 2).reshape(-1, 500).sum(1)  # 20 ms
        level = np.log10(np.maximum(np.convolve(power, np.ones(3) / 3, "same")[::2], 1e4))
        opening = clip.mouth[:, visemes.OPEN]
        r += [np.corrcoef(np.roll(opening, lag), level)[0, 1] for lag in lags]
    assert abs(lags[int(np.argmax(r))]) <= 1 and r.max() / len(tracked_clips) > 0.6


def median_pitch(audio):
    """Median pitch in Hz of the loud parts of 25 kHz audio (N,): highest peak of the autocorrelation, 60 to 400 Hz."""
    frames = np.lib.stride_tricks.sliding_window_view(audio.astype(float), 1500)[::500]
    loud = frames[(frames**2).mean(1) > 0.1 * (frames**2).mean(1).max()]
    autocorrelation = np.fft.irfft(np.abs(np.fft.rfft(loud * np.hanning(1500), 4096)) ** 2)[:, 62:417]
    return 25_000 / np.median(62 + autocorrelation.argmax(1))


@needs_extra
def test_voices_differ_in_pitch():
    """For the same sentence, any two voices are at least 5 % apart in pitch."""
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


def test_the_mouth_track_of_given_phones_has_their_shapes():
    phones = [(0.4, 0.9, "'aI"), (1.0, 1.1, "b"), (1.1, 1.5, "'u:"), (1.5, 1.6, "_:"), (1.6, 1.9, "f")]
    track, names = visemes.mouth_track(phones, np.random.default_rng(0), num_frames=60)
    assert track.shape == (60, 6) and (track >= 0).all() and (track <= 1.01).all()
    at = lambda second: round(second * 25)
    assert (names[:9] == "silent").all() and names[at(0.48)] == "ah" and names[at(0.8)] == "ee"  # both parts of the diphthong
    assert track[at(0.52), visemes.OPEN] > 0.7 and track[at(0.8), visemes.SPREAD] > 0.7
    assert track[at(1.0), visemes.PRESS] > 0.9 and track[at(1.0), visemes.OPEN] < 0.05  # closed before and at the burst
    assert track[at(1.3), visemes.ROUND] > 0.8 and track[at(1.72), visemes.TUCK] > 0.9
    assert np.abs(track[:5]).max() < 0.01


# --------------------------------------------------------------------------------------------------- licence and refusals


@needs_extra
def test_espeak_is_never_loaded_into_our_process(tracked_clips):
    """The fixture has synthesized speech, in a child process."""
    assert "espeakng_loader" not in sys.modules
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists():
        assert "libespeak" not in maps.read_text() and "libc" in maps.read_text()


@pytest.mark.parametrize("module", synthetic.REQUIRED_MODULES)
def test_without_the_extra_the_message_says_what_to_install(module, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    monkeypatch.setattr(synthetic, "_write_all", lambda *_: pytest.fail("continued without it"))
    if MISSING and module != next(iter(MISSING)):
        pytest.skip("the other module is reported first")
    assert synthetic.main([f"--out={tmp_path / 'raw'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert module in line and 'pip install "avsi_jax[synth]"' in line and not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--out"),
        (["--out=x", "--speakers=7"], "--speakers=7"),
        (["--out=x", "--clips=0"], "--clips=0"),
        (["--out=x", "--workers=0"], "--workers=0"),
        (["--out=x", "--seed=-1"], "--seed=-1"),
        (["--out=x", "--seed=a"], "--seed"),
    ],
)
def test_invalid_arguments_end_with_status_2(args, message, capsys):
    with pytest.raises(SystemExit) as stop:
        synthetic.main(args)
    assert stop.value.code == 2 and message in capsys.readouterr().err


@needs_extra
def test_existing_files_are_not_touched(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(synthetic, "_write_all", lambda *_: None)
    (tmp_path / "file").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("dear")
    (tmp_path / "empty").mkdir()
    calls = [
        (["file"], 2, "is a file"),
        (["mine"], 2, "did not write"),
        (["mine", "--overwrite"], 2, "did not write"),
        (["new", "--clips=1001"], 2, "--clips=1001"),
        (["empty", "--speakers=2"], 0, ""),
        (["empty", "--speakers=2"], 2, "--overwrite"),
        (["empty", "--speakers=1", "--overwrite"], 0, ""),
    ]
    for (name, *args), code, message in calls:
        assert synthetic.main([f"--out={tmp_path / name}", "--clips=1", *args]) == code, (name, args)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (1 if message else 0) and message in "".join(lines)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "dear" and not (tmp_path / "new").exists()
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == ["README.txt", "alignments", "audio_25k", "s1"]
