"""The command that trains a refiner: weights of network and refiner, continued after an interruption; its examples and errors."""

import numpy as np
import pytest

from avsi_jax.inference import refine, weights
from avsi_jax.models import refiner


def test_windows_overlap_a_gap_and_keep_predicted_true_and_mask_together():
    mask = np.zeros((3, 300), bool)
    for row, start in zip(mask, (0, 150, 290)):
        row[start : start + 10] = True
    level = np.arange(3 * 300, dtype=np.float16).reshape(3, 300, 1)
    gaps = {"predicted": level, "true": -level, "mask": mask}
    for seed in range(20):
        predicted, true, inside = refine.draw_windows(gaps, np.random.default_rng(seed), 8)
        assert predicted.shape == true.shape == (8, refine.WINDOW, 1) and inside.shape == (8, refine.WINDOW)
        assert inside.any(1).all() and (predicted == -true).all()
        np.testing.assert_array_equal(inside, mask.reshape(-1)[predicted[..., 0].astype(int)])


def test_gaps_lie_in_the_clip_and_begin_in_the_words_where_they_fit():
    rng = np.random.default_rng(0)
    for num_samples, words_s in ((48_000, (0.5, 2.5)), (48_000, (2.8, 2.9)), (20_000, (0.0, 1.25)), (3_000, (0.0, 0.1))):
        for _ in range(50):
            start, end = refine.draw_gap(rng, num_samples, np.array(words_s))
            assert 0 <= start < end and 300 * 16 - 1 <= end - start <= 1500 * 16
            assert end <= num_samples or start == 0, "longer than the clip"
            if end - start < (words_s[1] - words_s[0]) * 16_000:
                assert words_s[0] * 16_000 - 1 <= start and end <= words_s[1] * 16_000 + 1


@pytest.mark.slow
def test_the_command_writes_weights_and_continues_where_it_was_stopped(trained, tiny_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(refine, "SAVE_EVERY", 1)
    monkeypatch.setattr(refine, "WINDOW", 100)
    run = lambda out, *more: refine.main(
        [
            f"--checkpoint={trained}",
            f"--data_dir={tiny_dir}",
            f"--out={tmp_path / out}",
            "--batch_size=2",
            "--gaps_per_clip=1",
            *more,
        ]
    )
    assert run("whole", "--steps=3") == 0
    whole = weights.read(tmp_path / "whole")
    assert whole.config.refiner == refine.NUM_BLOCKS and set(whole.params) == {refiner.NETWORK, refiner.REFINER}
    assert not (tmp_path / "whole.training").exists() and whole.facts["measured"] == {}

    saved, original = [], refine.save

    def stop_after_a_step(path, **arrays):
        original(path, **arrays)
        saved.append(path)
        if len(saved) == 2:  # the predictions, and one step
            raise KeyboardInterrupt

    monkeypatch.setattr(refine, "save", stop_after_a_step)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", "--steps=3")
    assert not (tmp_path / "stopped").exists()
    assert run("stopped", "--steps=3") == 0
    for name, x in weights.flat(whole.params).items():
        np.testing.assert_array_equal(weights.flat(weights.read(tmp_path / "stopped").params)[name], x)
    capsys.readouterr()
    assert run("whole", "--steps=3") == 2 and "pass --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint=nothing"], "no weights 'nothing'"),
        (["--checkpoint=a_si", "--steps=0"], "--steps: found 0, expected 1 or more"),
        (["--checkpoint=a_si", "--gaps_per_clip=-1"], "--gaps_per_clip: found -1"),
        (["--checkpoint=a_si"], "no records in"),
    ],
)
def test_wrong_arguments_take_one_line(arguments, message, tmp_path, capsys):
    assert refine.main([*arguments, f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("avsi_jax.inference.refine: ") and error.count("\n") == 1 and message in error
