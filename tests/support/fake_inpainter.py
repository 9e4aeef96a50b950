"""A made-up Inpainter for tests of avsi-inpaint: the command is tested, the networks are not; and what such tests ask of files."""

import dataclasses
import errno
from pathlib import Path

import numpy as np

from avsi_jax.inpainting import api, cli
from avsi_jax.media import clip_io


@dataclasses.dataclass
class FakeInpainter:
    """An Inpainter that writes a few bytes, and does to a clip what its name says."""

    calls: list = dataclasses.field(default_factory=list)

    def inpaint_file(self, source, target, gaps, *, face, sync, overwrite, progress):
        self.calls.append({"source": source, "target": target, "gaps": gaps, "face": face, "sync": sync, "overwrite": overwrite})
        progress(0.5)
        kind = Path(source).stem
        if kind in RAISED:
            raise RAISED[kind]
        if kind == "whole" and gaps == "auto":
            raise ValueError(f"{source}: no hole found; expected digital silence")
        found = [(0.5, 0.75)] if gaps == "auto" else gaps
        Path(target).write_bytes(b"restored")
        gaps = tuple(api.Gap(a, b, np.float32(0.75), "bin blue at f two now", "sound and lips") for a, b in found)
        return api.FileRepair(gaps, ("half a face",) if kind == "half" else (), None, {"all": 0.1}, str(target), 3.0)


def full_disk():
    error = clip_io.MediaError("out.wav: cannot be written (No space left on device)")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


RAISED = {
    "junk": clip_io.MediaError("cannot be decoded\n(found nothing)"),
    "bug": KeyError("x"),
    "huge": MemoryError(),
    "full": full_disk(),
    "stop": KeyboardInterrupt(),
}


def stand_in(monkeypatch, tmp_path) -> FakeInpainter:
    """In place of every Inpainter from now on, in a folder of the test; `asked`: the checkpoints that were to be loaded."""
    inpainter, asked = FakeInpainter(), []
    monkeypatch.setattr(api.Inpainter, "load", staticmethod(lambda checkpoint: asked.append(checkpoint) or inpainter))
    inpainter.asked = asked
    monkeypatch.chdir(tmp_path)
    return inpainter


def touch(*names):
    """Files of a clip's name, in the current folder."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"a clip")


def run(*arguments) -> int:
    return cli.main([str(a) for a in arguments])


def files() -> list[str]:
    return sorted(p.as_posix() for p in Path(".").rglob("*") if p.is_file())


def one_line(text: str) -> str:
    assert text.startswith("avsi-inpaint: ") and text.count("\n") == 1, text
    return text
