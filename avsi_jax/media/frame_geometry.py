"""Shows video frames as players do: with the pixel aspect ratio and the display matrix of the file.

Phones store frames as the sensor sees them, with a matrix that turns or mirrors them, and some formats store pixels that are not
square. Letters: H and W, height and width of a frame.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

MAX_ASPECT = 8  # of a pixel, in both directions; others are errors in a header
EXACT = 0.01  # a matrix this close to quarter turns and mirroring moves whole pixels; others interpolate


def shown_size(frame: av.VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """(width, height) of a frame as `shown_rgb` returns it."""
    size, turn = _square_pixel_size(frame, aspect), _display_turn(frame)
    if turn is None:
        return size
    return size[:: -1 if turn[0, 0] == 0 else 1] if _is_exact(turn) else _bounding_box(turn, *size)[0]


def shown_rgb(frame: av.VideoFrame, aspect: Fraction | None) -> np.ndarray:
    """The frame with square pixels, turned and mirrored by its display matrix, (H, W, 3) uint8. aspect: of its pixels."""
    size, turn = _square_pixel_size(frame, aspect), _display_turn(frame)
    if size != (frame.width, frame.height):
        frame = frame.reformat(*size, format="rgb24")
    rgb = frame.to_ndarray(format="rgb24")
    return rgb if turn is None else _turned(rgb, turn)


def _square_pixel_size(frame: av.VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """The size of a frame whose pixels were made square by changing its width, as players do."""
    if not aspect or not 1 / MAX_ASPECT <= aspect <= MAX_ASPECT:
        return frame.width, frame.height
    return max(1, round(frame.width * aspect)), frame.height


def _display_turn(frame: av.VideoFrame) -> np.ndarray | None:
    """(2, 2): where the display matrix moves (x, y), without its scale; None where it changes nothing or is no valid matrix.

    Exact quarter turns and mirror images have whole entries.
    """
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    matrix = np.frombuffer(bytes(data), np.int32).astype(np.float64)[:9].reshape(3, 3)[:2, :2].T  # the file's are row vectors
    scale = np.sqrt(abs(np.linalg.det(matrix)))
    if not scale:
        return None
    turn = matrix / scale
    turn = np.rint(turn) if np.abs(turn - np.rint(turn)).max() < EXACT else turn
    return None if (turn == np.eye(2)).all() else turn


def _is_exact(turn: np.ndarray) -> bool:
    return bool((turn == np.rint(turn)).all())


def _turned(rgb: np.ndarray, turn: np.ndarray) -> np.ndarray:
    if not _is_exact(turn):
        import cv2

        size, matrix = _bounding_box(turn, *rgb.shape[1::-1])
        return cv2.warpAffine(rgb, matrix, size)
    if turn[0, 0] == 0:
        rgb = rgb.transpose(1, 0, 2)
    return np.ascontiguousarray(rgb[:: int(turn[1].sum()), :: int(turn[0].sum())])


def _bounding_box(turn: np.ndarray, width: int, height: int) -> tuple[tuple[int, int], np.ndarray]:
    """((width, height) that a turned frame needs, the (2, 3) affine map into it)."""
    corners = turn @ np.array([[0, width, 0, width], [0, 0, height, height]])
    low, high = corners.min(1), corners.max(1)
    box_width, box_height = np.ceil(high - low).astype(int).tolist()
    return (box_width, box_height), np.column_stack([turn, -low])
