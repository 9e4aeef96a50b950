"""Raw folders: archives of every kind, hostile archives refused, clips found by id in any folder."""

import io
import lzma
import stat
import tarfile
import zipfile

import pytest

from avsi_jax.data import grid_text
from tfds_grid import grid_ids, raw_files, speakers
from tfds_grid.raw_files import RawDataError

S1, S4 = grid_ids.ids_of("s1")[:4], grid_ids.ids_of("s4")[:4]


def names(raw, cache):
    return [f.place for f in raw_files.list_files(raw, cache)]


def find(raw, tmp_path, **options):
    return speakers.find_clips(raw, cache=tmp_path / "cache", **options)


def make(raw, *places, content=b"x"):
    for place in places:
        (raw / place).parent.mkdir(parents=True, exist_ok=True)
        (raw / place).write_bytes(content)


def make_zip(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def make_tar(path, members, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


# ----------------------------------------------------------------------------------------------------------------- the table


def test_the_table_covers_the_corpus():
    """Oracle: 34 speakers with 1000 sentences each, 15 of them left out of the table; the speakers of two known clips."""
    ids = {f"s{n}": grid_ids.ids_of(f"s{n}") for n in range(1, 35)}
    assert sum(map(len, ids.values())) == 33_985 and max(map(len, ids.values())) == 1000 and min(map(len, ids.values())) >= 985
    assert len({i for ids_of_speaker in ids.values() for i in ids_of_speaker}) == 33_985 and all(
        map(grid_text.is_grid_id, ids["s21"])
    )
    assert grid_ids.speaker_of("swwp2s") == "s2" and grid_ids.speaker_of("bbaz5s") == "s1" and grid_ids.speaker_of("nosuch") is None


def test_shared_clips_belong_to_the_speakers_of_their_folders(grid_dir):
    clips = [p for p in grid_dir.glob("s*/*.mpg") if grid_text.is_grid_id(p.stem)]
    assert len(clips) > 100 and all(grid_ids.speaker_of(p.stem) == p.parent.name for p in clips)


def test_the_table_is_made_from_alignments(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid_ids, "TABLE", tmp_path / "table.txt")
    monkeypatch.setattr(grid_ids, "MIN_CLIPS", 2)
    archive = make_tar(tmp_path / "a.tar.xz", {"alignments/s3/bbaf2n.align": b"", "alignments/s10/swwp2s.align": b""}, "w:xz")
    try:
        assert grid_ids.main([f"--alignments={archive}"]) == 0
        assert "2 ids of 2 speakers" in capsys.readouterr().out
        assert grid_ids.speaker_of("bbaf2n") == "s3" and grid_ids.ids_of("s10") == ["swwp2s"]
    finally:
        grid_ids._speakers.cache_clear()
    with pytest.raises(ValueError, match="s3 .* s4"):
        grid_ids.make_table(["s3/bbaf2n.align", "s4/bbaf2n.align"])
    before = grid_ids.TABLE.read_text()
    few = make_tar(tmp_path / "few.tar", {"alignments/s3/bbaf2n.align": b""})
    for path in (tmp_path / "none.tar", few, make_zip(tmp_path / "a.zip", {"a": b""})):
        assert grid_ids.main([f"--alignments={path}"]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert grid_ids.TABLE.read_text() == before


def test_the_shipped_table_is_what_the_command_makes(grid_dir):
    with tarfile.open(grid_dir / "alignments_all.tar.xz") as archive:
        assert grid_ids.make_table(n for n in archive.getnames() if n.endswith(".align")) == grid_ids.TABLE.read_text()


# ------------------------------------------------------------------------------------------------------------------ archives


ARCHIVES = {
    "s1.zip": lambda p, m: make_zip(p, m),
    "s1.tar": lambda p, m: make_tar(p, m),
    "s1.tar.gz": lambda p, m: make_tar(p, m, "w:gz"),
    "s1.tgz": lambda p, m: make_tar(p, m, "w:gz"),
    "s1.tar.xz": lambda p, m: make_tar(p, m, "w:xz"),
    "s1.tar.bz2": lambda p, m: make_tar(p, m, "w:bz2"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_are_read_in_place(tmp_path, name):
    content = {"./a/bbaf2n.mpg": b"one" * 1000, "bbaf3n.mpg": b"two", "__MACOSX/._bbaf3n.mpg": b"x", ".DS_Store": b"x"}
    ARCHIVES[name](tmp_path / "raw" / "deep" / name, content)
    files = raw_files.list_files(tmp_path / "raw", tmp_path / "cache")
    assert {f.place: f.read() for f in files} == {"deep/s1/a/bbaf2n.mpg": b"one" * 1000, "deep/s1/bbaf3n.mpg": b"two"}
    assert [(f.stem, f.suffix, f.folders) for f in files] == [
        ("bbaf2n", ".mpg", ["deep", "s1", "a"]),
        ("bbaf3n", ".mpg", ["deep", "s1"]),
    ]
    with files[0].on_disk() as path:
        assert path.suffix == ".mpg" and path.read_bytes() == b"one" * 1000
    assert not path.exists()
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}
    assert len(before) == (2 if name not in ("s1.zip", "s1.tar") else 0)  # the folder and one plain .tar
    assert raw_files.list_files(tmp_path / "raw", tmp_path / "cache") == files
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*")}


def link_in_tar(path, kind=tarfile.SYMTYPE):
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("bbaf2n.mpg")
        info.type, info.linkname = kind, "../../etc/passwd"
        archive.addfile(info)


def link_in_zip(path):
    info = zipfile.ZipInfo("bbaf2n.mpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, "/etc/passwd")


def locked_zip(path):
    make_zip(path, {"bbaf2n.mpg": b"x"})
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)


def newer_zip(path):
    """A zip file that requires version 9.9 of the format."""
    data = bytearray(make_zip(path, {"bbaf2n.mpg": b"x"}).read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99
    path.write_bytes(data)


def damaged_header(path, kind):
    """Six members; the header of the third is damaged, or the file ends in it."""
    make_tar(path, {f"{n}.mpg": bytes(700) for n in range(6)})
    data = bytearray(path.read_bytes())
    third = data.index(b"2.mpg")
    data[third + 150] ^= 1  # of its checksum
    path.write_bytes(data if kind == 2 else data[: third + 100])


HOSTILE = {
    "absolute.zip": (lambda p: make_zip(p, {"/etc/bbaf2n.mpg": b"x"}), "points outside"),
    "up.zip": (lambda p: make_zip(p, {"s1/../../bbaf2n.mpg": b"x"}), "points outside"),
    "windows.zip": (lambda p: make_zip(p, {"C:\\bbaf2n.mpg": b"x"}), "points outside"),
    "back.zip": (lambda p: make_zip(p, {"..\\bbaf2n.mpg": b"x"}), "points outside"),
    "link.zip": (link_in_zip, "link or device"),
    "bomb.zip": (lambda p: make_zip(p, {"bbaf2n.mpg": bytes(2**26 + 1)}), "unpacks from .* to 67,108,865 bytes"),
    "locked.zip": (locked_zip, "needs a password"),
    "cut.zip": (lambda p: p.write_bytes(make_zip(p, {"a.mpg": b"x" * 999}).read_bytes()[:-30]), "can't be read as an archive"),
    "text.zip": (lambda p: p.write_text("<html>sign in first</html>"), "can't be read as an archive"),
    "empty.zip": (lambda p: p.touch(), "can't be read as an archive"),
    "nested.zip": (lambda p: make_zip(p, {"grid/s1.zip": b"x"}), "holds the archive 'grid/s1.zip'; unpack nested.zip once"),
    "newer.zip": (lambda p: newer_zip(p), "can't be (read as an archive|unpacked)"),
    "nested.tar": (lambda p: make_tar(p, {"s1.tar.gz": b"x"}), "holds the archive"),
    "header.tar": (lambda p: damaged_header(p, 2), "can't be read as an archive .*damaged"),
    "cut.tar": (lambda p: damaged_header(p, 1), "can't be read as an archive"),
    "absolute.tar": (lambda p: make_tar(p, {"/etc/bbaf2n.mpg": b"x"}), "points outside"),
    "up.tar": (lambda p: make_tar(p, {"../bbaf2n.mpg": b"x"}), "points outside"),
    "link.tar": (link_in_tar, "link, device"),
    "hard.tar": (lambda p: link_in_tar(p, tarfile.LNKTYPE), "link, device"),
    "device.tar": (lambda p: link_in_tar(p, tarfile.CHRTYPE), "link, device"),
    "cut2.tar": (
        lambda p: p.write_bytes(make_tar(p, {"a.mpg": b"x" * 9999}).read_bytes()[:2000]),
        "can't be read as an archive",
    ),
    "text.tar": (lambda p: p.write_text("no tar"), "can't be read as an archive"),
    "bomb.tar.xz": (lambda p: p.write_bytes(lzma.compress(bytes(2**26 + 2**20))), "to more than 67,108,864 bytes"),
    "cut.tar.gz": (lambda p: p.write_bytes(make_tar(p, {"a.mpg": bytes(9999)}, "w:gz").read_bytes()[:-40]), "as an archive"),
    "text.tar.gz": (lambda p: p.write_text("no gzip"), "not compressed by"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_archives_are_refused(tmp_path, name):
    write, reason = HOSTILE[name]
    (tmp_path / "raw").mkdir()
    write(tmp_path / "raw" / name)
    with pytest.raises(RawDataError, match=reason) as refused:
        raw_files.list_files(tmp_path / "raw", tmp_path / "cache")
    assert str(refused.value).startswith(name) and "\n" not in str(refused.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] and not (tmp_path / "bbaf2n.mpg").exists()


def test_a_damaged_member_raises_when_it_is_read(tmp_path):
    path = make_zip(tmp_path / "raw" / "s1.zip", {"bbaf2n.mpg": bytes(range(256)) * 100})
    data = bytearray(path.read_bytes())
    data[60] ^= 255  # in the packed bytes
    path.write_bytes(data)
    (file,) = raw_files.list_files(tmp_path / "raw", tmp_path / "cache")
    with pytest.raises(RawDataError, match="s1/bbaf2n.mpg: can't be unpacked"):
        file.read()


def test_a_file_above_the_size_limit_is_refused(tmp_path):
    make(tmp_path, "a.align", content=bytes(1000))
    (file,) = raw_files.list_files(tmp_path, tmp_path)
    assert len(file.read(1000)) == 1000
    with pytest.raises(RawDataError, match="more than 999 bytes"):
        file.read(999)


def test_links_to_folders_are_followed_once(tmp_path):
    """Each folder is listed once, so that circular links end."""
    make(tmp_path / "grid", "bbaf2n.mpg")
    make(tmp_path / "grid_too", "s1/bbaf3n.mpg")
    (tmp_path / "grid_too/linked").symlink_to(tmp_path / "grid")
    (tmp_path / "grid_too/s1/again").symlink_to(tmp_path / "grid_too")
    assert names(tmp_path / "grid_too", tmp_path) == ["linked/bbaf2n.mpg", "s1/bbaf3n.mpg"]
    many = [tmp_path / "round" / str(n) for n in range(12)]
    for folder in many:
        folder.mkdir(parents=True)
    for folder in many:
        for other in many:
            (folder / f"to{other.name}").symlink_to(other)
    make(many[0], "bbaf2n.mpg")
    assert names(tmp_path / "round", tmp_path) == ["0/bbaf2n.mpg"]


def test_an_unreadable_folder_raises(tmp_path, monkeypatch):
    make(tmp_path, "s1/bbaf2n.mpg")
    real = raw_files.os.scandir

    def scandir(path):
        if path.endswith("s1"):
            raise PermissionError(13, "no", path)
        return real(path)

    monkeypatch.setattr(raw_files.os, "scandir", scandir)
    with pytest.raises(PermissionError):
        raw_files.list_files(str(tmp_path), tmp_path)


# -------------------------------------------------------------------------------------------------------------------- layouts


def test_mixed_layouts_are_read(tmp_path):
    raw = tmp_path / "raw"
    make_zip(raw / "s1.zip", {f"s1/{S1[0]}.mpg": b"v"})  # Zenodo
    make_zip(raw / "audio_25k.zip", {f"audio_25k/s1/{S1[0]}.wav": b"w"})
    make_zip(raw / "alignments.zip", {f"alignments/s1/{S1[0]}.align": b"a"})
    make_zip(raw / "s4.mpg_6000.part1.zip", {f"{S4[0]}.mpg": b"v"})  # as on the corpus' own site
    make_zip(raw / "s4.mpg_vcd.zip", {f"{S4[1]}.mpg": b"v"})
    make_tar(raw / "s4.tar", {f"align/{S4[0]}.align": b"a"})
    make_tar(raw / "s4_50kHz.tar", {f"s4/{S4[0]}.wav": b"w"})
    make(raw, f"s4/video/mpg_6000/{S4[2]}.mpg", f"s4/align/{S4[2]}.align", f"s4/audio/{S4[2]}.wav")
    make(raw, *(f"s1/{S1[1]}/{n}.png" for n in (10, 9, 1)), f"s1/{S1[1]}/cover.png", f"wavs/{S1[1]}.wav")  # images and audio
    make(raw, f"s1/{S1[2]}.MPG", f"s4/{S4[3]}/7.png")  # a single image is no clip
    corpus = find(raw, tmp_path)
    assert not corpus.left_out and not corpus.without_video
    assert {c.id: c.speaker for c in corpus.clips} == dict.fromkeys(S1[:3], "s1") | dict.fromkeys(S4[:3], "s4")
    parts = {c.id: tuple(f and f.place for f in (c.video, c.audio, c.words)) for c in corpus.clips}
    assert parts == {
        S1[0]: (
            f"s1/s1/{S1[0]}.mpg",
            f"audio_25k/audio_25k/s1/{S1[0]}.wav",
            f"alignments/alignments/s1/{S1[0]}.align",
        ),
        S1[1]: (None, f"wavs/{S1[1]}.wav", None),
        S1[2]: (f"s1/{S1[2]}.MPG", None, None),
        S4[0]: (f"s4/{S4[0]}.mpg", f"s4_50kHz/s4/{S4[0]}.wav", f"s4/align/{S4[0]}.align"),
        S4[1]: (f"s4/{S4[1]}.mpg", None, None),
        S4[2]: (f"s4/video/mpg_6000/{S4[2]}.mpg", f"s4/audio/{S4[2]}.wav", f"s4/align/{S4[2]}.align"),
    }
    assert [f.name for c in corpus.clips if c.id == S1[1] for f in c.frames] == ["1.png", "9.png", "10.png"]


def test_speakers_do_not_depend_on_folders(tmp_path):
    make(tmp_path / "raw", f"s4/{S1[0]}.mpg", f"s1/{S4[0]}.mpg", f"alignments/s4/{S1[0]}.align", f"s1/{S1[1]}.mpg")
    make(tmp_path / "raw", f"downloads/{S4[1]}.mpg")
    clips = {c.id: c for c in find(tmp_path / "raw", tmp_path).clips}
    assert {i: (c.speaker, c.found_under) for i, c in clips.items()} == {
        S1[0]: ("s1", "s4"), S4[0]: ("s4", "s1"), S1[1]: ("s1", ""), S4[1]: ("s4", "")
    }  # fmt: skip
    assert clips[S1[0]].words.place == f"alignments/s4/{S1[0]}.align"


def test_the_preferred_of_two_files_of_an_id_is_used(tmp_path):
    raw, clip = tmp_path / "raw", S1[0]
    make(raw, f"a/s1/{clip}.mp4", f"b/s1/{clip}.mpg", f"a/s4/{clip}.mpg", f"s1/{clip}/1.png", f"s1/{clip}/2.png")
    make(raw, f"wavs/s4/{clip}.wav", f"wavs/s1/{clip}.wav", f"x/s4/{clip}.align", f"y/s1/{clip}.align")
    corpus = find(raw, tmp_path)
    (used,) = corpus.clips
    assert (used.video.place, used.audio.place, used.words.place) == (
        f"b/s1/{clip}.mpg", f"wavs/s1/{clip}.wav", f"y/s1/{clip}.align"
    )  # fmt: skip
    assert set(corpus.left_out) == {f"a/s1/{clip}.mp4", f"a/s4/{clip}.mpg", f"s1/{clip}"}
    assert set(corpus.left_out.values()) == {f"second file of this id, used: b/s1/{clip}.mpg"}


def test_files_left_out_have_a_reason(tmp_path):
    raw = tmp_path / "raw"
    make(
        raw,
        f"s1/{S1[0]}.mpg",
        f"s1/{S1[1]}.mpg",
        f"s1/{S1[2]}.mpg",
        f"s1/{S1[2]} (1).mpg",
        "s1/Ünïcode é.mpg",
        "notes.txt",
    )
    (raw / "RESERVED.txt").write_text(f"{S1[0]}  # a comment\n\n")
    corpus = find(raw, tmp_path, exclude=[S1[1]])
    assert [c.id for c in corpus.clips] == [S1[2]]
    assert {place: reason.split(",")[0] for place, reason in corpus.left_out.items()} == {
        f"s1/{S1[0]}.mpg": "reserved id",
        f"s1/{S1[1]}.mpg": "reserved id",
        f"s1/{S1[2]} (1).mpg": "its name is not one of Grid's sentences",
        "s1/Ünïcode é.mpg": "its name is not one of Grid's sentences",
    }


def test_audio_without_video_is_counted(tmp_path):
    ids = grid_ids.ids_of("s21")[:3]
    make(tmp_path / "raw", *(f"audio_25k/s21/{i}.wav" for i in ids), f"alignments/s21/{ids[0]}.align", f"s1/{S1[0]}.mpg")
    corpus = find(tmp_path / "raw", tmp_path)
    assert corpus.without_video == {"s21": 3} and len(corpus.clips) == 1


def test_own_recordings_use_the_topmost_folder_as_speaker(tmp_path):
    raw = tmp_path / "raw"
    make(raw, "Anna B/take 1.mov", "Anna B/take 1.txt", "Jörg/take 1.mp4", "s30/bbaf2n.mpg", "clip.mp4", "Jörg/take 1.wav")
    make(raw, "Cy/a/take.mp4", "Dee/a/take.mp4", "Dee/a/take.txt", "Eve/take.1/01.png", "Eve/take.1/02.png")
    make(raw, "Eve/take.1.wav", "x.webm")
    corpus = find(raw, tmp_path, layout="folder")
    assert {c.id: c.speaker for c in corpus.clips} == {
        "Anna B/take 1": "Anna B", "Jörg/take 1": "Jörg", "clip": "unknown", "s30/bbaf2n": "s30",
        "Cy/a/take": "Cy", "Dee/a/take": "Dee", "Eve/take.1": "Eve",
    }  # fmt: skip
    assert corpus.ignored == {".webm": 1} and not corpus.left_out
    by_id = {c.id: c for c in corpus.clips}
    assert by_id["Anna B/take 1"].words.place == "Anna B/take 1.txt" and by_id["Jörg/take 1"].audio.place == "Jörg/take 1.wav"
    assert by_id["Cy/a/take"].words is None and by_id["Dee/a/take"].words and by_id["Eve/take.1"].audio.place == "Eve/take.1.wav"
    assert by_id["Anna B/take 1"].audio is None and not any(c.is_grid for c in corpus.clips)
    # no speaker counts as Grid's there: s30 is not a test speaker, and all clips are hashed
    splits = {speakers.split_of(f"me/{n}", "s30", "speaker_independent", layout="folder") for n in range(200)}
    assert splits == {"train", "validation_seen", "test_seen"}


@pytest.mark.parametrize("layout", ["grid", "zenodo"])
def test_the_error_for_a_missing_folder_says_what_to_download(tmp_path, layout):
    with pytest.raises(FileNotFoundError, match=r"zenodo\.3625687"):
        find(tmp_path / "none", tmp_path, layout=layout)
    if layout != "grid":
        with pytest.raises(ValueError, match="--layout=zenodo"):
            find(tmp_path, tmp_path, layout=layout)
