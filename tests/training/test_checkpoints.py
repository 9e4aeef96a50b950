"""Checkpoints: what is restored equals what was saved, the best one is kept, and a mismatch is an error of one line."""

import gc
import logging

import numpy as np
import pytest

from avsi_jax.training.checkpoints import CheckpointError, Checkpoints


def state_of(step, *, bias=3):
    rng = np.random.default_rng(step)
    params = {"dense": {"kernel": rng.normal(size=(5, 3)).astype(np.float32), "bias": rng.normal(size=bias).astype(np.float32)}}
    return {"step": np.int32(step), "params": params, "lr_scale": np.float32(0.1**step)}


def on_device(tree):
    import jax

    return jax.tree.map(jax.numpy.asarray, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of ten steps, of which the fourth is the best, with keep=2."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in range(1, 11):
        checkpoints.save(step, on_device(state_of(step)), {"progress": {"best": 1e30, "n": step}, "stop": False}, abs(step - 4) / 7)
    checkpoints.close()
    return workdir


def assert_same(a, b):
    import jax

    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), b)


def test_the_newest_checkpoints_and_the_best_one_are_kept(saved):
    folders = sorted(int(p.name) for p in (saved / "checkpoints").iterdir() if p.name.isdigit())
    assert folders == [4, 9, 10]
    checkpoints = Checkpoints(saved, read_only=True)
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (10, 4)


@pytest.mark.parametrize("step", [4, 10])
def test_state_and_host_are_restored(saved, step):
    state, host = Checkpoints(saved, read_only=True).restore(step, on_device(state_of(0)))
    assert_same(state, state_of(step))
    assert host == {"progress": {"best": 1e30, "n": step}, "stop": False}
    assert np.asarray(state["step"]).dtype == np.int32 and np.asarray(state["params"]["dense"]["bias"]).dtype == np.float32


def test_parameters_alone_are_restored_as_numpy_arrays(saved):
    import jax

    like = jax.eval_shape(lambda: on_device(state_of(0)["params"]))
    params = Checkpoints(saved, read_only=True).restore_params(4, like)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    assert_same(params, state_of(4)["params"])


def test_saving_continues_in_an_existing_folder(saved, tmp_path):
    import shutil

    shutil.copytree(saved, tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run", keep=1)
    checkpoints.save(11, on_device(state_of(11)), {}, 0.9)
    checkpoints.wait()
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (11, 4)
    checkpoints.save(12, on_device(state_of(12)), {}, -1.0)
    checkpoints.wait()
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (12, 12)
    checkpoints.close()


def test_an_empty_workdir_has_no_checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest_step() is None and checkpoints.best_step() is None


def message(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_reading_creates_no_folder(tmp_path):
    with pytest.raises(CheckpointError) as error:
        Checkpoints(tmp_path / "none", read_only=True)
    assert str(tmp_path / "none") in message(error) and not (tmp_path / "none").exists()


def test_a_missing_step_is_an_error_that_lists_the_existing_ones(saved):
    with pytest.raises(CheckpointError, match=r"no checkpoint 5 .*\[4, 9, 10\]") as error:
        Checkpoints(saved, read_only=True).restore_params(5, state_of(0)["params"])
    message(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from reads that Orbax abandons
@pytest.mark.parametrize("like", [state_of(0, bias=4), state_of(0) | {"more": np.float32(0)}])
def test_a_state_of_another_shape_is_refused(saved, like):
    with pytest.raises(CheckpointError, match="checkpoint 10 ") as error:
        Checkpoints(saved, read_only=True).restore(10, on_device(like))
    assert "--workdir" in message(error)
    del error
    gc.collect()


@pytest.mark.parametrize("like", [state_of(0, bias=4)["params"], {"other": np.zeros(3, np.float32)}])
def test_parameters_of_another_shape_are_refused(saved, like):
    with pytest.raises(CheckpointError, match="checkpoint 10 ") as error:
        Checkpoints(saved, read_only=True).restore_params(10, like)
    message(error)


def test_orbax_is_quiet_and_the_callers_logging_stays_as_it_is(saved, monkeypatch):
    """A level or a filter that outlived a call would silence the caller's own records of absl."""
    logger, messages = logging.getLogger("absl"), []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logger.level)  # restores it after the test
    logger.setLevel(logging.DEBUG)
    before = logger.level, list(logger.filters)
    Checkpoints(saved, read_only=True).restore(4, on_device(state_of(0)))
    logger.warning("of the caller")
    assert (logger.level, logger.filters) == before and messages == ["of the caller"]
