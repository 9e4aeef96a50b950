"""avsi-export: writes a trained system as one file that only needs jax, with its weights beside it.

The program maps audio with gaps and face landmarks to restored audio. It contains features, network, vocoder and parameters,
lowered once for CPU, CUDA and TPU by jax.export, for any number of clips, gaps and video frames. Each platform gets the LSTM scan
that suits it; no custom call of a library is left. Face tracking, resampling to 16 kHz and splitting long clips into windows are
not part of the program: its inputs are audio at 16 kHz and landmarks in pixels. docs/export.md lists the inputs with an example.

Letters: b clips, g gaps, t video frames, all free; N samples, F spectrogram frames, K bands, S CTC steps and C labels are fixed by
the system.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.runtime import unexpected_errors
from avsi_jax.runtime.command_line import Parser

if TYPE_CHECKING:
    from collections.abc import Callable

    import jax.export
    import ml_collections

    from avsi_jax.inference.trained_run import Run

PROGRAM, DESCRIPTION = "model.jaxexport", "export.json"
PLATFORMS = ("cpu", "cuda", "tpu")
SHAPE_CHECK = "shape_assertion"  # the only custom call allowed: jax's own check of free shapes, gone once they are known
INPUTS = {  # name -> (shape, type, description)
    "audio": ("b N", "float32", "in [-1, 1) at 16 kHz; the samples inside a gap are ignored"),
    "audio_length": ("b", "int32", "samples of each clip, at most N; the audio after them is 0"),
    "gaps": ("b g 2", "int32", "[start, end) of each gap in samples; 0 0 where a clip has fewer"),
    "landmarks": ("b t 68 2", "float32", "iBUG-68 landmarks of each video frame, pixels x y; the last repeated after a clip's end"),
    "landmarks_valid": ("b t", "bool", "whether the frame shows the face; all false: audio-only inpainting"),
    "num_frames": ("b", "int32", "video frames of each clip, at least 1"),
    "fps": ("b", "float32", "video frames per second"),
    "offset_s": ("b", "float32", "A/V offset in seconds; positive: audio lags video"),
    "frame_size": ("b 2", "int32", "width and height of the video frames, pixels"),
    "seed": ("b", "uint32", "seed of the vocoder's initial phases: the same seed gives the same audio"),
}
IN_BATCH = {"seed": "id_hash"}  # inputs that a raw batch calls otherwise
FULL_SCALE = 32768.0  # a raw batch holds 16-bit samples


def make_program(run: Run) -> Callable[[dict], dict]:
    """The function that is exported: what `restorer.Restorer` computes, with the parameters of `run` as constants.

    It maps the arrays of INPUTS to {"audio": (b, n) at the preset's rate, "level": (b, F, K)}. Systems with a text head add
    "logits" (b, S, C), of which the first "num_steps" (b,) belong to the clip.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax import presets
    from avsi_jax.inference import restorer
    from avsi_jax.models import build

    preset, params = presets.get(run.config.preset), _smallest(run.params)
    feature_config = dataclasses.replace(build.make_feature_config(run.config, run.normalisation), protocol="waveform")
    model_of = lambda lstm: build.make_model(_with_lstm(run.config, lstm))
    predict = lambda lstm: lambda *a: restorer.predict(model_of(lstm), feature_config, *a)[1:]

    def inpaint_clip(clip):  # one by one: the vocoder chooses its batches by the number of clips, which is free here
        level, audio, length, gaps, seed = (a[None] for a in clip)
        return restorer.inpaint_at_preset(level, audio * FULL_SCALE, length, gaps, seed, preset)[0]

    def inpaint(x: dict) -> dict:
        batch = {IN_BATCH.get(k, k): v for k, v in x.items()} | {"audio": x["audio"] * FULL_SCALE}
        float_params = jax.tree.map(lambda p: jnp.asarray(p).astype(jnp.float32), params)
        arguments = float_params, batch, x["gaps"]
        level, logits, steps = jax.lax.platform_dependent(*arguments, cpu=predict("separate"), default=predict("joined"))
        audio = jax.lax.map(inpaint_clip, (level, x["audio"], x["audio_length"], x["gaps"], x["seed"]))
        text = {} if logits is None else {"logits": logits, "num_steps": steps}
        return {"audio": audio, "level": level, **text}

    return inpaint


def _smallest(params: dict) -> dict:
    """Parameters as float16 where no value changes, as with shipped weights: half the file size."""
    import jax
    import numpy as np

    with np.errstate(over="ignore"):
        half = jax.tree.map(lambda p: np.asarray(p, np.float16), params)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), half, params)
    return half if all(jax.tree.leaves(same)) else params


def _with_lstm(config: ml_collections.ConfigDict, lstm: str) -> ml_collections.ConfigDict:
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lstm = lstm
    return config


def export_run(run: Run) -> jax.export.Exported:
    """`make_program` lowered for all PLATFORMS; ValueError where the program contains a custom call of a library."""
    import re

    import jax
    from jax import export

    from avsi_jax import presets

    sizes = dict(zip("bgt", export.symbolic_shape("b, g, t"), strict=True)) | {"N": presets.get(run.config.preset).record_samples}
    shape = lambda letters: tuple(sizes.get(n) or int(n) for n in letters.split())
    inputs = {k: jax.ShapeDtypeStruct(shape(letters), dtype) for k, (letters, dtype, _) in INPUTS.items()}
    exported = export.export(jax.jit(make_program(run)), platforms=PLATFORMS)(inputs)
    if calls := sorted(set(re.findall(r"custom_call @(\w+)", exported.mlir_module())) - {SHAPE_CHECK}):
        raise ValueError(f"{run.config.system}: found custom calls ({', '.join(calls)}) in its program, expected none")
    return exported


def write(folder: str | Path, run: Run, facts: dict, *, overwrite: bool = False) -> Path:
    """Writes model.jaxexport, export.json (its inputs and outputs) and the weights with their card (`weights.write`).

    Returns the folder. FileExistsError where an export exists, unless `overwrite`.
    """
    from avsi_jax.inference import weights
    from avsi_jax.runtime import storage

    folder = Path(folder)
    for name in (PROGRAM, DESCRIPTION):
        if (folder / name).exists() and not overwrite:
            raise FileExistsError(f"{folder / name} exists; pass --overwrite to replace it, or choose another folder")
    exported = export_run(run)
    weights.write(folder, run, facts, overwrite=overwrite)
    storage.write_bytes(folder / PROGRAM, bytes(exported.serialize()))
    storage.write_text(folder / DESCRIPTION, json.dumps(describe(run, exported), indent=1) + "\n")
    card = folder / weights.CARD
    storage.write_text(card, f"{card.read_text()}\n{CARD_SECTION}")
    return folder


def describe(run: Run, exported: jax.export.Exported) -> dict:
    """The content of export.json: system, platforms, and shape and type of every input and output."""
    import jax

    from avsi_jax import presets

    preset = presets.get(run.config.preset)
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {
        "system": run.config.system,
        "step": run.step,
        "platforms": list(exported.platforms),
        "calling_convention_version": exported.calling_convention_version,
        "jax": jax.__version__,
        "inputs": {k: {"shape": letters, "dtype": dtype, "description": text} for k, (letters, dtype, text) in INPUTS.items()},
        "outputs": {k: {"shape": " ".join(map(str, v.shape)), "dtype": str(v.dtype)} for k, v in outputs.items()},
        "N": preset.record_samples,
        "input_rate": presets.RECORD_RATE,
        "audio_rate": preset.rate,
        "units": run.config.ctc_units,
    }


CARD_SECTION = """## The exported program

`model.jaxexport` maps audio with gaps and face landmarks to restored audio, parameters included, on CPU, CUDA and TPU. It needs
only jax and numpy (`pip install jax flatbuffers`):

    from jax import export

    program = export.deserialize(bytearray(open("model.jaxexport", "rb").read()))
    restored = program.call(inputs)  # a dict of arrays as listed in export.json -> "audio", "level"
"""


@unexpected_errors.reported("avsi-export")
def main(argv: list[str] | None = None) -> int:
    """The command avsi-export; returns its exit code."""
    parser = Parser(
        "avsi-export", description="Write a trained system as one file that only needs jax, with its weights beside it."
    )
    parser.add_argument(
        "--checkpoint", default="pretrained", help="a run directory, a folder of weights, or the name of shipped weights"
    )
    parser.add_argument("--out", required=True, help="output folder; its name becomes the name of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    known = parser.parse_args(argv)
    try:
        folder = export_checkpoint(known.checkpoint, known.out, known.overwrite)
    except (ValueError, OSError) as error:
        print(f"avsi-export: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path}  {path.stat().st_size} bytes" for path in sorted(folder.iterdir())))
    return 0


def export_checkpoint(checkpoint: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Exports a run directory, a folder of weights or shipped weights into the folder `out`, which is returned."""
    from avsi_jax.inference import model_card, restorer, weights

    folder = weights.locate(checkpoint)
    loaded = weights.read(folder) if folder else None
    run = loaded.run if loaded else restorer.read_run(checkpoint)
    restorer.Restorer.check(run, checkpoint)
    return write(out, run, loaded.facts if loaded else model_card.facts_of(checkpoint, run), overwrite=overwrite)


if __name__ == "__main__":
    sys.exit(main())
