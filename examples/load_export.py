"""Restores clips by the program of avsi-export, with jax and numpy alone: pip install jax flatbuffers; python load_export.py FOLDER

python load_export.py FOLDER CLIPS.npz OUT.npz reads the arrays listed in export.json; without files, two noise clips are restored.
"""

import sys

import numpy as np
from jax import export

folder, *files = sys.argv[1:]
with open(f"{folder}/model.jaxexport", "rb") as file:
    program = export.deserialize(bytearray(file.read()))
N = next(a.shape[1] for a in program.in_avals if len(a.shape) == 2 and a.dtype == np.float32)  # samples of a clip at 16 kHz

clips = dict(np.load(files[0])) if files else {
    "audio": (0.1 * np.random.default_rng(0).normal(size=(2, N))).astype(np.float32),
    "audio_length": np.full(2, N, np.int32),
    "gaps": np.array([[[16000, 24000]], [[8000, 12000]]], np.int32),  # one gap per clip: [start, end) in samples
    "landmarks": np.zeros((2, 75, 68, 2), np.float32),
    "landmarks_valid": np.zeros((2, 75), bool),  # no face: audio only
    "num_frames": np.full(2, 75, np.int32),
    "fps": np.full(2, 25, np.float32), "offset_s": np.zeros(2, np.float32), "frame_size": np.full((2, 2), (360, 288), np.int32),
    "seed": np.zeros(2, np.uint32),
}  # fmt: skip
restored = {name: np.asarray(value) for name, value in program.call(clips).items()}
print({name: value.shape for name, value in restored.items()})
if files:
    np.savez(files[1], **restored)
