"""The training step of av_mtl_s2s, ours and the same work in other frameworks; train_step.py times each in a process of its own.

A contender is set up by (args) -> ({task: function that does it once and waits}, facts). Frameworks are imported only by the
contender that needs them.
"""

from __future__ import annotations

import functools
import os
import time
from argparse import Namespace
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

from benchmarks.speed import traces

if TYPE_CHECKING:
    from flax import linen as nn

FRAMES, BANDS, MOTION, UNITS, BOTTLENECK, LABELS, TEXT, LAYERS = 149, 64, 136, 256, 136, 42, 24, 3
Contender = tuple[dict[str, Callable[[], object]], dict[str, object]]  # tasks, facts


def random_features(batch_size: int) -> dict:
    """Random features and labels of a batch, the same for every contender."""
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda n: rng.normal(size=(batch_size, FRAMES, n)).astype(np.float32)
    labels = rng.integers(1, 28, (batch_size, TEXT)).astype(np.int32)
    return {"spectrogram": draw(BANDS), "video": draw(MOTION), "target": draw(BANDS), "labels": labels}


def gflop(batch_size: int) -> tuple[float, float]:
    """Multiplications and additions of the matrix products in a forward pass and in a training step, in 1e9.

    A training step has the forward pass, the gradients of all weights, and of all inputs except the features.
    """
    recurrent = LAYERS * 2 * 2 * UNITS * 4 * UNITS
    inputs = sum(first + (LAYERS - 1) * 2 * UNITS for first in (MOTION, BANDS + BOTTLENECK)) * 2 * 4 * UNITS
    dense = 2 * UNITS * BOTTLENECK + BOTTLENECK * LABELS + 2 * UNITS * BANDS
    forward = recurrent + inputs + dense
    feature_gradients = (MOTION + BANDS) * 2 * 4 * UNITS
    scale = 2 * batch_size * FRAMES / 1e9
    return forward * scale, (3 * forward - feature_gradients) * scale


# ---- the contenders ------------------------------------------------------------------------------------------------------------


def raw_batch(batch_size: int) -> dict:
    """A batch of noise as input_pipeline gives it, for the training step that computes its features itself."""
    import numpy as np

    from avsi_jax.data import input_pipeline

    rng = np.random.default_rng(1)
    clip = {"text": "bin blue at f two now", "words": [], "offset_s": 0, "frame_size": (720, 576), "fps": 25,
            "audio": rng.integers(-3000, 3000, 47_648).astype(np.int16), "landmarks_valid": np.ones(75, bool),
            "landmarks": rng.normal(300, 20, (75, 68, 2)).astype(np.float32)}  # fmt: skip
    clips = [input_pipeline.to_example(clip | {"id": f"clip{k}"}) for k in range(batch_size)]
    return {k: np.stack([np.asarray(c[k]) for c in clips]) for k, v in clips[0].items() if not isinstance(v, str)}


def set_up_jax(args: Namespace) -> ModuleType:
    """Imports jax with one device per core and the precision that `args` asks for."""
    from avsi_jax.runtime import devices

    devices.use_every_core(args.batch_size)
    import jax

    if args.precision != "tf32":  # XLA's default on an NVIDIA GPU
        jax.config.update("jax_default_matmul_precision", "highest")
    return jax


def flax_layer(cell: str, units: int, *_: object, name: str, **__: object) -> nn.Module:
    """Replaces lstm.BidirectionalLSTM: flax's own cell in its own RNN and Bidirectional."""
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, lengths=None):
            forward, backward = (nn.RNN(getattr(nn, cell)(units)) for _ in range(2))
            return nn.Bidirectional(forward, backward)(x)

    return Layer(name=name)


def ours(args: Namespace, cell: str = "") -> Contender:
    """The training step of this project; with `cell`, flax's own layers replace its LSTM."""
    jax = set_up_jax(args)
    from avsi_jax import configs
    from avsi_jax.data import features
    from avsi_jax.models import build, systems
    from avsi_jax.runtime import devices
    from avsi_jax.training import train_step
    from avsi_jax.training.optimiser import make_optimiser

    overrides = [("batch_size", str(args.batch_size)), ("lstm", args.lstm)]
    if cell:
        systems.BidirectionalLSTM = functools.partial(flax_layer, cell)
    elif "dtype" in configs.fields(configs.load("base")):
        overrides.append(("dtype", args.dtype))
    elif args.dtype != "float32":
        systems.BidirectionalLSTM = functools.partial(systems.BidirectionalLSTM, dtype=args.dtype)
    config = configs.load("av_mtl_s2s", overrides, like="base")

    raw, given = raw_batch(args.batch_size), random_features(args.batch_size)
    ready = build.example_features(config, args.batch_size)._replace(
        **{k: v for k, v in given.items() if k in features.Features._fields}
    )
    ready = {f"ready_{k}": jax.device_get(v) for k, v in ready._asdict().items()}
    batch = raw | ready | {"labels": raw["labels"] * 0, "label_length": raw["label_length"] * 0 + TEXT}
    batch["labels"][:, :TEXT] = given["labels"]

    state = devices.replicate(train_step.init_state(config, 1))
    make_features = features.make_features

    def compiled(batch, from_raw: bool):
        features.make_features = make_features if from_raw else given_features
        step = devices.map_train_step(train_step.make_train_step(config, make_optimiser(config, 1)))
        start = time.perf_counter()
        return step.lower(state, devices.split(batch)).compile(), time.perf_counter() - start

    given_features = lambda batch, *_: features.Features(*(batch[f"ready_{k}"] for k in features.Features._fields))

    # The one whose compile time is reported comes first: the next one reuses what jax has traced already.
    raw_step, raw_s = compiled(raw, from_raw=True) if not cell and not args.short else (None, None)
    step, features_s = compiled(batch, from_raw=False)
    box = [state]

    def run(step, batch):
        box[0], metrics = step(box[0], devices.split(batch))
        jax.block_until_ready((box[0], metrics))

    model = build.make_model(config)
    forward = devices.map_evaluation_step(
        lambda params, batch: devices.sum_over_devices(model.apply({"params": params}, given_features(batch)).level.sum())
    )
    params = jax.device_put(jax.device_get(state.params), jax.local_devices()[0])
    one = jax.device_put(jax.tree.map(lambda v: v[:1], given_features(ready)))
    single = jax.jit(lambda params, given: model.apply({"params": params}, given).level)
    tasks = {
        "step": lambda: run(step, batch),
        "forward": lambda: jax.block_until_ready(forward(box[0].params, devices.split(batch))),
        "single": lambda: jax.block_until_ready(single(params, one)),
        "peak": lambda: matmul_gflops(jax.numpy.ones, jax.block_until_ready),
    }
    if raw_step:
        tasks["from_raw"] = lambda: run(raw_step, raw)
    if args.profile:
        tasks["profile"] = lambda: traces.trace_jax(jax, tasks["step"], args.profile)
    facts = {"compile_s": raw_s or features_s, "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
             "platform": jax.default_backend()}  # fmt: skip
    return tasks, facts | {"version": f"jax {jax.__version__}"}


def matmul_gflops(make: Callable, wait: Callable, n: int = 2048) -> float:
    """Highest rate of five products of n x n float32 matrices, in GFLOP/s. make(shape) -> array; wait(array)."""
    a, best = make((n, n)), 0.0
    for _ in range(6):
        start = time.perf_counter()
        wait(a @ a)
        best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def torch_contender(args: Namespace) -> Contender:
    """nn.LSTM on all threads of the CPU, or with cuDNN on a GPU."""
    import torch

    cuda = torch.cuda.is_available()
    device, use_bfloat16 = torch.device("cuda" if cuda else "cpu"), args.precision == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            stack = lambda inputs: torch.nn.LSTM(inputs, UNITS, LAYERS, bidirectional=True)
            self.encoder, self.decoder = stack(MOTION), stack(BANDS + BOTTLENECK)
            self.bottleneck = torch.nn.Linear(2 * UNITS, BOTTLENECK)
            self.ctc, self.output = torch.nn.Linear(BOTTLENECK, LABELS), torch.nn.Linear(2 * UNITS, BANDS)

        def forward(self, video, spectrogram):
            video_code = torch.relu(self.bottleneck(self.encoder(video)[0]))
            return self.output(self.decoder(torch.cat([spectrogram, video_code], -1))[0]), self.ctc(video_code)

    network = Network().to(device)
    adam = torch.optim.Adam(network.parameters(), 1e-3)
    given = random_features(args.batch_size)
    time_major = (given[k].swapaxes(0, 1).copy() for k in ("video", "spectrogram", "target"))  # (T, B, ...) is fastest
    video, spectrogram, target, labels = (torch.tensor(v).to(device) for v in (*time_major, given["labels"]))
    steps, lengths = (torch.full((args.batch_size,), n) for n in (FRAMES, TEXT))
    wait = torch.cuda.synchronize if cuda else lambda: None
    cast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16)

    def step():
        adam.zero_grad()
        with cast():
            level, logits = network(video, spectrogram)
        error = ((level.float() - target) ** 2).mean()
        ctc = torch.nn.functional.ctc_loss(logits.float().log_softmax(-1), labels, steps, lengths, reduction="sum")
        (error + 1e-3 * ctc / args.batch_size).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        wait()

    def forward(clips: int):
        with torch.inference_mode(), cast():
            network(video[:, :clips], spectrogram[:, :clips])
        wait()

    tasks = {"step": step, "forward": lambda: forward(args.batch_size), "single": lambda: forward(1)}
    tasks["peak"] = lambda: matmul_gflops(lambda shape: torch.ones(shape, device=device), lambda _: wait())
    if args.profile:
        tasks["profile"] = lambda: traces.trace_torch(torch, step, args.profile)
    return tasks, {"devices": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} threads",
                  "platform": "gpu" if cuda else "cpu", "version": f"torch {torch.__version__}"}  # fmt: skip


def keras_contender(args: Namespace) -> Contender:
    """Keras' LSTM and its own training step, with backend jax."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras
    import numpy as np

    both = lambda x: keras.layers.Bidirectional(keras.layers.LSTM(UNITS, return_sequences=True))(x)
    video, spectrogram = keras.Input((FRAMES, MOTION)), keras.Input((FRAMES, BANDS))
    video_code = keras.layers.Dense(BOTTLENECK, "relu")(functools.reduce(lambda x, _: both(x), range(LAYERS), video))
    logits = keras.layers.Dense(LABELS, name="logits")(video_code)
    joined = keras.layers.Concatenate()([spectrogram, video_code])
    level = keras.layers.Dense(BANDS, name="level")(functools.reduce(lambda x, _: both(x), range(LAYERS), joined))
    model = keras.Model([video, spectrogram], [level, logits])
    adam = keras.optimizers.Adam(1e-3, global_clipnorm=1.0)
    model.compile(adam, loss=["mse", keras.losses.CTC()], loss_weights=[1.0, 1e-3], jit_compile=True)
    given = random_features(args.batch_size)
    x, y = [given["video"], given["spectrogram"]], [given["target"], given["labels"]]
    tasks = {
        "step": lambda: np.asarray(model.train_on_batch(x, y)),
        "forward": lambda: model.predict_on_batch(x),
        "single": lambda: model.predict_on_batch([v[:1] for v in x]),
    }
    return tasks, {"version": f"keras {keras.__version__}, {keras.backend.backend()}"}


CONTENDERS = {
    "ours": ours,
    "torch": torch_contender,
    "flax": functools.partial(ours, cell="LSTMCell"),
    "flax_optimized": functools.partial(ours, cell="OptimizedLSTMCell"),
    "keras": keras_contender,
}
