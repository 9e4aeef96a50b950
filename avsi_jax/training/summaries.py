"""What a run shows beside its tables: curves in tensorboard/, spectrograms of what it restores by then in pictures/."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from avsi_jax.runtime import storage
from avsi_jax.training.objective import make_objective
from avsi_jax.training.tensorboard import EventWriter, encode_png, spectrogram_image

BOARD, VIDEO = "tensorboard", "pictures"
CLIPS = 4


class Summaries:
    """The board and the pictures of one run, which goes on from `step`. What can't be written is told, and done without."""

    def __init__(self, config, workdir, validation, normalisation, step: int, warn: Callable[[str], None]):
        self._config, self._workdir, self._validation, self._normalisation = config, workdir, validation, normalisation
        self._warn, self._restore, self._board = warn, None, None
        with self._told():
            self._board = EventWriter(workdir / BOARD, step)
            self._board.text("config", config.to_json(indent=2), step)

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except storage.StorageError as error:
            self._warn(f"warning: {error}; the training goes on without")

    def rows(self, step: int, row: dict, times: dict) -> None:
        """The last rows of metrics.csv and timing.csv."""
        if self._board:
            with self._told():
                self._board.scalars(step, {k: v for k, v in row.items() if k not in ("step", "epoch")})
                self._board.scalars(step, {f"timing_{k}": v for k, v in times.items() if k != "step"})
                self._board.flush()

    def image(self, step: int, params) -> None:
        """The first validation clips as damaged, restored and recorded, where config.images_every says so."""
        from avsi_jax.models import systems

        every = self._config.images_every
        if not every or step % every or not systems.get(self._config.system).restores:
            return
        if self._restore is None:
            self._restore = self._first_clips()
        image = spectrogram_image(*self._restore(params))
        with self._told():
            storage.write_bytes(self._workdir / VIDEO / f"{step:07d}.png", encode_png(image))
            if self._board:
                self._board.image(step, "restored", image)
                self._board.flush()

    def _first_clips(self):
        """params -> damaged, restored, original levels and gap frames of the first clips by id, and their ids; on one device."""
        import jax
        import numpy as np

        from avsi_jax.data import input_pipeline
        from avsi_jax.models import systems

        batch = next(input_pipeline.eval_batches(self._validation, min(CLIPS, len(self._validation))))
        arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
        objective = make_objective(self._config, self._normalisation, train=False)

        @jax.jit
        def restore(params, arrays):
            found = objective(params, arrays, jax.random.key(self._config.seed + 1))  # the validation's gaps
            features = found.features
            restored = systems.composite(found.output.level, features)
            return features.spectrogram, restored, features.target, features.mask

        def run(params):
            here = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), params)
            return *map(np.asarray, restore(here, arrays)), batch["clip_id"]

        return run

    def close(self) -> None:
        if self._board:
            with self._told():
                self._board.close()
