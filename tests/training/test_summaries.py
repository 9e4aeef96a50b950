"""What a run shows while it trains: pictures of validation clips, curves that a resume does not double, what gave NaN."""

import numpy as np
import pytest

from avsi_jax.data import input_pipeline
from avsi_jax.training import cli


def events(folder):
    """(step, tag, value) of all scalars in TensorBoard's files, what a later start struck out left out."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            if event.HasField("session_log"):
                found = [f for f in found if f[0] < event.step]
            shown = [v for v in event.summary.value if v.HasField("simple_value")]
            found += [(event.step, v.tag, v.simple_value) for v in shown]
    return found


def test_curves_and_frames_of_a_run(tiny_config, tiny_dir, trained, tmp_path):
    """Two starts of an epoch each: a point an epoch in each curve, a picture every second step, and nothing else changes."""
    import cv2

    from avsi_jax.training.run_directory import read_rows

    for epochs in (1, 2):
        cli.train(tiny_config(epochs=epochs, images_every=2), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (trained / "metrics.csv").read_bytes()
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    drawn = [(step, value) for step, tag, value in events(tmp_path / "run" / "tensorboard") if tag == "val/gap_l1_db"]
    assert drawn == [(row["step"], pytest.approx(row["val_gap_l1_db"], rel=1e-6)) for row in rows]
    names = sorted(p.name for p in (tmp_path / "run" / "pictures").iterdir())
    assert names == ["0000002.png", "0000004.png"]
    first, second = (cv2.imread(str(tmp_path / "run" / "pictures" / name)) for name in names)
    assert first.shape == second.shape and first.std() > 20
    height = len(first) // 3
    assert np.array_equal(first[:height], second[:height]) and np.array_equal(first[2 * height :], second[2 * height :])
    assert not np.array_equal(first[height : 2 * height], second[height : 2 * height]), "what is restored has changed"


@pytest.mark.slow
def test_debugging_stops_at_the_operation_that_gave_nan(tiny_dir, tmp_path, monkeypatch, capsys):
    """One clip's points are no numbers: the traceback shows the line where they first enter a result."""
    honest = input_pipeline.to_example

    def poisoned(raw):
        example = honest(raw)
        example["landmarks"][3, 50] = np.nan
        return example

    arguments = ["--config=debug", f"--workdir={tmp_path / 'run'}", f"--config.data_dir={tiny_dir}"]
    assert cli.main(arguments) == 0
    monkeypatch.setattr(input_pipeline, "to_example", poisoned)
    capsys.readouterr()
    assert cli.main([*arguments[:1], f"--workdir={tmp_path / 'other'}", *arguments[2:]]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said and "features.py" in said and "invalid value (nan)" in said
    import jax  # nothing of the debugging stays on

    assert not jax.config.jax_debug_nans
