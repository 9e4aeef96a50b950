"""Short trainings that are interrupted and resumed, and the comparison with an uninterrupted one."""

import numpy as np

from tests.support import tiny_runs

INTERRUPTED = ("-m", "tests.support.signal_at_phase")  # command of a training that gets a signal
FIELDS = {"units": 8, "bottleneck": 8, "epochs": 12, "checkpoint_every": 4, "checkpoint_seconds": 0.5, "watchdog_s": 60}


def arguments(workdir, data_dir, **fields) -> list[str]:
    """Arguments of avsi-train: 24 training steps of a tiny network, a checkpoint every half second; `fields` override."""
    return tiny_runs.arguments(workdir, data_dir, **FIELDS | fields)


def assert_same_run(workdir, other) -> None:
    """Asserts equal bytes of metrics.csv and bit-identical newest checkpoints."""
    import jax

    from avsi_jax import configs
    from avsi_jax.training import train_step
    from avsi_jax.training.checkpoints import Checkpoints, find_fault

    assert (workdir / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    like = train_step.init_state(configs.load("tiny", [(k, str(v)) for k, v in FIELDS.items()]), 2)
    states = []
    for folder in (workdir, other):
        checkpoints = Checkpoints(folder, read_only=True)
        step = checkpoints.latest_step()
        assert find_fault(folder / "checkpoints" / str(step)) is None
        states.append(checkpoints.restore(step, like))
        checkpoints.close()
    (a, host_a), (b, host_b) = states
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert {k: v for k, v in host_a.items() if k != "seconds"} == {k: v for k, v in host_b.items() if k != "seconds"}
