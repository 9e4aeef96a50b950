"""Face landmarks on real Grid clips, checked against visible properties of the frames and against the audio."""

import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest

from avsi_jax.face import landmarks, model_files
from avsi_jax.media import clip_io

INNER_LIPS = (62, 66)  # upper, lower, in the middle
NOSE_TIP = 30


@pytest.fixture(scope="module")
def tracker():
    return landmarks.FaceTracker()


@pytest.fixture(scope="module")
def clean(grid_dir):
    return clip_io.read_clip(grid_dir / "s1" / "bbaz5s.mpg")


@pytest.fixture(scope="module")
def track(tracker, clean):
    return tracker(clean.video.rgb)


def test_the_face_of_a_clean_clip_is_detected_in_every_frame(track):
    assert track.points.shape == (75, 68, 2) and track.points.dtype == np.float32
    assert track.valid.shape == (75,) and track.valid.all() and track.warnings == ()


def test_landmarks_have_the_order_of_ibug(track):
    """Positions relative to each other, left to right and top to bottom in the frame, as in the iBUG-68 scheme."""
    mean = {
        name: track.points[:, part].mean((0, 1))
        for name, part in {
            "brow_left": slice(17, 22), "brow_right": slice(22, 27), "eye_left": slice(36, 42), "eye_right": slice(42, 48),
            "nose": slice(31, 36), "mouth": slice(48, 68), "chin": slice(8, 9),
            "ear_left": slice(0, 1), "ear_right": slice(16, 17),
        }.items()
    }  # fmt: skip
    for left, right in (("ear_left", "eye_left"), ("eye_left", "nose"), ("nose", "eye_right"), ("eye_right", "ear_right")):
        assert mean[left][0] < mean[right][0]
    for upper, lower in (("brow_left", "eye_left"), ("brow_right", "eye_right"), ("eye_left", "nose"), ("nose", "mouth")):
        assert mean[upper][1] < mean[lower][1]
    assert mean["mouth"][1] < mean["chin"][1]


def test_landmarks_lie_on_the_face(clean, track):
    """The wall of the studio is blue and skin is red; the area inside the outline of nose, cheeks and chin is skin."""
    for t in (0, 37, 74):
        rgb, points = clean.video.rgb[t].astype(int), track.points[t]
        inside = np.zeros(rgb.shape[:2], np.uint8)
        cv2.fillConvexPoly(inside, cv2.convexHull(points[2:15].round().astype(np.int32)), 1)
        face = rgb[inside > 0]
        assert (face[:, 0] > face[:, 2]).mean() > 0.95
        x, y = points[NOSE_TIP].round().astype(int)
        assert inside[y, x]


def lip_audio_correlation(clip, points, lag_s):
    """Correlation of the lip opening with the log energy of the audio `lag_s` later, one value per frame."""
    opening = np.linalg.norm(points[:, INNER_LIPS[0]] - points[:, INNER_LIPS[1]], axis=1)
    audio, frame = clip_io.mono(clip.audio.samples), int(clip.audio.rate / clip.video.fps)
    middle = (clip.video.times + clip_io.audio_lag_s(clip) + lag_s) * clip.audio.rate
    starts = (middle - frame / 2).astype(int)
    available = (starts >= 0) & (starts + frame <= len(audio))
    energy = np.array([np.mean(audio[n : n + frame] ** 2) for n in starts[available]])
    return np.corrcoef(opening[available], np.log10(1e-4 + energy))[0, 1]


@pytest.mark.slow
def test_lips_open_with_the_audio(tracker, grid_dir):
    """Mean of eight clips of four different speakers (single clips give 0.3 to 0.7): high in sync, lower 120 ms apart."""
    speakers = [sorted((grid_dir / s).glob("b*.mpg"))[:2] for s in ("s1", "s2", "s31", "s34")]
    clips = [clip_io.read_clip(path) for pair in speakers for path in pair]
    tracked = [(clip, tracker(clip.video.rgb).points) for clip in clips]
    early, now, late = (np.mean([lip_audio_correlation(*pair, lag) for pair in tracked]) for lag in (-0.12, 0.0, 0.12))
    assert now > 0.4 and now > early + 0.05 and now > late + 0.05


def test_corrupt_frames_at_the_start_are_invalid_and_copied_from_the_first_good_one(tracker, grid_dir):
    rgb = clip_io.read_clip(grid_dir / "s1" / "bbizzn.mpg", audio=False).video.rgb
    assert landmarks.count_corrupt_frames(rgb) == 12
    track = tracker(rgb)
    np.testing.assert_array_equal(np.flatnonzero(~track.valid), np.arange(12))
    np.testing.assert_array_equal(track.points[:12], np.repeat(track.points[12:13], 12, 0))
    assert "first 12 frames" in track.warnings[0]


@pytest.mark.slow
def test_exactly_the_known_clips_have_corrupt_frames(grid_dir):
    """The known clips, of which pbio7a stays smeared until its last intra frame, and one other clip per speaker."""
    known = "bbizzn brwa4p brwg8p bwwuzn lgbf8n lrarzn pbio7a pbwx1s prii9a sbbh4p sran9s".split()
    expected = {grid_dir / "s1" / f"{clip_id}.mpg": 72 if clip_id == "pbio7a" else 12 for clip_id in known}
    for speaker in sorted(grid_dir.glob("s*/")):
        others = [path for path in sorted(speaker.glob("*.mpg")) if path not in expected]
        expected.update({path: 0 for path in others[:1]})
    read = {path: clip_io.read_clip(path, audio=False).video.rgb for path in expected if path.exists()}
    assert {path: landmarks.count_corrupt_frames(rgb) for path, rgb in read.items()} == {path: expected[path] for path in read}


def test_cuts_and_black_frames_at_the_start_do_not_count_as_corrupt(clean):
    rgb = clean.video.rgb
    black = np.zeros_like(rgb[:5])
    assert landmarks.count_corrupt_frames(rgb) == 0
    assert landmarks.count_corrupt_frames(np.concatenate([black, rgb])) == 0
    assert landmarks.count_corrupt_frames(np.concatenate([rgb[:30], 255 - rgb[:30], rgb[30:]])) == 0


def test_corrupt_frames_are_not_passed_to_the_networks(tracker, grid_dir, monkeypatch):
    rgb = clip_io.read_clip(grid_dir / "s1" / "bbizzn.mpg", audio=False).video.rgb[:12]
    assert landmarks.count_corrupt_frames(rgb) == 12
    monkeypatch.setattr(landmarks._Model, "__call__", lambda *_: pytest.fail("a corrupt frame reached a network"))
    with pytest.raises(landmarks.NoFaceError, match="12 of them"):
        tracker(rgb)


def test_landmarks_of_frames_without_a_face_are_interpolated(tracker, clean, track):
    rgb = clean.video.rgb[:20].copy()
    rgb[8:12] = 0
    hidden = tracker(rgb)
    np.testing.assert_array_equal(np.flatnonzero(~hidden.valid), np.arange(8, 12))
    part = (np.arange(8, 12) - 7)[:, None, None] / 5
    line = (1 - part) * hidden.points[7] + part * hidden.points[12]
    np.testing.assert_allclose(hidden.points[8:12], line, atol=1e-3)
    assert np.abs(hidden.points[12:] - track.points[12:20]).max() < 5  # detected again at the same position
    assert "4 of 20" in hidden.warnings[0]


def test_landmarks_before_the_first_face_are_copied_from_it(tracker, clean):
    rgb = np.concatenate([np.zeros_like(clean.video.rgb[:4]), clean.video.rgb[:6]])
    track = tracker(rgb)
    assert not track.valid[:4].any() and track.valid[4:].all()
    np.testing.assert_array_equal(track.points[0], track.points[4])


def test_a_small_face_in_a_large_frame_is_detected(tracker, clean, track):
    h, w = clean.video.rgb.shape[1:3]
    rgb = np.full((3, 3 * h, 3 * w, 3), 90, np.uint8)
    rgb[:, h : 2 * h, w : 2 * w] = clean.video.rgb[:3]
    result = tracker(rgb)
    assert result.valid.all()
    assert np.abs(result.points - track.points[:3] - (w, h)).max() < 6


def test_the_larger_of_two_faces_is_tracked_with_a_warning(tracker, clean, track):
    rgb = clean.video.rgb[:30]
    h, w = rgb.shape[1:3]
    pair = np.full((len(rgb), h, 2 * w, 3), 90, np.uint8)
    for t, image in enumerate(rgb):
        pair[t, :, w:] = image
        pair[t, h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] = cv2.resize(image, (w // 2, h // 2))
    result = tracker(pair)
    assert result.valid.all() and len(result.warnings) == 1 and "2 faces" in result.warnings[0]
    assert np.abs(result.points - track.points[:30] - (w, 0)).max() < 6


@pytest.fixture(scope="module")
def beside(tracker, clean, track, grid_dir):
    """Two real clips side by side, s1 on the left, and the landmarks of each clip alone, in the coordinates of the joint frames."""
    other = clip_io.read_clip(grid_dir / "s2" / "bbaf1n.mpg", audio=False).video.rgb[:30]
    pair = np.concatenate([clean.video.rgb[:30], other], axis=2)
    width = np.float32([clean.video.rgb.shape[2], 0])
    return pair, (track.points[:30], tracker(other).points + width)


def swapped(pair):
    """The joint frames with the left and right halves swapped."""
    left, right = np.split(pair, 2, axis=2)
    return np.concatenate([right, left], axis=2)


def test_a_face_is_chosen_by_its_number_from_the_left(tracker, beside):
    pair, alone = beside
    assert pair.shape[1:3] == (288, 720)
    width = np.float32([360, 0])
    for rgb, expected in ((pair, alone), (swapped(pair), (alone[1] - width, alone[0] + width))):
        for face in (0, 1):
            result = tracker(rgb, face=face)
            assert result.valid.all() and np.abs(result.points - expected[face]).max() < 6
            assert f"2 faces detected; number {face} from the left" in result.warnings[0] and len(result.warnings) == 1
    assert "2 faces detected; the largest" in tracker(pair[:3]).warnings[0]


@pytest.mark.parametrize("face", [0, 1])
def test_a_chosen_face_is_resumed_after_being_hidden(tracker, beside, face):
    """Also at the start: faces are counted where both are visible, and the chosen one is tracked backwards from there."""
    pair, alone = beside
    hidden = pair.copy()
    half = slice(360 * face, 360 * (face + 1))
    hidden[:4, :, half] = 0
    hidden[10:20, :, half] = 0
    result = tracker(hidden, face=face)
    np.testing.assert_array_equal(np.flatnonzero(~result.valid), [*range(4), *range(10, 20)])
    assert np.abs(result.points - alone[face])[result.valid].max() < 6
    largest = tracker(hidden).points  # without a choice the visible face is tracked
    assert np.abs(largest[12] - alone[1 - face][12]).max() < 6


def test_a_face_number_that_does_not_exist_is_rejected(tracker, beside, clean, track):
    pair, _ = beside
    np.testing.assert_array_equal(tracker(clean.video.rgb[:5], face=0).points, track.points[:5])
    for rgb, face, message in ((clean.video.rgb[:3], 1, "1 face.* not 1"), (pair[:3], 2, "2 faces")):
        with pytest.raises(ValueError, match=message):
            tracker(rgb, face=face)
    with pytest.raises(ValueError, match="expected a number from 0"):
        tracker(pair[:3], face=-1)
    with pytest.raises(landmarks.NoFaceError):
        tracker(np.full((3, 120, 160, 3), 30, np.uint8), face=1)


def test_clips_without_a_face_are_rejected(tracker):
    with pytest.raises(landmarks.NoFaceError, match="5 frames"):
        tracker(np.full((5, 120, 160, 3), 30, np.uint8))
    with pytest.raises(landmarks.NoFaceError):
        tracker(np.random.default_rng(0).integers(0, 256, (5, 120, 160, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(T, H, W, 3\) uint8"):
        tracker(np.zeros((5, 120, 160, 3), np.float32))


def test_mouth_crops_show_the_mouth_upright(tracker, clean, track):
    """A clip rotated by 15 degrees gives the same crops as the upright one, up to resampling."""
    rgb = clean.video.rgb[::10]
    crops = landmarks.mouth_crops(rgb, track.points[::10])
    assert crops.shape == (8, 96, 96) and crops.dtype == np.uint8
    h, w = rgb.shape[1:3]
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), 15, 1.0)
    turned = np.stack([cv2.warpAffine(image, turn, (w, h), borderMode=cv2.BORDER_REPLICATE) for image in rgb])
    points = track.points[::10] @ turn[:, :2].T.astype(np.float32) + turn[:, 2].astype(np.float32)
    again = landmarks.mouth_crops(turned, points)
    assert np.abs(again.astype(int) - crops).mean() < 3
    with pytest.raises(ValueError, match=r"expected \(8, 68, 2\)"):
        landmarks.mouth_crops(rgb, track.points)


def test_errors_for_altered_and_missing_model_files_name_the_fetch_command(tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(model_files.importlib.resources.files("avsi_jax.face") / "networks", folder)
    assert landmarks.load_models(folder).keys() == model_files.MODEL_SHA256.keys()
    file = folder / landmarks.MESH
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(landmarks.ModelFilesError, match="sha256 .*python -m avsi_jax.landmarks --fetch --model_dir"):
        landmarks.FaceTracker(folder)
    file.unlink()
    with pytest.raises(landmarks.ModelFilesError, match=f"{file}.*--fetch"):
        landmarks.FaceTracker(folder)


def test_fetch_extracts_the_files_from_the_wheel(tmp_path, monkeypatch):
    import zipfile

    wheel, source = tmp_path / "mediapipe.whl", model_files.importlib.resources.files("avsi_jax.face") / "networks"
    with zipfile.ZipFile(wheel, "w") as z:
        for name in model_files.MODEL_SHA256:
            z.writestr(f"mediapipe/modules/any/{name}", (source / name).read_bytes())
    monkeypatch.setattr(model_files, "_download_wheel", lambda folder: wheel)
    assert landmarks.main(["--fetch", "--model_dir", str(tmp_path / "new")]) == 0
    assert {f.name for f in (tmp_path / "new").iterdir()} == set(model_files.MODEL_SHA256)
    with zipfile.ZipFile(wheel, "w") as z:
        for name in model_files.MODEL_SHA256:
            z.writestr(f"mediapipe/modules/any/{name}", b"something else")
    assert landmarks.main(["--fetch", "--model_dir", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_command_line_errors_are_one_line(tmp_path):
    command = [sys.executable, "-m", "avsi_jax.landmarks", "--model_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--fetch" in done.stderr


def test_the_fingerprint_depends_on_the_digests_of_the_files(monkeypatch):
    before = landmarks.model_fingerprint()
    assert len(before) == 64
    monkeypatch.setitem(model_files.MODEL_SHA256, landmarks.MESH, "0" * 64)
    assert landmarks.model_fingerprint() != before
