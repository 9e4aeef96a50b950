"""TensorBoard event files, written without tensorflow, and spectrogram images.

An event file holds TFRecords of protobuf messages, of which only a few fields are needed here. tensorboardX is not used: it imports
torch if installed (with its own CUDA libraries), its writer thread can die on a full disk and then blocks the training, and its
flush does not wait for queued events. Format: tensorflow/core/util/event.proto and core/framework/summary.proto.
Letters: B clips, F spectrogram frames, K mel bands.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from avsi_jax.data.tfrecords import masked_crc
from avsi_jax.runtime import storage

if TYPE_CHECKING:
    import numpy as np
    from etils import epath

MAX_PENDING = 2**20  # bytes before a flush; also the size of a file in a bucket, where every flush uploads the whole file
FILE_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
SESSION_START = 1

BAND, WIDTH = 2, 400  # px: height of a band; approximate width of a panel, which has a whole number of px per frame
TITLE, MARK, SPACE = 16, 4, 8  # px: height of a title and of the bar that marks a gap; space between panels
RED = (220, 40, 40)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


class EventWriter:
    """Writes the event files of one training; used by process 0 only.

    folder: local or gs://. start_step: training step at which the run starts or resumes; events that an earlier run wrote for later
    steps are marked as obsolete. Events are written at `flush`, or when 1 MiB is pending; a flush that fails raises
    storage.StorageError, keeps the pending events and may be repeated.
    """

    def __init__(self, folder: epath.PathLike, start_step: int):
        self.folder = storage.as_path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name, self._part, self._written, self._pending = self._new_name(), 0, b"", b""
        self._add(_string(3, "brain.Event:2"), start_step)
        self._add(_part(7, _number(1, SESSION_START)), start_step + 1)  # makes events of this and later steps obsolete

    def _new_name(self) -> str:
        """A name that sorts after all others, also those of hosts with a fast clock: files are read in the order of their names."""
        earlier = [int(m[1]) + 1 for name in storage.list_names(self.folder) if (m := FILE_NAME.match(name))]
        return f"events.out.tfevents.{max([int(time.time()), *earlier]):010d}.{socket.gethostname()}.{os.getpid()}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds numbers by name: train_loss as train/loss, val_loss as val/loss, others under run/; `step` is left out."""
        shown = [_value(_group(k), struct.pack("<Bf", 2 << 3 | 5, float(v))) for k, v in values.items() if k != "step"]
        self._add(_part(5, b"".join(shown)), step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """Adds a text such as config.json, indented so that it is not rendered as Markdown."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        metadata = _part(9, _part(1, _string(1, "text")))
        tensor = _part(8, _number(1, 7) + _part(2, _part(2, _number(1, 1))) + _string(8, indented))  # 7: strings, shape (1,)
        self._add(_part(5, _value(name, metadata + tensor)), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Adds an image (H, W, 3) uint8."""
        height, width, _ = pixels.shape
        image = _number(1, height) + _number(2, width) + _number(3, 3) + _part(4, encode_png(pixels))
        self._add(_part(5, _value(name, _part(4, image))), step)

    def flush(self) -> None:
        """Writes the pending events."""
        path = self.folder / f"{self._name}.{self._part:05d}"
        if not self._pending:
            return
        if not storage.in_bucket(path):
            storage.append_bytes(path, self._pending)
        else:
            storage.write_bytes(path, self._written + self._pending)
            self._written += self._pending
            if len(self._written) > MAX_PENDING:
                self._part, self._written = self._part + 1, b""
        self._pending = b""

    def close(self) -> None:
        """Writes the pending events."""
        self.flush()

    def _add(self, content: bytes, step: int) -> None:
        """Adds an Event message as a TFRecord."""
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _number(2, int(step)) + content
        size = struct.pack("<Q", len(event))
        self._pending += size + masked_crc(size) + event + masked_crc(event)
        if len(self._pending) > MAX_PENDING:
            self.flush()


def _group(name: str) -> str:
    """train_loss -> train/loss: TensorBoard groups curves by the part before the slash."""
    phase, _, rest = name.partition("_")
    return f"{phase}/{rest}" if phase in ("train", "val") and rest else f"run/{name}"


# ---------------------------------------------------------------------------------------------------------------- messages


def _value(tag: str, content: bytes) -> bytes:
    """A Summary.Value message."""
    return _part(1, _string(1, tag) + content)


def _string(number: int, text: str) -> bytes:
    """A field that holds text."""
    return _part(number, text.encode())


def _part(number: int, content: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A field that holds an integer >= 0."""
    return bytes([number << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    """Variable-length integer: seven bits per byte, lowest first."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


# ------------------------------------------------------------------------------------------------------------------ images


def spectrogram_image(
    masked: np.ndarray, restored: np.ndarray, original: np.ndarray, mask: np.ndarray, titles: Sequence[str] = (),
    num_frames: Sequence[int] | None = None,
) -> np.ndarray:  # fmt: skip
    """Levels (B, F, K) and gap frames (B, F) bool of a few clips -> image (H, W, 3) uint8: a column of three panels per clip.

    Time runs to the right, low bands are at the bottom. The colour scale (viridis) of a clip ranges from the 2nd percentile of the
    original to its maximum. Red bars above the panels mark the gaps, thin lines their edges. titles: one per clip. num_frames: the
    frames of each clip before its padding, which does not count for the scale; None if there is none.
    """
    import numpy as np

    columns = []
    for i in range(len(original)):
        clip = original[i] if num_frames is None else original[i][: num_frames[i]]
        scale = float(np.percentile(clip, 2)), float(np.max(clip))  # not the minimum: digital silence is far below any noise
        rows = [("masked", masked[i]), ("restored", restored[i]), ("original", original[i])]
        if i < len(titles):
            rows[0] = (f"{titles[i]}: masked", masked[i])
        columns.append(np.concatenate([_panel(level, mask[i], name, scale) for name, level in rows]))
    return np.concatenate(columns, axis=1)


def _panel(level: np.ndarray, mask: np.ndarray, title: str, scale: tuple[float, float]) -> np.ndarray:
    """One spectrogram (F, K) with its title, (TITLE + MARK + K * BAND + SPACE, F * frame_width + SPACE, 3) uint8, RGB."""
    import cv2
    import numpy as np

    low, high = scale
    frame_width = max(1, WIDTH // len(level))
    grey = np.rint(255 * np.clip((np.asarray(level, np.float32).T[::-1] - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
    grey = np.ascontiguousarray(grey.repeat(BAND, axis=0).repeat(frame_width, axis=1))
    colours = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    gap = np.repeat(mask, frame_width)
    edges = np.flatnonzero(np.diff(gap.astype(np.int8), prepend=0, append=0))
    height, width, _ = colours.shape
    panel = np.full((TITLE + MARK + height + SPACE, width + SPACE, 3), WHITE, np.uint8)
    image = panel[TITLE : TITLE + MARK + height, :width]
    image[MARK:] = colours
    image[:MARK, gap] = RED
    image[MARK:, np.minimum(edges, width - 1)] = WHITE
    cv2.putText(panel, title, (1, TITLE - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.38, BLACK, 1, cv2.LINE_AA)
    return panel


def encode_png(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8, RGB -> the bytes of a PNG file."""
    import cv2

    return cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
