"""Rows that are kept: found again, exactly, only where everything they come from is the same."""

import pytest

from avsi_jax import references

COLUMNS = ("clip_id", "kind", "pesq_nb", "reason")
ROWS = [
    {"clip_id": "a", "kind": "damaged", "pesq_nb": 0.1 + 0.2, "reason": 'said "no", twice'},
    {"clip_id": "b", "kind": "ceiling", "pesq_nb": None, "reason": ""},
]
FROM = {"data": "abc", "clips": ["a", "b"], "protocol": "waveform", "versions": {"pesq": "0.0.4"}}


def test_what_was_written_is_read_to_the_bit(tmp_path):
    path = references.path_of(tmp_path / "new", **FROM)
    assert references.read(path) is None
    references.write(path, ROWS, COLUMNS)
    found = references.read(references.path_of(tmp_path / "new", **FROM))
    assert float(found[0]["pesq_nb"]) == 0.1 + 0.2 and found[0]["reason"] == ROWS[0]["reason"] and found[1]["pesq_nb"] == ""
    assert references.as_csv(found, COLUMNS) == references.as_csv(ROWS, COLUMNS)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("change", [{"data": "abd"}, {"clips": ["a"]}, {"protocol": "peer"}, {"versions": {"pesq": "0.0.5"}}])
def test_other_data_protocol_or_versions_find_nothing(tmp_path, change):
    assert references.path_of(tmp_path, **FROM) != references.path_of(tmp_path, **(FROM | change))


def test_changed_code_finds_nothing(tmp_path, monkeypatch):
    before = references.path_of(tmp_path, **FROM)
    monkeypatch.setattr(references, "ROOMS", references.ROOMS[:-1])
    assert references.path_of(tmp_path, **FROM) != before


def test_the_rooms_exist():
    from pathlib import Path

    assert all((Path(references.__file__).parent / f"{room}.py").is_file() for room in references.ROOMS)


def test_a_folder_that_cant_be_written_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("")
    path = references.path_of(tmp_path / "file", **FROM)
    references.write(path, ROWS, COLUMNS)
    assert references.read(path) is None


def test_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert references.default_folder() == tmp_path / "avsi_jax" / "references"
