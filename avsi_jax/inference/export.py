"""avsi-export: a trained system as one file that jax alone runs, sound in, sound out, on CPU, CUDA and TPU; beside it its weights.

The whole way of a repair (features, network, vocoder) is lowered once for all three platforms by jax.export, the parameters inside,
for any number of clips, gaps and pictures; the scans of the LSTMs are those that each platform does best, no custom call of any
library is left. What makes pictures into face points, other rates into 16 kHz and clips of other lengths into windows stays here:
who loads the file brings sound at 16 kHz and points in pixels. docs/export.md has the inputs and an example.

Letters: b clips, g gaps, t pictures, all free; N samples, F frames, K bands, S steps and C labels are the system's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from avsi_jax.runtime import unexpected_errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from avsi_jax.inference.trained_run import Run

PROGRAM, TOLD = "model.jaxexport", "export.json"
PLATFORMS = ("cpu", "cuda", "tpu")
CHECKS = "shape_assertion"  # the only custom call there may be: jax's own, of free shapes; it is gone once they are known
INPUTS = {  # name -> (shape, type, what)
    "sound": ("b N", "float32", "in [-1, 1) at 16 kHz; what stands in a gap is never looked at"),
    "length": ("b", "int32", "samples of each clip, at most N; behind them the sound is 0"),
    "gaps": ("b g 2", "int32", "[start, end) of what is lost, samples; 0 0 where a clip has fewer"),
    "landmarks": ("b t 68 2", "float32", "iBUG face points of each picture, pixels x y; the last one repeated behind a clip's end"),
    "landmarks_valid": ("b t", "bool", "whether a picture shows the face; all false: repaired by the sound alone"),
    "num_pictures": ("b", "int32", "pictures of each clip, at least 1"),
    "fps": ("b", "float32", "pictures a second"),
    "lag_s": ("b", "float32", "seconds by which the sound comes after the picture; 0 where they fit"),
    "picture_size": ("b 2", "int32", "width and height of the pictures, pixels"),
    "seed": ("b", "uint32", "of the vocoder's first phases: the same gives the same sound"),
}
IN_BATCH = {"length": "audio_length", "num_pictures": "num_frames", "lag_s": "offset_s", "picture_size": "frame_size",
            "seed": "id_hash"}  # fmt: skip
FULL_SCALE = 32768.0  # a raw batch holds 16-bit samples


def program(run: Run) -> Callable[[dict], dict]:
    """inputs as in INPUTS -> {'sound' (b, n) at the preset's rate, 'level' (b, F, K), and of systems that read 'logits' (b, S, C)
    of which the first 'num_steps' (b,) are a clip's}: the way of `restorer.Restorer`, with the parameters inside.
    """
    import jax
    import jax.numpy as jnp

    from avsi_jax import presets
    from avsi_jax.inference import restorer
    from avsi_jax.models import build

    preset, params = presets.get(run.config.preset), _smallest(run.params)
    feature_config = dataclasses.replace(build.make_feature_config(run.config, run.normalisation), protocol="waveform")
    of = lambda way: build.make_model(_with_lstm(run.config, way))
    predict = lambda way: lambda *a: restorer.predict(of(way), feature_config, *a)[1:]

    def filled(clip):  # one by one: the vocoder takes several at a time by their number, which is free here
        level, audio, length, gaps, seed = (a[None] for a in clip)
        return restorer.inpaint_at_preset(level, audio * FULL_SCALE, length, gaps, seed, preset)[0]

    def repair(x: dict) -> dict:
        batch = {IN_BATCH.get(k, k): v for k, v in x.items()} | {"audio": x["sound"] * FULL_SCALE}
        whole = jax.tree.map(lambda p: jnp.asarray(p).astype(jnp.float32), params)
        arguments = whole, batch, x["gaps"]
        level, logits, steps = jax.lax.platform_dependent(*arguments, cpu=predict("separate"), default=predict("joined"))
        audio = jax.lax.map(filled, (level, x["sound"], x["length"], x["gaps"], x["seed"]))
        read = {} if logits is None else {"logits": logits, "num_steps": steps}
        return {"sound": audio, "level": level, **read}

    return repair


def _smallest(params: dict) -> dict:
    """As float16 where that loses nothing, as in shipped weights: half the file."""
    import jax
    import numpy as np

    with np.errstate(over="ignore"):
        half = jax.tree.map(lambda p: np.asarray(p, np.float16), params)
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), half, params)
    return half if all(jax.tree.leaves(same)) else params


def _with_lstm(config, way: str):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.lstm = way
    return config


def exported(run: Run):
    """The jax.export.Exported of `program`; ValueError where a library's custom call is in it."""
    import re

    import jax
    from jax import export

    from avsi_jax import presets

    sizes = dict(zip("bgt", export.symbolic_shape("b, g, t"), strict=True)) | {"N": presets.get(run.config.preset).record_samples}
    shape = lambda letters: tuple(sizes.get(n) or int(n) for n in letters.split())
    inputs = {k: jax.ShapeDtypeStruct(shape(letters), dtype) for k, (letters, dtype, _) in INPUTS.items()}
    found = export.export(jax.jit(program(run)), platforms=PLATFORMS)(inputs)
    if calls := sorted(set(re.findall(r"custom_call @(\w+)", found.mlir_module())) - {CHECKS}):
        raise ValueError(f"{run.config.system}: found custom calls ({', '.join(calls)}) in its program, expected none")
    return found


def write(folder: str | Path, run: Run, facts: dict, *, overwrite: bool = False) -> Path:
    """FOLDER/model.jaxexport, export.json (its inputs and outputs), and the weights with their card (weights.write)."""
    from avsi_jax.inference import weights
    from avsi_jax.runtime import storage

    folder = Path(folder)
    for name in (PROGRAM, TOLD):
        if (folder / name).exists() and not overwrite:
            raise FileExistsError(f"{folder / name} exists; take --overwrite to replace it, or another folder")
    made = exported(run)
    weights.write(folder, run, facts, overwrite=overwrite)
    storage.write_bytes(folder / PROGRAM, bytes(made.serialize()))
    storage.write_text(folder / TOLD, json.dumps(told(run, made), indent=1) + "\n")
    card = folder / weights.CARD
    storage.write_text(card, f"{card.read_text()}\n{SAID}")
    return folder


def told(run: Run, made) -> dict:
    """What a program that loads the file wants to know."""
    import jax

    from avsi_jax import presets

    preset = presets.get(run.config.preset)
    outputs = jax.tree.unflatten(made.out_tree, made.out_avals)
    return {
        "system": run.config.system,
        "step": run.step,
        "platforms": list(made.platforms),
        "calling_convention_version": made.calling_convention_version,
        "jax": jax.__version__,
        "inputs": {k: {"shape": letters, "dtype": dtype, "what": what} for k, (letters, dtype, what) in INPUTS.items()},
        "outputs": {k: {"shape": " ".join(map(str, v.shape)), "dtype": str(v.dtype)} for k, v in outputs.items()},
        "N": preset.record_samples,
        "input_rate": presets.RECORD_RATE,
        "sound_rate": preset.rate,
        "units": run.config.ctc_units,
    }


SAID = """## As one program

`model.jaxexport` is the whole way from a damaged sound and face points to the repaired sound, parameters inside, for CPU, CUDA and
TPU; jax and numpy alone run it (`pip install jax flatbuffers`):

    from jax import export

    program = export.deserialize(bytearray(open("model.jaxexport", "rb").read()))
    restored = program.call(inputs)  # a dict of arrays as export.json tells -> "sound", "level"
"""


@unexpected_errors.reported("avsi-export")
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "avsi-export", description="Write a trained system as one file that jax alone runs, with its weights beside it."
    )
    parser.add_argument("--checkpoint", default="pretrained", help="a training's workdir, a folder of weights, or shipped weights")
    parser.add_argument("--out", required=True, help="the folder to write; its name is that of the weights")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    known = parser.parse_args(argv)
    try:
        folder = export_checkpoint(known.checkpoint, known.out, known.overwrite)
    except (ValueError, OSError) as error:
        print(f"avsi-export: {error}", file=sys.stderr)
        return 2
    print("\n".join(f"{path}  {path.stat().st_size} bytes" for path in sorted(folder.iterdir())))
    return 0


def export_checkpoint(checkpoint: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    from avsi_jax.inference import model_card, restorer, weights

    folder = weights.locate(checkpoint)
    found = weights.read(folder) if folder else None
    run = found.run if found else restorer.read_run(checkpoint)
    restorer.Restorer.check(run, checkpoint)
    return write(out, run, found.facts if found else model_card.facts_of(checkpoint, run), overwrite=overwrite)


if __name__ == "__main__":
    sys.exit(main())
