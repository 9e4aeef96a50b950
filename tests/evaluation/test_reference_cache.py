"""Rows that are kept: found again, exactly, only where everything they come from is the same."""

import pytest

from avsi_jax.evaluation import reference_cache

COLUMNS = ("clip_id", "kind", "pesq_nb", "reason")
ROWS = [
    {"clip_id": "a", "kind": "masked", "pesq_nb": 0.1 + 0.2, "reason": 'said "no", twice'},
    {"clip_id": "b", "kind": "oracle_mel", "pesq_nb": None, "reason": ""},
]
FROM = {"data": "abc", "clips": ["a", "b"], "protocol": "waveform", "versions": {"pesq": "0.0.4"}}


def test_what_was_written_is_read_to_the_bit(tmp_path):
    path = reference_cache.path_of(tmp_path / "new", **FROM)
    assert reference_cache.read(path) is None
    reference_cache.write(path, ROWS, COLUMNS)
    found = reference_cache.read(reference_cache.path_of(tmp_path / "new", **FROM))
    assert float(found[0]["pesq_nb"]) == 0.1 + 0.2 and found[0]["reason"] == ROWS[0]["reason"] and found[1]["pesq_nb"] == ""
    assert reference_cache.as_csv(found, COLUMNS) == reference_cache.as_csv(ROWS, COLUMNS)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("change", [{"data": "abd"}, {"clips": ["a"]}, {"protocol": "peer"}, {"versions": {"pesq": "0.0.5"}}])
def test_other_data_protocol_or_versions_find_nothing(tmp_path, change):
    assert reference_cache.path_of(tmp_path, **FROM) != reference_cache.path_of(tmp_path, **(FROM | change))


def test_changed_code_finds_nothing(tmp_path, monkeypatch):
    before = reference_cache.path_of(tmp_path, **FROM)
    monkeypatch.setattr(reference_cache, "ROOMS", reference_cache.ROOMS[:-1])
    assert reference_cache.path_of(tmp_path, **FROM) != before


def test_the_rooms_exist():
    from pathlib import Path

    assert all((Path(reference_cache.__file__).parent / f"{room}.py").is_file() for room in reference_cache.ROOMS)


def test_a_folder_that_cant_be_written_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("")
    path = reference_cache.path_of(tmp_path / "file", **FROM)
    reference_cache.write(path, ROWS, COLUMNS)
    assert reference_cache.read(path) is None


def test_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference_cache.default_folder() == tmp_path / "avsi_jax" / "references"
