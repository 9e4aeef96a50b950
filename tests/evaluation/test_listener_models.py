"""Listener models against the package they come from, on the shipped example clip; what happens without that package."""

import numpy as np
import pytest

from avsi_jax.evaluation import cli, listener_models, metrics
from avsi_jax.inpainting import cli_jobs
from avsi_jax.media import clip_io

pytest.importorskip("speechmos")
GAPS_S = ((1.0, 1.5),)


@pytest.fixture(scope="module")
def recording():
    """(N,) float32 at 16 kHz: the audio of the example clip."""
    audio = clip_io.read_clip(cli_jobs.EXAMPLE, video=False).audio
    return clip_io.resample(clip_io.mono(audio.samples), audio.rate, 16_000)


@pytest.mark.slow
def test_the_scores_are_those_of_the_package(recording, monkeypatch):
    from speechmos import dnsmos, plcmos

    np.random.seed(0)  # the package draws its raters from numpy's generator
    assert listener_models.plcmos(recording) == pytest.approx(plcmos.run(recording, 16_000)["plcmos"], abs=1e-4)
    assert listener_models.dnsmos(recording) == pytest.approx(dnsmos.run(recording, 16_000)["ovrl_mos"], abs=1e-4)
    longer = np.tile(recording, 4)[:170_000]
    assert listener_models.dnsmos(longer) == pytest.approx(dnsmos.run(longer, 16_000)["ovrl_mos"], abs=1e-4)


def test_noise_scores_below_speech_and_every_call_gives_the_same(recording):
    noisy = recording + 0.05 * np.random.default_rng(1).standard_normal(recording.size).astype(np.float32)
    clean, worse = (listener_models.plcmos(x) for x in (recording, noisy))
    assert 1 <= worse < clean - 0.5 and clean <= 5
    assert listener_models.plcmos(recording) == clean


def test_audio_above_full_scale_is_scored_as_it_is_played(recording):
    loud = 3 * recording / np.abs(recording).max()
    assert listener_models.plcmos(loud) == listener_models.plcmos(np.clip(loud, -1, 1))


def test_only_the_chosen_models_score_and_only_at_their_rate(recording):
    gap = recording.copy()
    gap[16_000:24_000] = 0
    row, plain = metrics.score(recording, gap, 16_000, GAPS_S, ["plcmos"]), metrics.score(recording, gap, 16_000, GAPS_S)
    assert row["plcmos"] == listener_models.plcmos(gap) and row["dnsmos"] is None and row["reason"] == ""
    assert plain == row | {"plcmos": None}
    low = [clip_io.resample(x, 16_000, 8_000) for x in (recording, gap)]
    narrow = metrics.score(*low, 8_000, GAPS_S, ["plcmos"])
    assert narrow["plcmos"] is None and narrow["reason"] == ""


@pytest.mark.slow
def test_workers_give_the_same_scores(recording):
    gap = recording.copy()
    gap[16_000:24_000] = 0
    (row,) = metrics.score_many([(recording, gap, 16_000, GAPS_S)], workers=1, listener_models=("plcmos",))
    alone = metrics.score(recording, gap, 16_000, GAPS_S, ("plcmos",))
    assert row == alone | {"gap_l1_db": pytest.approx(alone["gap_l1_db"], rel=1e-6)}  # a batch of another size


def test_without_the_package_the_evaluation_leaves_them_out_and_names_it(monkeypatch, capsys):
    from avsi_jax import configs

    config = configs.load("eval")
    assert cli.installed_listener_models(config) == ("plcmos", "dnsmos")
    monkeypatch.setattr(listener_models, "missing_packages", lambda: ["speechmos"])
    assert cli.installed_listener_models(config) == ()
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "plcmos and dnsmos" in error and "speechmos" in error and "avsi_jax[eval]" in error
    config.listener_models = ""
    assert cli.installed_listener_models(config) == () and capsys.readouterr().err == ""


def test_an_unknown_model_is_an_error():
    from avsi_jax import configs

    config = configs.load("eval")
    config.listener_models = "plcmos,nisqa"
    with pytest.raises(ValueError, match="config.listener_models: found nisqa, expected plcmos or dnsmos"):
        cli.check(config)
