"""Hostile inputs through API, command and page: each is refused in one line or restored, in bounded time and memory, without leaks.

tests/support/hostile_clips.py and hostile_weights.py make 200 of them, six for the default tests. Each goes through the API and the
page in tests/support/hostile_child.py, where its time and memory are measured, and all of them together through the command.
"""

import collections
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from avsi_jax.audio import gap_detection
from avsi_jax.inference import weights
from avsi_jax.inpainting import masked_audio
from avsi_jax.media import clip_io, clip_source
from tests.support import hostile_clips, hostile_weights, tiny_weights
from tests.support.hostile_child import arguments

ROOT = Path(__file__).resolve().parents[2]
MAX_MB = 2048
MAX_CPU_S, MEAN_CPU_S = 30, 5  # of one input; of the clips of one command
HTTP_TIMEOUT_S = 120
LIBRARY_OUTPUT = ("TensorFlow Lite XNNPACK",)  # from LiteRT, on stderr


class Outcome(NamedTuple):
    """The outcome of one input by one way (API, page, ...): done, refused, raised or died."""

    number: int
    way: str
    outcome: str
    text: str = ""
    cpu_s: float = 0.0
    peak_mb: float = 0.0


class Workspace:
    """A folder with the inputs, a tiny network, and files that must not be read or changed."""

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
        self.access_times_work = not read_unnoticed(root / "control")
        self.before = self.tree()
        self.reset_access_times()

    def reset_access_times(self) -> None:
        """Sets the access times of the files that playlists refer to to 1970."""
        for file in self.canary.values():
            os.utime(file, (1, file.stat().st_mtime))

    def tree(self) -> dict:
        """{path: (mode, sha256)} of all files, without the folders that may be written to."""
        contents = {}
        for parent, folders, files in os.walk(self.root):
            folders[:] = [f for f in folders if Path(parent, f) not in (self.root / "home", self.root / "out")]
            for name in folders + files:
                path = Path(parent, name)
                regular = path.is_file() and not path.is_symlink() and path.stat().st_size < 2**30
                contents[path] = (path.lstat().st_mode, hashlib.sha256(path.read_bytes()).hexdigest() if regular else None)
        return contents

    def env(self) -> dict:
        return {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(self.root / "tmp"), "HOME": str(self.root / "home"),
                "JAX_NUM_CPU_DEVICES": "1"}  # fmt: skip

    def start(self, *arguments, **options) -> subprocess.Popen:
        command = [sys.executable, *map(str, arguments)]
        return subprocess.Popen(command, env=self.env(), cwd=self.root / "here", stdout=subprocess.PIPE, text=True, **options)


def read_unnoticed(file: Path) -> bool:
    """Whether the file system does not update access times."""
    file.write_text("x")
    os.utime(file, (1, file.stat().st_mtime))
    file.read_text()
    unnoticed = file.stat().st_atime == 1
    file.unlink()
    return unnoticed


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("few"), few=True)


@pytest.fixture(scope="module")
def all_inputs(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("all"), few=False)


# ---- runs --------------------------------------------------------------------------------------------------------


def one_by_one(workspace: Workspace, more: str) -> tuple[list[Outcome], dict]:
    """Each input by the API and the page (`more`: see hostile_child). If that ends the process, another one continues."""
    outcomes, first, last = [], 0, {}
    while first < len(workspace.inputs):
        with tempfile.TemporaryFile("w+") as err:
            child = workspace.start("-m", "tests.support.hostile_child", workspace.root, first, more, stderr=err)
            lines = [json.loads(line) for line in child.stdout]
            code = child.wait()
            err.seek(0)
            stderr = err.read()
        assert lines and lines[0].get("ready", MAX_MB) < MAX_MB, stderr
        outcomes += [Outcome(**line) for line in lines if line.get("outcome") not in (None, "begun")]
        first, last = len(workspace.inputs), lines[-1]
        if code:
            outcomes.append(Outcome(last["number"], last["way"], "died", f"exit {code}: {stderr[-3000:]}"))
            first = last["number"] + 1
    return outcomes, last.get("command", {})


def by_command(workspace: Workspace) -> tuple[int, list[dict], str, float, float]:
    """(exit code, outcomes, stderr, seconds of CPU, peak memory in MB)."""
    with tempfile.TemporaryFile("w+") as err:
        child = workspace.start("-m", "avsi_jax.inpainting.cli", *arguments(workspace.root), stderr=err)
        outcomes = [json.loads(line) for line in child.stdout]
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        err.seek(0)
        return child.returncode, outcomes, err.read(), usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


# ---- checks -------------------------------------------------------------------------------------------------------


def problems(workspace: Workspace, outcomes: list[Outcome]) -> Iterator[str]:
    """A line for each outcome that is not as it should be."""
    for one in outcomes:
        given = workspace.inputs[one.number]
        name = f"{one.way}: {given.path.name!r}"
        if one.outcome not in ("done", "refused") or given.expected not in (hostile_clips.EITHER, one.outcome):
            yield f"{name}: {one.outcome}, expected {given.expected}: {one.text}"
        if one.outcome == "refused" and ("\n" in one.text.replace(str(given.path), "") or not one.text or len(one.text) > 1000):
            yield f"{name}: not one line: {one.text!r}"
        if one.way == "page" and given.kind not in ("weights", "no file") and str(workspace.root) in one.text:
            yield f"{name}: shows a folder: {one.text}"
        if hostile_clips.SECRET in one.text:
            yield f"{name}: shows a file that a playlist refers to: {one.text}"
        if one.cpu_s > MAX_CPU_S or one.peak_mb > MAX_MB:
            yield f"{name}: took {one.cpu_s:.0f} s of CPU, {one.peak_mb:.0f} MB"


def check_untouched(workspace: Workspace) -> None:
    """No file was created, changed, left behind or read, except in the folder of the last session."""
    shutil.rmtree(workspace.root / "tmp" / "sessions", ignore_errors=True)
    if workspace.access_times_work:
        assert [file.name for file in workspace.canary.values() if file.stat().st_atime != 1] == []
    assert workspace.tree() == workspace.before
    workspace.reset_access_times()


def check_one_by_one(workspace: Workspace, outcomes: list[Outcome]) -> None:
    ways = collections.Counter(one.number for one in outcomes)
    lines = list(problems(workspace, outcomes))
    assert not lines, "\n".join(lines)
    assert [ways[n] for n, i in enumerate(workspace.inputs)] == [4 if i.kind == "weights" else 2 for i in workspace.inputs]
    check_untouched(workspace)


def check_command(workspace: Workspace, code: int, outcomes: list[dict], err: str, cpu_s: float, peak_mb: float) -> None:
    expected = {str(i.path): i.expected for i in workspace.clips if not i.path.is_dir()}
    by_path = {o["path"]: o for o in outcomes}
    assert code == 1 and by_path.keys() == expected.keys() and len(outcomes) == len(expected)
    status = {hostile_clips.REFUSED: ("failed",), hostile_clips.DONE: ("restored",)}
    assert [o for path, o in by_path.items() if o["status"] not in status.get(expected[path], (o["status"],))] == []
    bad = [o["error"] for o in outcomes if (o["error"] or "").startswith(("unexpected ", "not enough memory"))]
    assert not bad, "\n".join(bad)
    lines = [line for line in err.splitlines() if not any(n in line for n in LIBRARY_OUTPUT)]
    assert [line for line in lines if not line.startswith("avsi-inpaint: ") and not line.startswith("report: ")
            and not line.endswith(" s left")] == []  # fmt: skip
    assert cpu_s < MEAN_CPU_S * len(outcomes) and peak_mb < MAX_MB
    written = {p for p in (workspace.root / "out").rglob("*") if p.name != "inpainting.html"}
    assert written == {Path(o["output"]) for o in outcomes if o["status"] == "restored"}
    for path in written:
        assert clip_io.read_clip(path, video=False).audio is not None
    text = err + json.dumps(outcomes) + (workspace.root / "out" / "inpainting.html").read_text()
    assert hostile_clips.SECRET not in text and "[31m<b>" not in text.partition("<!doctype")[2]
    check_untouched(workspace)


@pytest.mark.slow
def test_six_hostile_inputs_of_different_kinds(few):
    assert len({i.kind for i in few.inputs}) == len(few.inputs) == 6
    outcomes, command = one_by_one(few, "command")
    printed = [json.loads(line) for line in command["out"].splitlines()]
    check_command(few, command["code"], printed, command["err"], command["cpu_s"], command["peak_mb"])
    check_one_by_one(few, outcomes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_hostile_inputs_one_by_one(all_inputs):
    assert len(all_inputs.inputs) == 200
    outcomes, _ = one_by_one(all_inputs, "page")
    print(f"at most {max(o.cpu_s for o in outcomes):.1f} s of CPU, peak {max(o.peak_mb for o in outcomes):.0f} MB")
    check_one_by_one(all_inputs, outcomes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_hostile_inputs_by_the_command(all_inputs):
    result = by_command(all_inputs)
    print(f"{result[3]:.1f} s of CPU, peak {result[4]:.0f} MB", collections.Counter(o["status"] for o in result[1]))
    check_command(all_inputs, *result)


def test_pipes_and_folders_are_refused_as_such(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(clip_io.MediaError, match="pipe"):
        clip_io.check_file(tmp_path / "a.mp4")
    with pytest.raises(clip_io.MediaError, match="folder"):
        clip_io.check_file(tmp_path / "b.mp4")


def test_streams_of_an_unknown_codec_are_ignored(tmp_path):
    file, valid = tmp_path / "a.mkv", tmp_path / "valid.mkv"
    hostile_clips.video_file(valid, "matroska", "mpeg4", "flac")
    data = valid.read_bytes().replace(b"V_MPEG4", b"V_XYZZY")
    file.write_bytes(data)
    clip = clip_io.read_clip(file)
    assert clip.video is None and len(clip.audio.samples) == 19_200
    with clip_source.open_source(file) as source:
        assert not source.has_video and source.num_samples == 19_200
    file.write_bytes(data.replace(b"A_FLAC", b"A_XYZZ"))
    for read in (clip_io.read_clip, clip_source.open_source):
        with pytest.raises(clip_io.MediaError, match="no video or audio"):
            read(file)


@pytest.mark.parametrize("data", [b"", b"#EXTM3U\n", bytes(64)])
def test_files_without_a_sample_format_are_refused(tmp_path, data):
    """By its suffix FFmpeg takes such a .flac for audio, whose format its header does not say."""
    (tmp_path / "a.flac").write_bytes(data)
    for read in (clip_io.read_clip, clip_source.open_source):
        with pytest.raises(clip_io.MediaError, match="a.flac"):
            read(tmp_path / "a.flac")


def test_names_that_are_not_text_can_be_opened(tmp_path):
    file = tmp_path / os.fsdecode(b"\xff.wav")
    clip_io.write_audio(tmp_path / "a.wav", np.zeros(9), 8000)
    (tmp_path / "a.wav").rename(file)
    with clip_source.open_source(file) as source:
        assert source.num_samples == len(clip_io.read_clip(file).audio.samples) == 9


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("peak", [3e38, 1e308])
def test_samples_whose_squares_overflow(peak):
    """Gap detection treats them as 1e6, and restoring such a clip is an error."""
    samples = np.where(np.arange(32_000) // 80 % 2, peak, -peak)[:, None]
    samples[16_000:20_000] = 0
    assert gap_detection.detect_gaps(samples, 16_000) == gap_detection.detect_gaps(1e6 * np.sign(samples), 16_000)
    clip = clip_io.Clip("loud.wav", None, clip_io.Audio(samples, 16_000, 0.0, "DOUBLE", "wav"))
    with pytest.raises(clip_io.MediaError, match=r"0\.000 s.*1e\+06"):
        masked_audio.MaskedAudio(clip_source.source_from_clip(clip), [(16_000, 20_000)]).read_native(0, 16_000)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1, 7, 200, 999, 1000, 3000, 2**31 - 1])
def test_gap_detection_accepts_any_rate(rate):
    samples = np.random.default_rng(0).normal(0, 0.1, (2000, 1)).astype(np.float32)
    assert all(0 <= gap.start < gap.end <= 2000 for gap in gap_detection.detect_gaps(samples, rate))


# ---- over HTTP -------------------------------------------------------------------------------------------------------------------


class HttpClient:
    """Sends requests to the page's server, also such as a browser would not send."""

    def __init__(self, address: str):
        self.address, self.session = f"{address}gradio_api/", "hostile"
        config = json.loads(self._open(f"{address}config"))
        (file,) = (c["id"] for c in config["components"] if c["props"].get("elem_id") == "file")
        (self.load_index,) = (d["id"] for d in config["dependencies"] if [file, "upload"] in [list(t) for t in d["targets"]])

    def _open(self, url: str, data: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(url, data, {"Content-Type": kind} if data is not None else {})
        with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as response:
            return response.read()

    def upload(self, name: str, data: bytes) -> str:
        head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        return json.loads(
            self._open(f"{self.address}upload", head + data + b"\r\n--edge--\r\n", "multipart/form-data; boundary=edge")
        )[0]

    def load(self, path: str) -> dict:
        """The server's reply to the event that a file was uploaded."""
        event = {
            "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            "fn_index": self.load_index,
            "session_hash": self.session,
        }
        self._open(f"{self.address}queue/join", json.dumps(event).encode())
        with urllib.request.urlopen(f"{self.address}queue/data?session_hash={self.session}", timeout=HTTP_TIMEOUT_S) as events:
            for line in events:
                reply = json.loads(line[6:]) if line.startswith(b"data: ") else {}
                if reply.get("msg") in ("process_completed", "unexpected_error"):
                    return reply
        raise AssertionError("the server did not reply")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hostile_clips_over_http(few, monkeypatch, capfd):
    """Each clip is decoded by a worker process; files that were not uploaded are not served."""
    pytest.importorskip("gradio")
    from absl import logging as absl_logging

    from avsi_jax.app import cli, session
    from avsi_jax.inpainting.api import Inpainter

    # The server closes every logging handler; absl's would close the file in which pytest captures stderr.
    monkeypatch.setattr(absl_logging.get_absl_handler().python_handler, "stream", sys.stderr)
    monkeypatch.setattr(tempfile, "tempdir", str(few.root / "tmp"))
    regular = [i for i in few.clips if i.path.is_file()]
    with cli.served(Inpainter.load(few.root / "good"), session.Limits()) as address:
        client = HttpClient(address)
        for one in regular:
            reply = client.load(client.upload(f"clip{one.path.suffix}", one.path.read_bytes()))
            error = reply["output"].get("error") or ""
            assert reply["success"] or error, reply
            as_expected = one.expected == hostile_clips.EITHER or reply["success"] == (one.expected == hostile_clips.DONE)
            assert as_expected or one.kind == "extreme", (one, reply)
            assert "\n" not in error and str(few.root) not in error and "see the terminal of avsi-app" not in error, reply
        assert "Traceback" not in capfd.readouterr().err  # Gradio prints some for the requests below
        for path in (few.canary["txt"], few.canary["ts"], "../../outside/canary.txt", "/etc/passwd"):
            reply = json.dumps(client.load(str(path)))
            assert hostile_clips.SECRET not in reply and "root:" not in reply and '"success": false' in reply, reply
            with pytest.raises(urllib.error.HTTPError, match="403|404"):
                client._open(f"{client.address}file={path}")
    check_untouched(few)
