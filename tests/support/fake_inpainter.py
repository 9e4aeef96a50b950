"""A fake Inpainter for tests of avsi-inpaint: the command is tested, the networks are not. And helpers that run the command."""

import dataclasses
import errno
from pathlib import Path

import numpy as np
import pytest

from avsi_jax.inpainting import api, cli
from avsi_jax.inpainting.clip_gaps import NoGapFoundError
from avsi_jax.media import clip_io


@dataclasses.dataclass
class FakeInpainter:
    """An Inpainter that writes a few bytes. The stem of a clip's name decides its outcome: see ERRORS, 'complete' and 'half'.

    calls: the arguments of each inpaint_file. loaded: the checkpoints that were loaded.
    """

    calls: list = dataclasses.field(default_factory=list)
    loaded: list = dataclasses.field(default_factory=list)

    def inpaint_file(self, source, target, gaps, *, face, sync, track, overwrite, progress):
        options = {"face": face, "sync": sync, "track": track, "overwrite": overwrite}
        self.calls.append({"source": source, "target": target, "gaps": gaps} | options)
        progress(0.5)
        stem = Path(source).stem
        if stem in ERRORS:
            raise ERRORS[stem]
        if stem == "complete" and gaps == "auto":
            raise NoGapFoundError(f"{source}: no gap detected; expected digital silence")
        spans = [(0.5, 0.75)] if gaps == "auto" else gaps
        Path(target).write_bytes(b"restored")
        restored = tuple(api.Gap(a, b, np.float32(0.75), "bin blue at f two now", "audio and video") for a, b in spans)
        return api.FileRepair(restored, ("half a face",) if stem == "half" else (), None, {"all": 0.1}, str(target), 3.0)


def disk_full_error() -> clip_io.MediaError:
    """As raised when a clip is written to a full disk."""
    error = clip_io.MediaError("out.wav: cannot be written (No space left on device)")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return error


ERRORS = {
    "no gap detected": clip_io.MediaError("no gap detected.wav: cannot be decoded (found nothing)"),
    "junk": clip_io.MediaError("cannot be decoded\n(found nothing)"),
    "bug": KeyError("x"),
    "huge": MemoryError(),
    "full": disk_full_error(),
    "stop": KeyboardInterrupt(),
}


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> FakeInpainter:
    """Makes Inpainter.load return a FakeInpainter, and `folder` the current folder."""
    inpainter = FakeInpainter()
    load = lambda checkpoint, mode: inpainter.loaded.append(checkpoint) or inpainter
    monkeypatch.setattr(api.Inpainter, "load", staticmethod(load))
    monkeypatch.chdir(folder)
    return inpainter


def touch(*names: str) -> None:
    """Creates files with a clip's name in the current folder."""
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"a clip")


def run(*arguments: object) -> int:
    """The exit code of avsi-inpaint."""
    return cli.main([str(a) for a in arguments])


def files() -> list[str]:
    """All files below the current folder."""
    return sorted(p.as_posix() for p in Path(".").rglob("*") if p.is_file())


def one_line(text: str) -> str:
    """`text`, checked to be one line of the command on stderr."""
    assert text.startswith("avsi-inpaint: ") and text.count("\n") == 1, text
    return text
