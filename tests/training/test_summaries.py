"""Images and TensorBoard curves of a run, and the debug mode that stops at the first NaN."""

import numpy as np
import pytest

from avsi_jax.training import cli
from tests.support import nan_clips


def events(folder):
    """(step, tag, value) of all scalars in the event files, without those that a later start marked as obsolete."""
    from tensorboardX.proto import event_pb2

    scalars = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                scalars = [f for f in scalars if f[0] < event.step]
            values = [v for v in event.summary.value if v.HasField("simple_value")]
            scalars += [(event.step, v.tag, v.simple_value) for v in values]
    return scalars


@pytest.mark.slow
def test_a_resumed_run_has_one_point_per_epoch_and_an_image_every_second_step(tiny_config, tiny_dir, trained, tmp_path):
    """Two starts of one epoch each; the metrics are those of a run without images."""
    import cv2

    from avsi_jax.training.run_directory import read_rows

    for epochs in (1, 2):
        cli.train(tiny_config(epochs=epochs, images_every=2), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    points = [(step, value) for step, tag, value in events(tmp_path / "run" / "tensorboard") if tag == "val/gap_l1_db"]
    assert points == [(row["step"], pytest.approx(row["val_gap_l1_db"], rel=1e-6)) for row in rows]
    names = sorted(p.name for p in (tmp_path / "run" / "images").iterdir())
    assert names == ["0000002.png", "0000004.png"]
    first, second = (cv2.imread(str(tmp_path / "run" / "images" / name)) for name in names)
    assert first.shape == second.shape and first.std() > 20
    height = len(first) // 3
    assert np.array_equal(first[:height], second[:height]) and np.array_equal(first[2 * height :], second[2 * height :])
    assert not np.array_equal(first[height : 2 * height], second[height : 2 * height])


@pytest.mark.slow
def test_debug_nans_stops_at_the_operation_that_gave_the_first_nan(tiny_dir, tmp_path, monkeypatch, capsys):
    """With NaN landmarks, the traceback shows the line where they first enter a result."""
    import jax

    arguments = ["--config=debug", f"--workdir={tmp_path / 'run'}", f"--config.data_dir={tiny_dir}"]
    assert cli.main(arguments) == 0
    nan_clips.put_nan(monkeypatch)
    capsys.readouterr()
    assert cli.main([*arguments[:1], f"--workdir={tmp_path / 'other'}", *arguments[2:]]) == 2
    stderr = capsys.readouterr().err
    assert "Traceback" in stderr and "features.py" in stderr and "invalid value (nan)" in stderr
    assert not jax.config.jax_debug_nans
