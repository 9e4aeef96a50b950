"""Event files read back with the protobuf messages of tensorboardX and by TensorBoard; images checked by their pixels."""

import io
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from PIL import Image

from avsi_jax.runtime import storage
from avsi_jax.training import tensorboard
from avsi_jax.training.tensorboard import EventWriter
from tests.support.buckets import bucket, largest_file  # noqa: F401 (bucket is a fixture)

ROOT = Path(__file__).resolve().parents[2]


def records_of(data):
    """The records of a TFRecord file (tensorflow.org/tutorials/load_data/tfrecord), checksums verified."""

    def masked_crc(part):
        crc = google_crc32c.value(part)
        return (((crc >> 15) | (crc << 17 & 0xFFFFFFFF)) + 0xA282EAD8) & 0xFFFFFFFF

    while data:
        (size,), (size_crc,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        record, (record_crc,) = data[12 : 12 + size], struct.unpack("<I", data[12 + size : 16 + size])
        assert (size_crc, record_crc) == (masked_crc(data[:8]), masked_crc(record))
        yield record
        data = data[16 + size :]


def events_of(folder):
    """All events of a folder in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    paths = sorted(folder.iterdir(), key=lambda p: p.name)
    return [Event.FromString(record) for path in paths for record in records_of(path.read_bytes())]


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def test_scalars_are_grouped(tmp_path):
    before = time.time()
    writer = EventWriter(tmp_path, 0)
    row = {"step": 300, "train_loss": 1.5, "val_gap_l1_db": 8.25, "lr_scale": 0.1, "train_ctc": float("nan"), "valve": 2}
    writer.scalars(300, row)
    writer.close()
    first, start, event = events_of(tmp_path)
    assert first.file_version == "brain.Event:2" and before <= first.wall_time <= time.time()
    assert (start.session_log.status, start.step) == (start.session_log.START, 1)
    values = {value.tag: value.simple_value for value in event.summary.value}
    assert event.step == 300 and np.isnan(values.pop("train/ctc"))
    assert values == {"train/loss": 1.5, "val/gap_l1_db": 8.25, "run/lr_scale": float(np.float32(0.1)), "run/valve": 2}


def test_texts_and_images_are_written(tmp_path):
    pixels, config = noise(0, 20, 301, 3), '{\n  "name": "ä"\n}'
    writer = EventWriter(tmp_path, 0)
    writer.text("config", config)
    writer.image(2**40, "restored", pixels)
    writer.close()
    text, image = (event.summary.value[0] for event in events_of(tmp_path)[2:])
    assert (text.tag, text.metadata.plugin_data.plugin_name) == ("config", "text")
    assert (text.tensor.dtype, text.tensor.tensor_shape.dim[0].size) == (7, 1)  # DT_STRING
    assert text.tensor.string_val[0].decode() == "\n".join("    " + line for line in config.splitlines())
    assert (image.image.height, image.image.width, image.image.colorspace) == (20, 301, 3)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.image.encoded_image_string))), pixels)
    assert events_of(tmp_path)[-1].step == 2**40


def test_events_of_a_resumed_run_are_read_last_even_if_its_clock_is_slow(tmp_path):
    ahead = tmp_path / "events.out.tfevents.4000000000.other.1.00003"
    ahead.touch()
    resumed = EventWriter(tmp_path, 7)
    resumed.close()
    newest = max(p.name for p in tmp_path.iterdir())
    assert newest.startswith("events.out.tfevents.4000000001.")
    start = events_of(tmp_path)[1]
    assert start.session_log.status == start.session_log.START and start.step == 8


def test_a_flush_that_fails_keeps_the_pending_events(tmp_path):
    writer = EventWriter(tmp_path, 0)
    writer.scalars(1, {"train_loss": 1.0})
    writer.flush()
    writer.scalars(2, {f"train_{k}": k for k in range(100)})
    with largest_file(500), pytest.raises(storage.StorageError, match=f"{tmp_path}.*File too large"):
        writer.flush()
    assert [e.step for e in events_of(tmp_path)] == [0, 1, 1]
    writer.flush()
    writer.scalars(3, {"train_loss": 0.5})
    writer.close()
    assert [e.step for e in events_of(tmp_path)] == [0, 1, 1, 2, 3]


def test_in_a_bucket_events_are_split_into_files(bucket, monkeypatch):  # noqa: F811
    monkeypatch.setattr(tensorboard, "MAX_PENDING", 2000)
    writer = EventWriter(f"{bucket}/run/tensorboard", 0)
    for step in range(1, 31):
        writer.scalars(step, {f"train_{k}": k for k in range(10)})
        if step % 3 == 0:
            writer.flush()
    writer.close()
    assert [e.step for e in events_of(writer.folder)] == [0, 1, *range(1, 31)]
    sizes = [p.stat().length for p in writer.folder.iterdir()]
    assert 2 < len(sizes) < 10 and max(sizes) < 5000


def test_tensorboard_reads_the_events_of_a_resumed_run(tmp_path, monkeypatch):
    """Events after the step of the resume are dropped, and an incomplete record only ends its file."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))  # makes it work without tensorflow
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError)
    killed = EventWriter(tmp_path, 0)
    killed.text("config", "{}")
    for step in range(0, 60, 10):
        killed.scalars(step, {"train_loss": step})
    killed.image(50, "restored", noise(0, 8, 8, 3))
    killed.flush()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    resumed = EventWriter(tmp_path, 30)
    for step in (40, 50, 60):
        resumed.scalars(step, {"train_loss": -step})
    pixels = noise(1, 10, 12, 3)
    resumed.image(60, "restored", pixels)
    resumed.close()
    read = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in read.Scalars("train/loss")] == [0, 10, 20, 30, 40, 50, 60]
    assert [e.value for e in read.Scalars("train/loss")] == [0, 10, 20, 30, -40, -50, -60]
    (image,) = read.Images("restored")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), pixels)
    assert read.Tensors("config")[0].tensor_proto.string_val[0] == b"    {}"


def test_tensorboard_events_need_no_heavy_imports(tmp_path):
    code = (
        "import sys, numpy as np; from avsi_jax.training import tensorboard\n"
        "writer = tensorboard.EventWriter(sys.argv[1], 0); writer.scalars(1, {'train_loss': 1}); writer.text('config', 'x')\n"
        "level = np.zeros((1, 10, 4)); image = tensorboard.spectrogram_image(level, level, level, np.zeros((1, 10), bool))\n"
        "writer.image(1, 'restored', image); writer.close()\n"
        "print(sorted({'tensorflow', 'torch', 'jax', 'matplotlib', 'tensorboardX'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
    assert len(events_of(tmp_path)) == 5


# ------------------------------------------------------------------------------------------------------------------ images

LOWEST, HIGHEST = (68, 1, 84), (253, 231, 37)  # the ends of viridis (bids.github.io/colormap)


def panels(image, bands, columns):
    """The (3, columns) spectrograms of an image, each (2 K, W, 3), and the bars above them, each (4, W, 3)."""
    height, width = image.shape[0] // 3, image.shape[1] // columns
    parts = [[image[r * height :][:height, c * width :][:, : width - 8] for c in range(columns)] for r in range(3)]
    bars = [[part[16:20] for part in row] for row in parts]
    return [[part[20 : 20 + 2 * bands] for part in row] for row in parts], bars


def test_time_runs_to_the_right_and_low_bands_are_at_the_bottom():
    original = np.zeros((2, 100, 16), np.float32)
    original[0, :, 0] = 1  # low bands
    original[1, 75:, :] = 5  # late
    mask = np.zeros((2, 100), bool)
    mask[0, 20:30] = True
    image = tensorboard.spectrogram_image(0 * original, original, original, mask, ["one", "two"])
    assert image.dtype == np.uint8 and image.shape == (3 * (16 + 4 + 32 + 8), 2 * (100 * 4 + 8), 3)
    (masked, restored, clean), bars = panels(image, 16, 2)
    assert (masked[1] == LOWEST).all()
    for low, late in (restored, clean):
        inside = np.delete(low, [80, 120], axis=1)  # without the lines at the edges of the gap
        assert (inside[-2:] == HIGHEST).all() and (inside[:-2] == LOWEST).all()
        assert (late[:, :300] == LOWEST).all() and (late[:, 300:] == HIGHEST).all()
        assert (low[:, [80, 120]] == 255).all()
    red = (np.asarray(bars) == (220, 40, 40)).all((2, 4))
    assert red[:, 0].sum(1).tolist() == [40] * 3 and red[:, 0, 80:120].all() and not red[:, 1].any()


def test_panels_of_a_clip_share_the_colour_scale_of_the_original():
    """Higher and lower levels in other panels are clipped."""
    level = np.linspace(0, 1, 50 * 8, dtype=np.float32).reshape(1, 50, 8)
    (half, same, clean), _ = panels(tensorboard.spectrogram_image(level / 2, level, level, np.zeros((1, 50), bool)), 8, 1)
    np.testing.assert_array_equal(same[0], clean[0])
    assert (half[0][:, -8:] != clean[0][:, -8:]).any() and not (half[0] == HIGHEST).all(-1).any()
    (loud, _, clean), _ = panels(tensorboard.spectrogram_image(level + 9, level, level, np.zeros((1, 50), bool)), 8, 1)
    assert (loud[0] == HIGHEST).all() and (clean[0] == LOWEST).all(-1).any()


def test_padding_does_not_change_the_colour_scale():
    """A clip of 20 frames in 50: its panel looks as it does without padding, which is silence far below it."""
    level, mask = np.random.default_rng(0).uniform(-3, 0, (1, 20, 8)).astype(np.float32), np.zeros((1, 50), bool)
    padded = np.pad(level, ((0, 0), (0, 30), (0, 0)), constant_values=-12)
    (_, _, clean), _ = panels(tensorboard.spectrogram_image(padded, padded, padded, mask, num_frames=[20]), 8, 1)
    (_, _, alone), _ = panels(tensorboard.spectrogram_image(level, level, level, mask[:, :20]), 8, 1)
    shown = clean[0][:, :: clean[0].shape[1] // 50][:, :20]
    np.testing.assert_array_equal(shown, alone[0][:, :: alone[0].shape[1] // 20][:, :20])


def test_a_constant_clip_that_is_all_gap_can_be_drawn():
    level, mask = np.full((1, 500, 4), -80.0), np.ones((1, 500), bool)
    image = tensorboard.spectrogram_image(level, level, level, mask)
    assert image.shape == (3 * (16 + 4 + 8 + 8), 508, 3)
    _, bars = panels(image, 4, 1)
    assert (np.asarray(bars) == (220, 40, 40)).all()


def test_a_png_holds_the_pixels(tmp_path):
    image = noise(3, 33, 20, 3)
    storage.write_bytes(tmp_path / "images" / "step.png", tensorboard.encode_png(image))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "step.png")), image)
