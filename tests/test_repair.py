"""avsi-inpaint: what it writes, what it leaves alone, and mistakes take one line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_data

from avsi_jax import media, repair

ROOT = Path(__file__).resolve().parent.parent


def voice(seconds, rate, *, channels=1, seed=0):
    """A made-up voice (N, C) that repeats every 2.9 s; the second channel is half as loud."""
    one = tiny_data.voice(seed, 46_400)[0]
    x = media.resample(np.tile(one, int(np.ceil(seconds / 2.9)) + 1), 16_000, rate)[: round(seconds * rate)]
    return np.stack([0.5 * x / (k + 1) for k in range(channels)], 1).astype(np.float32)


def lost(gaps, num_samples, rate):
    """bool (N,): what the gaps take."""
    time = np.arange(num_samples)
    return np.any([(time >= round(a * rate)) & (time < round(b * rate)) for a, b in gaps], axis=0)


@pytest.fixture
def wav(tmp_path):
    media.write_sound(tmp_path / "clip.wav", voice(2.5, 16_000), 16_000)
    return tmp_path / "clip.wav"


def run(*arguments) -> int:
    return repair.main([str(a) for a in arguments])


@pytest.mark.parametrize(("subtype", "rate"), [("PCM_16", 48_000), ("PCM_24", 48_000), ("FLOAT", 44_100), ("PCM_U8", 8_000)])
def test_the_command_keeps_rate_subtype_and_samples(untrained_a_si, tmp_path, capsys, subtype, rate):
    source, target = tmp_path / "clip.wav", tmp_path / "new" / "out.wav"
    media.write_sound(source, voice(2.5, rate, channels=2), rate, subtype)
    assert run(source, "--gap", "0.8-1.3", "--gap=2.2-2.5", "-o", target, "--checkpoint", untrained_a_si) == 0
    assert capsys.readouterr().out.startswith(f"{target}  (")
    before, after = (media.read_clip(p).sound for p in (source, target))
    assert (after.rate, after.subtype) == (rate, subtype) and after.samples.shape == before.samples.shape
    hole = lost([(0.8, 1.3), (2.2, 2.5)], len(before.samples), rate)
    np.testing.assert_array_equal(after.samples[~hole], before.samples[~hole])


@pytest.mark.parametrize("subtype", ["PCM_32", "DOUBLE"])
def test_the_command_keeps_all_bits(untrained_a_si, tmp_path, subtype):
    """Of 32 and 64 bits, which a float32 doesn't hold."""
    import soundfile

    source, target = tmp_path / "clip.wav", tmp_path / "out.wav"
    soundfile.write(source, voice(2.5, 16_000).astype(np.float64) * (1 + 1e-8), 16_000, subtype=subtype)
    assert run(source, "--gap=0.8-1.3", "-o", target, "--checkpoint", untrained_a_si) == 0
    before, after = (soundfile.read(p, dtype="float64")[0] for p in (source, target))
    hole = lost([(0.8, 1.3)], len(before), 16_000)
    np.testing.assert_array_equal(after[~hole], before[~hole])


def test_the_command_by_default_writes_beside_where_it_is_run(untrained_a_si, wav, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(wav, "--gap=0.8-1.3", "--checkpoint", untrained_a_si) == 0
    assert (tmp_path / "here" / "clip.restored.wav").is_file()
    first = (tmp_path / "here" / "clip.restored.wav").read_bytes()
    assert run(wav, "--gap=0.8-1.4", "--checkpoint", untrained_a_si) == 2
    assert "clip.restored.wav exists; take --overwrite" in one_line(capsys)
    assert (tmp_path / "here" / "clip.restored.wav").read_bytes() == first
    assert run(wav, "--gap=0.8-1.4", "--checkpoint", untrained_a_si, "--overwrite") == 0
    assert (tmp_path / "here" / "clip.restored.wav").read_bytes() != first


def test_several_clips_go_into_a_folder_and_one_bad_one_stops_no_other(untrained_a_si, wav, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    media.write_sound(tmp_path / "short.flac", voice(1.0, 16_000), 16_000)
    clips = (tmp_path / "bad.wav", tmp_path / "short.flac", wav)
    assert run(*clips, "--gap=0.8-1.3", "-o", tmp_path / "out", "--checkpoint", untrained_a_si) != 0
    captured = capsys.readouterr()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["clip.restored.wav"]
    assert len(captured.err.splitlines()) == 2 and "bad.wav" in captured.err and "short.flac" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_two_clips_of_one_name_do_not_overwrite_each_other(untrained_a_si, wav, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    media.write_sound(tmp_path / "b" / "clip.wav", voice(1.5, 16_000, seed=1), 16_000)
    code = run(wav, tmp_path / "b" / "clip.wav", "--gap=0.8-1.3", "-o", tmp_path / "out", "--checkpoint", untrained_a_si)
    if code:
        assert "clip.restored.wav" in one_line(capsys)
    else:
        assert len(list((tmp_path / "out").iterdir())) == 2


def one_line(capsys) -> str:
    err = capsys.readouterr().err
    assert err.startswith("avsi-inpaint: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{wav}", "--checkpoint={run}"], "no gap given; expected at least one, such as --gap 0.93-1.73"),
        (["{wav}", "--gap=0.8-1.3"], "no --checkpoint given"),
        (["{wav}", "--gap=0.8-1.3", "--checkpoint={tmp}"], "no config.json in {tmp}"),
        (["{tmp}/none.mpg", "--gap=0.8-1.3", "--checkpoint={run}"], "{tmp}/none.mpg: no such file"),
        (["{wav}", "--gap=1.3-0.8", "--checkpoint={run}"], "gap 1.3-0.8: expected START-END in seconds with 0 <= START < END"),
        (["{wav}", "--gap=0.8-9", "--checkpoint={run}"], "gap 0.8-9 s leaves the clip, whose sound is 2.500 s long"),
        (["{wav}", "--gap=9-10", "--checkpoint={run}"], "gap 9-10 s leaves the clip"),
        (["{wav}", "--gap=0.8-1.3", "--checkpoint={run}", "-o", "{tmp}/out.mp3"], "out.mp3"),
        (["{wav}", "--gap=0.8-1.3", "--checkpoint={run}", "-o", "{tmp}/out.mpg"], "out.mpg"),
        (["{tmp}/notes.txt", "--gap=0.8-1.3", "--checkpoint={run}"], "found suffix '.txt', expected one of .mpg"),
        (["{tmp}", "--gap=0.8-1.3", "--checkpoint={run}"], "folder"),
    ],
)
def test_mistakes_take_one_line_and_write_nothing(untrained_a_si, wav, tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code = run(*(a.format(wav=wav, run=untrained_a_si, tmp=tmp_path) for a in arguments))
    assert says.format(tmp=tmp_path) in one_line(capsys)
    assert code == 2 and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("gap", ["0.8", "a-b", "0.8-", "0.8:1.3"])
def test_a_gap_that_is_none_is_said_by_argparse(gap, capsys):
    with pytest.raises(SystemExit) as error:
        run("clip.wav", f"--gap={gap}", "--checkpoint=run")
    assert error.value.code == 2 and "expected START-END in seconds, such as 0.93-1.73" in capsys.readouterr().err


def test_a_film_by_the_command(trained, grid_dir, tmp_path):
    """The whole way in a process of its own, as a person would go it: one line, and no noise of libraries."""
    arguments = [grid_dir / "s1" / "bbaz5s.mpg", "--gap", "0.93-1.73", "-o", tmp_path, "--checkpoint", trained]
    done = subprocess.run(
        [sys.executable, "-m", "avsi_jax.repair", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "bbaz5s.restored.wav")) and done.stdout.count("\n") == 1
    lines = done.stderr.splitlines()
    assert [line for line in lines if "TensorFlow Lite XNNPACK" not in line] == []  # that one is LiteRT's own
    sound = media.read_clip(tmp_path / "bbaz5s.restored.wav").sound
    assert (sound.rate, sound.samples.shape, sound.subtype) == (44_100, (131_328, 2), "PCM_16")


def test_help_is_quick():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "avsi_jax.repair", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "--gap START-END" in done.stdout
    assert not {"jax", "numpy", "av"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
