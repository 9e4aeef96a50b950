"""avsi_jax.landmarks on real Grid clips: what a viewer sees in them, and the sound, are the oracles."""

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


def test_clean_clip_is_seen_in_every_frame(track):
    assert track.points.shape == (75, 68, 2) and track.points.dtype == np.float32
    assert track.valid.shape == (75,) and track.valid.all() and track.warnings == ()


def test_points_have_the_order_of_ibug(track):
    """Left of the picture to its right, top to bottom, as the iBUG-68 drawing has them."""
    mean = {
        name: track.points[:, part].mean((0, 1))
        for name, part in {
            "brow_left": slice(17, 22), "brow_right": slice(22, 27), "eye_left": slice(36, 42), "eye_right": slice(42, 48),
            "nose": slice(31, 36), "lips": slice(48, 68), "chin": slice(8, 9),
            "ear_left": slice(0, 1), "ear_right": slice(16, 17),
        }.items()
    }  # fmt: skip
    for left, right in (("ear_left", "eye_left"), ("eye_left", "nose"), ("nose", "eye_right"), ("eye_right", "ear_right")):
        assert mean[left][0] < mean[right][0]
    for upper, lower in (("brow_left", "eye_left"), ("brow_right", "eye_right"), ("eye_left", "nose"), ("nose", "lips")):
        assert mean[upper][1] < mean[lower][1]
    assert mean["lips"][1] < mean["chin"][1]


def test_points_lie_on_the_face(clean, track):
    """Oracle: the studio's wall is blue, skin is red; the inside of the outline at nose, cheeks and chin is skin."""
    for t in (0, 37, 74):
        rgb, points = clean.video.rgb[t].astype(int), track.points[t]
        inside = np.zeros(rgb.shape[:2], np.uint8)
        cv2.fillConvexPoly(inside, cv2.convexHull(points[2:15].round().astype(np.int32)), 1)
        face = rgb[inside > 0]
        assert (face[:, 0] > face[:, 2]).mean() > 0.95
        x, y = points[NOSE_TIP].round().astype(int)
        assert inside[y, x]


def lips_and_audio(clip, points, lag_s):
    """Correlation of the opening of the lips with the log energy of the sound `lag_s` after it, one value a frame."""
    opening = np.linalg.norm(points[:, INNER_LIPS[0]] - points[:, INNER_LIPS[1]], axis=1)
    audio, frame = clip_io.mono(clip.audio.samples), int(clip.audio.rate / clip.video.fps)
    middle = (clip.video.times + clip_io.audio_lag_s(clip) + lag_s) * clip.audio.rate
    starts = (middle - frame / 2).astype(int)
    heard = (starts >= 0) & (starts + frame <= len(audio))
    energy = np.array([np.mean(audio[n : n + frame] ** 2) for n in starts[heard]])
    return np.corrcoef(opening[heard], np.log10(1e-4 + energy))[0, 1]


def test_lips_open_with_the_audio(tracker, grid_dir):
    """Mean of eight clips of four unlike speakers (one clip alone gives 0.3 to 0.7): in step, and less so 120 ms apart."""
    speakers = [sorted((grid_dir / s).glob("b*.mpg"))[:2] for s in ("s1", "s2", "s31", "s34")]
    clips = [clip_io.read_clip(path) for pair in speakers for path in pair]
    tracked = [(clip, tracker(clip.video.rgb).points) for clip in clips]
    early, now, late = (np.mean([lips_and_audio(*pair, lag) for pair in tracked]) for lag in (-0.12, 0.0, 0.12))
    assert now > 0.4 and now > early + 0.05 and now > late + 0.05


def test_grey_opening_is_marked_and_held(tracker, grid_dir):
    rgb = clip_io.read_clip(grid_dir / "s1" / "bbizzn.mpg", audio=False).video.rgb
    assert landmarks.corrupt_until(rgb) == 12
    track = tracker(rgb)
    np.testing.assert_array_equal(np.flatnonzero(~track.valid), np.arange(12))
    np.testing.assert_array_equal(track.points[:12], np.repeat(track.points[12:13], 12, 0))
    assert "first 12 pictures" in track.warnings[0]


def test_damage_in_the_clips_known_for_it_and_in_no_other(grid_dir):
    """The list is grid/README.md's; pbio7a stays smeared to its last intra picture, by eye. One other clip a speaker."""
    known = "bbizzn brwa4p brwg8p bwwuzn lgbf8n lrarzn pbio7a pbwx1s prii9a sbbh4p sran9s".split()
    expected = {grid_dir / "s1" / f"{clip_id}.mpg": 72 if clip_id == "pbio7a" else 12 for clip_id in known}
    for speaker in sorted(grid_dir.glob("s*/")):
        others = [path for path in sorted(speaker.glob("*.mpg")) if path not in expected]
        expected.update({path: 0 for path in others[:1]})
    read = {path: clip_io.read_clip(path, audio=False).video.rgb for path in expected if path.exists()}
    assert {path: landmarks.corrupt_until(rgb) for path, rgb in read.items()} == {path: expected[path] for path in read}


def test_cuts_fades_and_black_openings_are_no_damage(clean):
    rgb = clean.video.rgb
    black = np.zeros_like(rgb[:5])
    assert landmarks.corrupt_until(rgb) == 0
    assert landmarks.corrupt_until(np.concatenate([black, rgb])) == 0
    assert landmarks.corrupt_until(np.concatenate([rgb[:30], 255 - rgb[:30], rgb[30:]])) == 0


def test_clip_that_is_damaged_throughout_is_never_shown_to_the_models(tracker, grid_dir, monkeypatch):
    rgb = clip_io.read_clip(grid_dir / "s1" / "bbizzn.mpg", audio=False).video.rgb[:12]
    assert landmarks.corrupt_until(rgb) == 12
    monkeypatch.setattr(landmarks._Model, "__call__", lambda *_: pytest.fail("a damaged image reached a model"))
    with pytest.raises(landmarks.NoFaceError, match="12 of them damaged"):
        tracker(rgb)


def test_frames_without_the_face_lie_between_their_neighbours(tracker, clean, track):
    rgb = clean.video.rgb[:20].copy()
    rgb[8:12] = 0
    hidden = tracker(rgb)
    np.testing.assert_array_equal(np.flatnonzero(~hidden.valid), np.arange(8, 12))
    part = (np.arange(8, 12) - 7)[:, None, None] / 5
    line = (1 - part) * hidden.points[7] + part * hidden.points[12]
    np.testing.assert_allclose(hidden.points[8:12], line, atol=1e-3)
    assert np.abs(hidden.points[12:] - track.points[12:20]).max() < 5  # found again, at the same place
    assert "lost in 4 of 20" in hidden.warnings[0]


def test_black_opening_is_held_from_the_first_good_frame(tracker, clean):
    rgb = np.concatenate([np.zeros_like(clean.video.rgb[:4]), clean.video.rgb[:6]])
    track = tracker(rgb)
    assert not track.valid[:4].any() and track.valid[4:].all()
    np.testing.assert_array_equal(track.points[0], track.points[4])


def test_small_face_in_a_large_frame_is_found(tracker, clean, track):
    h, w = clean.video.rgb.shape[1:3]
    rgb = np.full((3, 3 * h, 3 * w, 3), 90, np.uint8)
    rgb[:, h : 2 * h, w : 2 * w] = clean.video.rgb[:3]
    found = tracker(rgb)
    assert found.valid.all()
    assert np.abs(found.points - track.points[:3] - (w, h)).max() < 6


def test_of_two_faces_the_larger_is_followed_with_a_warning(tracker, clean, track):
    rgb = clean.video.rgb[:30]
    h, w = rgb.shape[1:3]
    pair = np.full((len(rgb), h, 2 * w, 3), 90, np.uint8)
    for t, image in enumerate(rgb):
        pair[t, :, w:] = image
        pair[t, h // 4 : h // 4 + h // 2, w // 4 : w // 4 + w // 2] = cv2.resize(image, (w // 2, h // 2))
    found = tracker(pair)
    assert found.valid.all() and len(found.warnings) == 1 and "2 faces" in found.warnings[0]
    assert np.abs(found.points - track.points[:30] - (w, 0)).max() < 6


@pytest.fixture(scope="module")
def beside(tracker, clean, track, grid_dir):
    """Two real clips, s1 on the left, and the points of each by itself, where they lie in the joined pictures."""
    other = clip_io.read_clip(grid_dir / "s2" / "bbaf1n.mpg", audio=False).video.rgb[:30]
    pair = np.concatenate([clean.video.rgb[:30], other], axis=2)
    width = np.float32([clean.video.rgb.shape[2], 0])
    return pair, (track.points[:30], tracker(other).points + width)


def exchanged(pair):
    """The joined pictures with left and right changed places; by how much the points move."""
    left, right = np.split(pair, 2, axis=2)
    return np.concatenate([right, left], axis=2)


def test_a_face_is_chosen_by_its_place_from_the_left(tracker, beside):
    pair, alone = beside
    assert pair.shape[1:3] == (288, 720)
    width = np.float32([360, 0])
    for rgb, expected in ((pair, alone), (exchanged(pair), (alone[1] - width, alone[0] + width))):
        for face in (0, 1):
            found = tracker(rgb, face=face)
            assert found.valid.all() and np.abs(found.points - expected[face]).max() < 6
            assert found.warnings[0].startswith(f"2 faces seen; number {face} from the left") and len(found.warnings) == 1
    assert "2 faces seen; the largest is followed: choose" in tracker(pair[:3]).warnings[0]


@pytest.mark.parametrize("face", [0, 1])
def test_a_chosen_face_that_is_hidden_is_waited_for(tracker, beside, face):
    """Hidden from the first picture on too: faces are counted where both are seen, and the chosen one is followed back."""
    pair, alone = beside
    hidden = pair.copy()
    half = slice(360 * face, 360 * (face + 1))
    hidden[:4, :, half] = 0
    hidden[10:20, :, half] = 0
    found = tracker(hidden, face=face)
    np.testing.assert_array_equal(np.flatnonzero(~found.valid), [*range(4), *range(10, 20)])
    assert np.abs(found.points - alone[face])[found.valid].max() < 6
    largest = tracker(hidden).points  # of no use here: whoever is there
    assert np.abs(largest[12] - alone[1 - face][12]).max() < 6


def test_fewer_faces_than_asked_for(tracker, beside, clean, track):
    pair, _ = beside
    np.testing.assert_array_equal(tracker(clean.video.rgb[:5], face=0).points, track.points[:5])
    for rgb, face, said in ((clean.video.rgb[:3], 1, "found 1 face, expected .* not 1"), (pair[:3], 2, "found 2 faces")):
        with pytest.raises(ValueError, match=said):
            tracker(rgb, face=face)
    with pytest.raises(ValueError, match="expected a number from 0"):
        tracker(pair[:3], face=-1)
    with pytest.raises(landmarks.NoFaceError):
        tracker(np.full((3, 120, 160, 3), 30, np.uint8), face=1)


def test_no_face(tracker):
    with pytest.raises(landmarks.NoFaceError, match="no face found in 5 pictures"):
        tracker(np.full((5, 120, 160, 3), 30, np.uint8))
    with pytest.raises(landmarks.NoFaceError):
        tracker(np.random.default_rng(0).integers(0, 256, (5, 120, 160, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected \(T, H, W, 3\) uint8"):
        tracker(np.zeros((5, 120, 160, 3), np.float32))


def test_mouth_crops_show_the_mouth_upright(tracker, clean, track):
    """A clip turned by 15 degrees gives the crops of the upright one, up to resampling."""
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


def test_altered_and_missing_model_files_are_named_with_the_remedy(tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(model_files.importlib.resources.files("avsi_jax.face") / "networks", folder)
    assert landmarks.load_models(folder).keys() == model_files.MODEL_SHA256.keys()
    file = folder / landmarks.MESH
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(landmarks.ModelFilesError, match="found sha256 .*python -m avsi_jax.landmarks --fetch --model_dir"):
        landmarks.FaceTracker(folder)
    file.unlink()
    with pytest.raises(landmarks.ModelFilesError, match="no such face model"):
        landmarks.FaceTracker(folder)


def test_fetch_takes_the_files_out_of_the_wheel(tmp_path, monkeypatch):
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


def test_fingerprint_is_that_of_the_files():
    assert len(landmarks.model_fingerprint()) == 64 and landmarks.model_fingerprint() == landmarks.model_fingerprint()
