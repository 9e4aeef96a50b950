"""What a training shows while it runs: TensorBoard's event files, without tensorflow, and pictures of spectrograms.

An event file is TFRecords of protobuf messages, of which a board needs a handful of fields. They are written here: tensorboardX
imports torch where that is installed (its CUDA libraries beside JAX's), writes from a thread whose death, on a full disk, the
training would wait for without end, and its flush leaves what is still queued. Format: tensorflow/core/util/event.proto and
core/framework/summary.proto. Letters: B clips, F spectrogram frames, K mel bands.
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

MOST_PENDING = 2**20  # bytes; also where a file in a bucket ends and the next begins, so that little is sent again
NAMED = re.compile(r"events\.out\.tfevents\.(\d{10})\.")
SESSION_START = 1

BAND, WIDTH = 2, 400  # px: a band's height; a panel's width, about: a whole number of px a frame
TITLE, MARK, SPACE = 16, 4, 8  # px: a line of text, the bar over a gap, between panels
RED = (220, 40, 40)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


class EventWriter:
    """Writes the event files of one training; only process 0 makes one.

    folder: on a disk or gs://. start_step: the step training goes on from, 0 for a new one. What a run before this one wrote of
    later steps is struck out, so that no curve doubles back. Nothing is on the disk, or in the bucket, before `flush`, or before
    1 MiB has gathered; a flush that fails raises storage.StorageError, keeps what it has and may be tried again.
    """

    def __init__(self, folder, start_step: int):
        self.folder = storage.folder(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._name, self._part, self._written, self._pending = self._new_name(), 0, b"", b""
        self._add(_string(3, "brain.Event:2"), start_step)
        self._add(_part(7, _number(1, SESSION_START)), start_step + 1)  # strikes out this step and all after it

    def _new_name(self) -> str:
        """Files are read in the order of their names: this one must come after those of hosts whose clock ran ahead."""
        earlier = [int(m[1]) + 1 for name in storage.names(self.folder) if (m := NAMED.match(name))]
        return f"events.out.tfevents.{max([int(time.time()), *earlier]):010d}.{socket.gethostname()}.{os.getpid()}"

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; train_loss is shown as train/loss, val_loss as val/loss, all others under run/; `step` is left out."""
        shown = [_value(_group(k), struct.pack("<Bf", 2 << 3 | 5, float(v))) for k, v in values.items() if k != "step"]
        self._add(_part(5, b"".join(shown)), step)

    def text(self, name: str, text: str, step: int = 0) -> None:
        """A text such as config.json, shown as it is and not as Markdown."""
        as_it_is = "\n".join(f"    {line}" for line in text.splitlines())
        metadata = _part(9, _part(1, _string(1, "text")))
        tensor = _part(8, _number(1, 7) + _part(2, _part(2, _number(1, 1))) + _string(8, as_it_is))  # 7: strings, shape (1,)
        self._add(_part(5, _value(name, metadata + tensor)), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture (H, W, 3) uint8."""
        height, width, _ = pixels.shape
        image = _number(1, height) + _number(2, width) + _number(3, 3) + _part(4, encode_png(pixels))
        self._add(_part(5, _value(name, _part(4, image))), step)

    def flush(self) -> None:
        """Brings to the file what has gathered."""
        path = self.folder / f"{self._name}.{self._part:05d}"
        if not self._pending:
            return
        if not storage.in_bucket(path):
            storage.append_bytes(path, self._pending)
        else:
            storage.write_bytes(path, self._written + self._pending)
            self._written += self._pending
            if len(self._written) > MOST_PENDING:
                self._part, self._written = self._part + 1, b""
        self._pending = b""

    def close(self) -> None:
        self.flush()

    def _add(self, what: bytes, step: int) -> None:
        """An Event, framed as a record."""
        event = struct.pack("<Bd", 1 << 3 | 1, time.time()) + _number(2, int(step)) + what
        size = struct.pack("<Q", len(event))
        self._pending += size + masked_crc(size) + event + masked_crc(event)
        if len(self._pending) > MOST_PENDING:
            self.flush()


def _group(name: str) -> str:
    """train_loss -> train/loss: TensorBoard gathers by what stands before the stroke."""
    phase, _, rest = name.partition("_")
    return f"{phase}/{rest}" if phase in ("train", "val") and rest else f"run/{name}"


# ---------------------------------------------------------------------------------------------------------------- messages


def _value(tag: str, what: bytes) -> bytes:
    """One value of a Summary."""
    return _part(1, _string(1, tag) + what)


def _string(number: int, text: str) -> bytes:
    return _part(number, text.encode())


def _part(number: int, content: bytes) -> bytes:
    """A field of bytes, text or a message."""
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    """A field of a whole number >= 0."""
    return bytes([number << 3]) + _varint(value)


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


# ---------------------------------------------------------------------------------------------------------------- pictures


def spectrogram_image(
    masked: np.ndarray, restored: np.ndarray, original: np.ndarray, mask: np.ndarray, titles: Sequence[str] = ()
) -> np.ndarray:
    """Levels (B, F, K) and gap frames (B, F) bool of a few clips -> (H, W, 3) uint8: a column a clip, three panels in each.

    Time runs to the right, low bands lie at the bottom. One colour scale (viridis) a clip, from the level that 2 % of its original
    lie below to its highest. Red bars over the panels mark the gaps, thin lines their borders. titles: one a clip.
    """
    import numpy as np

    columns = []
    for i in range(len(original)):
        scale = float(np.percentile(original[i], 2)), float(np.max(original[i]))  # 2 %: padding is silent
        rows = [("masked", masked[i]), ("restored", restored[i]), ("original", original[i])]
        if i < len(titles):
            rows[0] = (f"{titles[i]}: damaged", masked[i])
        columns.append(np.concatenate([_panel(level, mask[i], name, scale) for name, level in rows]))
    return np.concatenate(columns, axis=1)


def _panel(level: np.ndarray, mask: np.ndarray, title: str, scale: tuple[float, float]) -> np.ndarray:
    """One spectrogram (F, K) under its title, (TITLE + MARK + K * BAND + SPACE, F * frame + SPACE, 3) uint8, RGB."""
    import cv2
    import numpy as np

    low, high = scale
    frame = max(1, WIDTH // len(level))
    grey = np.rint(255 * np.clip((np.asarray(level, np.float32).T[::-1] - low) / max(high - low, 1e-9), 0, 1)).astype(np.uint8)
    grey = np.ascontiguousarray(grey.repeat(BAND, axis=0).repeat(frame, axis=1))
    colours = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    gap = np.repeat(mask, frame)
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
    """(H, W, 3) uint8, RGB -> a PNG file's bytes; save them with storage.write_bytes."""
    import cv2

    return cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 6])[1].tobytes()
