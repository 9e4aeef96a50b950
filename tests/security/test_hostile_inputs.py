"""Hostile inputs through API, command and page: each is refused in one line or repaired; nothing hangs, grows, leaks or changes.

tests/support/hostile_clips.py makes them: 200, of which 20 in the default tests. Each goes through the API and the page in
tests/support/hostile_child.py, where its time and memory are taken, and all of them together through the command.
"""

import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from avsi_jax.audio import gap_detection
from avsi_jax.inference import weights
from avsi_jax.inpainting import masked_audio
from avsi_jax.media import clip_io, clip_source
from tests.support import hostile_clips, hostile_weights, tiny_weights
from tests.support.hostile_child import LONGEST_S, arguments

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 2048
NOISE = ("TensorFlow Lite XNNPACK",)  # LiteRT's own, on stderr


class Came(NamedTuple):
    """How an input came out one way."""

    number: int
    way: str
    how: str  # done, refused, raised, died
    transcript: str = ""
    seconds: float = 0.0
    peak_mb: float = 0.0


class Stage:
    """A folder with the inputs, a tiny network, and what must not change."""

    def __init__(self, root: Path, few: bool):
        self.root, self.few = root, few
        self.canary = hostile_clips.canary(root / "outside")
        self.clips = hostile_clips.clips(root / "in", self.canary, few)
        weights.write(root / "good", tiny_weights.run(), {})
        self.weights = hostile_weights.weights_of(root / "weights", root / "good", few)
        self.inputs = self.clips + self.weights
        named = [(os.fsencode(i.path).hex(), i.kind) for i in self.inputs]
        (root / "inputs.json").write_text(json.dumps(named))
        for name in ("tmp", "home", "here"):
            (root / name).mkdir()
        self.watched = not read_unnoticed(root / "control")
        self.before = self.tree()
        self.mark()

    def mark(self) -> None:
        """Nobody has read what play lists name since 1970."""
        for file in self.canary.values():
            os.utime(file, (1, file.stat().st_mtime))

    def tree(self) -> dict:
        """What lies in it and what is in that, but for places to write to."""
        found = {}
        for parent, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if Path(parent, f) not in (self.root / "home", self.root / "out")]
            for name in folders + files:
                path = Path(parent, name)
                regular = path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30
                found[path] = (path.lstat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest() if regular else None)
        return found

    def env(self) -> dict:
        return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.root / "tmp"), "HOME": str(self.root / "home"),
                "JAX_NUM_CPU_DEVICES": "1"}  # fmt: skip

    def start(self, *arguments, **options) -> subprocess.Popen:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, env=self.env(), cwd=self.root / "here", stdout=subprocess.PIPE, text=True, **options)


def read_unnoticed(file: Path) -> bool:
    """Whether the file system does not tell when a file was last read."""
    file.write_text("x")
    os.utime(file, (1, file.stat().st_mtime))
    file.read_text()
    unnoticed = file.stat().st_atime == 1
    file.unlink()
    return unnoticed


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("few"), few=True)


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory):
    return Stage(tmp_path_factory.mktemp("all"), few=False)


# ---- what is gone through --------------------------------------------------------------------------------------------------------


def one_by_one(stage: Stage, more: str) -> tuple[list[Came], dict]:
    """Each input, by the API and the page (hostile_child says what `more` is); where that ends the process, another goes on."""
    came, first, last = [], 0, {}
    while first < len(stage.inputs):
        with tempfile.TemporaryFile("w+") as err:
            child = stage.start("-m", "tests.support.hostile_child", stage.root, first, more, stderr=err)
            lines = [json.loads(line) for line in child.stdout]
            code = child.wait()
            err.seek(0)
            said = err.read()
        assert lines and lines[0].get("ready", MOST_MB) < MOST_MB, said
        came += [Came(**line) for line in lines if line.get("how") not in (None, "begun")]
        first, last = len(stage.inputs), lines[-1]
        if code:
            came.append(Came(last["number"], last["way"], "died", f"exit {code}: {said[-3000:]}"))
            first = last["number"] + 1
    return came, last.get("command", {})


def by_command(stage: Stage) -> tuple[int, list[dict], str, float, float]:
    """(exit code, outcomes, stderr, the longest that one took in s, peak in MB)."""
    with tempfile.TemporaryFile("w+") as err:
        child = stage.start("-m", "avsi_jax.inpainting.cli", *arguments(stage.root), stderr=err)
        outcomes, at, longest = [], None, 0.0
        for line in child.stdout:
            outcomes.append(json.loads(line))
            longest, at = max(longest, time.monotonic() - (at or time.monotonic())), time.monotonic()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        return child.returncode, outcomes, err.read(), longest, usage.ru_maxrss / 1024


# ---- what is asked of them -------------------------------------------------------------------------------------------------------


def complaints(stage: Stage, came: list[Came]):
    """A line for each way in which one came out as it should not."""
    for one in came:
        of = stage.inputs[one.number]
        name = f"{one.way}: {of.path.name!r}"
        if one.how not in ("done", "refused") or (of.fate != hostile_clips.EITHER and one.how != of.fate):
            yield f"{name}: {one.how}, expected {of.fate}: {one.transcript}"
        if one.how == "refused" and (
            "\n" in one.transcript.replace(str(of.path), "") or not one.transcript or len(one.transcript) > 1000
        ):
            yield f"{name}: not one line: {one.transcript!r}"
        if one.way == "page" and of.kind not in ("weights", "no file") and str(stage.root) in one.transcript:
            yield f"{name}: tells of a folder: {one.transcript}"
        if hostile_clips.SECRET in one.transcript:
            yield f"{name}: tells what a play list names: {one.transcript}"
        if one.seconds > LONGEST_S or one.peak_mb > MOST_MB:
            yield f"{name}: took {one.seconds:.0f} s, {one.peak_mb:.0f} MB"


def check_untouched(stage: Stage) -> None:
    """Nothing was made, changed, left behind, or read that is none of theirs; but the last visit's folder."""
    shutil.rmtree(stage.root / "tmp" / "visits", ignore_errors=True)
    if stage.watched:
        assert [file.name for file in stage.canary.values() if file.stat().st_atime != 1] == []
    assert stage.tree() == stage.before
    stage.mark()


def check_one_by_one(stage: Stage, came: list[Came]) -> None:
    ways = collections.Counter(one.number for one in came)
    found = list(complaints(stage, came))
    assert not found, "\n".join(found)
    assert [ways[n] for n, i in enumerate(stage.inputs)] == [4 if i.kind == "weights" else 2 for i in stage.inputs]
    check_untouched(stage)


def check_command(stage: Stage, code, outcomes, err, longest, peak) -> None:
    wanted = {str(i.path): i.fate for i in stage.clips if not i.path.is_dir()}
    found = {o["path"]: o for o in outcomes}
    assert code == 1 and found.keys() == wanted.keys() and len(outcomes) == len(wanted)
    status = {hostile_clips.REFUSED: ("failed",), hostile_clips.DONE: ("restored",)}
    assert [o for path, o in found.items() if o["status"] not in status.get(wanted[path], (o["status"],))] == []
    bad = [o["error"] for o in outcomes if (o["error"] or "").startswith(("unexpected ", "not enough memory"))]
    assert not bad, "\n".join(bad)
    lines = [line for line in err.splitlines() if not any(n in line for n in NOISE)]
    assert [line for line in lines if not line.startswith("avsi-inpaint: ") and not line.startswith("report: ")
            and not line.endswith(" s left")] == []  # fmt: skip
    assert longest < LONGEST_S and peak < MOST_MB
    written = {p for p in (stage.root / "out").rglob("*") if p.name != "repair.html"}
    assert written == {Path(o["output"]) for o in outcomes if o["status"] == "restored"}
    for path in written:
        assert clip_io.read_clip(path, video=False).audio is not None
    told = err + json.dumps(outcomes) + (stage.root / "out" / "repair.html").read_text()
    assert hostile_clips.SECRET not in told and "[31m<b>" not in told.partition("<!doctype")[2]
    check_untouched(stage)


def test_twenty(few):
    assert len(few.inputs) == 20
    came, command = one_by_one(few, "command")
    outcomes = [json.loads(line) for line in command["out"].splitlines()]
    check_command(few, command["code"], outcomes, command["err"], command["seconds"], command["peak_mb"])
    check_one_by_one(few, came)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_one_by_one(all_of_them):
    assert len(all_of_them.inputs) == 200
    came, _ = one_by_one(all_of_them, "page")
    print(f"longest {max(c.seconds for c in came):.1f} s, peak {max(c.peak_mb for c in came):.0f} MB")
    check_one_by_one(all_of_them, came)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_by_the_command(all_of_them):
    found = by_command(all_of_them)
    print(f"longest {found[3]:.1f} s, peak {found[4]:.0f} MB", collections.Counter(o["status"] for o in found[1]))
    check_command(all_of_them, *found)


def test_a_pipe_is_told_from_a_folder(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(clip_io.MediaError, match="found a pipe or device, expected a clip file"):
        clip_io.check_file(tmp_path / "a.mp4")
    with pytest.raises(clip_io.MediaError, match="found a folder, expected a clip file"):
        clip_io.check_file(tmp_path / "b.mp4")


def test_streams_of_an_unknown_codec_are_none(tmp_path):
    file, whole = tmp_path / "a.mkv", tmp_path / "whole.mkv"
    hostile_clips.video_file(whole, "matroska", "mpeg4", "flac")
    data = whole.read_bytes().replace(b"V_MPEG4", b"V_XYZZY")
    file.write_bytes(data)
    clip = clip_io.read_clip(file)
    assert clip.video is None and len(clip.audio.samples) == 19_200
    with clip_source.open_source(file) as source:
        assert not source.has_video and source.num_samples == 19_200
    file.write_bytes(data.replace(b"A_FLAC", b"A_XYZZ"))
    for read in (clip_io.read_clip, clip_source.open_source):
        with pytest.raises(clip_io.MediaError, match="found no pictures or sound that can be decoded"):
            read(file)


def test_names_that_are_no_text(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.wav")
    clip_io.write_audio(tmp_path / "a.wav", np.zeros(9), 8000)
    (tmp_path / "a.wav").rename(file)
    with clip_source.open_source(file) as source:
        assert source.num_samples == len(clip_io.read_clip(file).audio.samples) == 9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("loudest", [3e38, 1e308])
def test_numbers_beyond_any_audio(loudest):
    """Squares of them overflow: holes are looked for as if they were 1e6, and a repair says what is wrong."""
    samples = np.where(np.arange(32_000) // 80 % 2, loudest, -loudest)[:, None]
    samples[16_000:20_000] = 0
    assert gap_detection.detect_gaps(samples, 16_000) == gap_detection.detect_gaps(1e6 * np.sign(samples), 16_000)
    clip = clip_io.Clip("loud.wav", None, clip_io.Audio(samples, 16_000, 0.0, "DOUBLE", "wav"))
    with pytest.raises(clip_io.MediaError, match=r"first at 0\.000 s; expected numbers up to 1e\+06"):
        masked_audio.MaskedAudio(clip_source.source_of(clip), [(16_000, 20_000)]).own(0, 16_000)


@pytest.mark.parametrize("rate", [1, 7, 200, 999, 1000, 3000, 2**31 - 1])
def test_rates_that_are_no_waveforms(rate):
    samples = np.random.default_rng(0).normal(0, 0.1, (2000, 1)).astype(np.float32)
    assert all(0 <= gap.start < gap.end <= 2000 for gap in gap_detection.detect_gaps(samples, rate))


# ---- over HTTP -------------------------------------------------------------------------------------------------------------------


class Caller:
    """Asks the page's server as a browser does, and as a browser would not."""

    def __init__(self, address: str):
        self.address, self.session = f"{address}gradio_api/", "hostile"
        config = json.loads(self._open(f"{address}config"))
        (file,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "file")
        (self.taking,) = (d["id"] for d in config["dependencies"] if [file, "upload"] in [list(t) for t in d["targets"]])

    def _open(self, url: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        asked = urllib.request.Request(url, data, {"Content-Type": kind} if data is not None else {})
        with urllib.request.urlopen(asked, timeout=LONGEST_S) as answer:
            return answer.read()

    def upload(self, name: str, data: bytes) -> str:
        head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        return json.loads(
            self._open(f"{self.address}upload", head + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge")
        )[0]

    def take(self, path: str) -> dict:
        """What the server says when it is told that a file was put in."""
        asked = {
            "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            "fn_index": self.taking,
            "session_hash": self.session,
        }
        self._open(f"{self.address}queue/join", json.dumps(asked).encode())
        with urllib.request.urlopen(f"{self.address}queue/data?session_hash={self.session}", timeout=LONGEST_S) as events:
            for line in events:
                told = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if told.get("msg") in ("process_completed", "unexpected_error"):
                    return told
        raise AssertionError("the server said nothing")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_few_over_http(few, monkeypatch, capfd):
    """Where each is opened in a child process first; and files that were not put in are not given out."""
    pytest.importorskip("gradio")
    from absl import logging as absl_logging

    from avsi_jax.app import cli, session
    from avsi_jax.inpainting.api import Inpainter

    # The server closes every handler of a log that there is; absl's would close the file that pytest keeps stderr in.
    monkeypatch.setattr(absl_logging.get_absl_handler().python_handler, "stream", sys.stderr)
    monkeypatch.setattr(tempfile, "tempdir", str(few.root / "tmp"))
    regular = [i for i in few.clips if i.path.is_file()]
    with cli.served(Inpainter.load(few.root / "good"), session.Limits()) as address:
        caller = Caller(address)
        for one in regular:
            told = caller.take(caller.upload(f"clip{one.path.suffix}", one.path.read_bytes()))
            said = told["output"].get("error") or ""
            assert told["success"] or said, told
            assert (
                one.fate == hostile_clips.EITHER or told["success"] == (one.fate == hostile_clips.DONE) or one.kind == "extreme"
            ), (one, told)
            assert "\n" not in said and str(few.root) not in said and "That did not work" not in said, told
        assert "Traceback" not in capfd.readouterr().err  # of what follows Gradio writes some itself
        for path in (few.canary["txt"], few.canary["ts"], "../../outside/canary.txt", "/etc/passwd"):
            told = json.dumps(caller.take(str(path)))
            assert hostile_clips.SECRET not in told and "root:" not in told and '"success": false' in told, told
            with pytest.raises(urllib.error.HTTPError, match="403|404"):
                caller._open(f"{caller.address}file={path}")
    check_untouched(few)
