"""What a run shows besides its tables: curves in tensorboard/, and spectrograms of restored validation clips in images/."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from avsi_jax.runtime import storage
from avsi_jax.training.objective import make_objective
from avsi_jax.training.tensorboard import EventWriter, encode_png, spectrogram_image
from avsi_jax.training.train_step import VALIDATION_SEED

if TYPE_CHECKING:
    from etils import epath
    from ml_collections import ConfigDict

    from avsi_jax.data.features import Normalisation
    from avsi_jax.data.input_pipeline import Records

TENSORBOARD, IMAGES = "tensorboard", "images"
CLIPS = 4


class Summaries:
    """TensorBoard events and images of one run that starts or resumes at `step`; a failure to write them is only a warning."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        validation: Records,
        normalisation: Normalisation | None,
        step: int,
        warn: Callable[[str], None],
    ):
        self._config, self._workdir, self._validation, self._normalisation = config, workdir, validation, normalisation
        self._warn, self._restore, self._writer = warn, None, None
        with self._errors_as_warnings():
            self._writer = EventWriter(workdir / TENSORBOARD, step)
            self._writer.text("config", config.to_json(indent=2), step)

    @contextlib.contextmanager
    def _errors_as_warnings(self) -> Iterator[None]:
        try:
            yield
        except storage.StorageError as error:
            self._warn(f"warning: {error}; the training continues without it")

    def write_rows(self, step: int, row: dict[str, float], times: dict[str, float]) -> None:
        """Adds the last rows of metrics.csv and timing.csv to the curves."""
        if self._writer:
            with self._errors_as_warnings():
                self._writer.scalars(step, {k: v for k, v in row.items() if k not in ("step", "epoch")})
                self._writer.scalars(step, {f"timing_{k}": v for k, v in times.items() if k != "step"})
                self._writer.flush()

    def write_image(self, step: int, params: Any) -> None:
        """Every config.images_every steps: an image of the first validation clips as masked, restored and original."""
        from avsi_jax.models import systems

        every = self._config.images_every
        if not every or step % every or not systems.get(self._config.system).restores:
            return
        if self._restore is None:
            self._restore = self._make_restore()
        image = spectrogram_image(*self._restore(params))
        with self._errors_as_warnings():
            storage.write_bytes(self._workdir / IMAGES / f"{step:07d}.png", encode_png(image))
            if self._writer:
                self._writer.image(step, "restored", image)
                self._writer.flush()

    def _make_restore(self) -> Callable[[Any], tuple]:
        """params -> the arguments of `spectrogram_image` for the first clips by id; the network runs on one device."""
        import jax
        import numpy as np

        from avsi_jax.data import input_pipeline
        from avsi_jax.models import systems

        batch = next(input_pipeline.eval_batches(self._validation, min(CLIPS, len(self._validation))))
        arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
        objective = make_objective(self._config, self._normalisation, train=False)

        @jax.jit
        def restore(params, arrays):
            result = objective(params, arrays, jax.random.key(VALIDATION_SEED))  # gaps as drawn for validation
            features = result.features
            restored = systems.composite(result.output.level, features)
            return features.spectrogram, restored, features.target, features.mask, features.num_frames

        def run(params):
            local = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), params)
            *images, num_frames = map(np.asarray, restore(local, arrays))
            return *images, batch["clip_id"], num_frames

        return run

    def close(self) -> None:
        """Writes what is pending."""
        if self._writer:
            with self._errors_as_warnings():
                self._writer.close()
