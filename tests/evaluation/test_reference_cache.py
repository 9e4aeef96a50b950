"""The cache of reference rows: they are read back exactly, and only if everything that determines them is the same."""

from pathlib import Path

import pytest

from avsi_jax.evaluation import reference_cache

COLUMNS = ("clip_id", "kind", "pesq_nb", "reason")
ROWS = [
    {"clip_id": "a", "kind": "masked", "pesq_nb": 0.1 + 0.2, "reason": 'a "quoted" word, twice'},
    {"clip_id": "b", "kind": "oracle_mel", "pesq_nb": None, "reason": ""},
]
INPUTS = {"data": "abc", "clips": ["a", "b"], "protocol": "waveform", "versions": {"pesq": "0.0.4"}}


def test_rows_are_read_back_exactly(tmp_path):
    path = reference_cache.path_of(tmp_path / "new", **INPUTS)
    assert reference_cache.read(path) is None
    reference_cache.write(path, ROWS, COLUMNS)
    found = reference_cache.read(reference_cache.path_of(tmp_path / "new", **INPUTS))
    assert float(found[0]["pesq_nb"]) == 0.1 + 0.2 and found[0]["reason"] == ROWS[0]["reason"] and found[1]["pesq_nb"] == ""
    assert reference_cache.as_csv(found, COLUMNS) == reference_cache.as_csv(ROWS, COLUMNS)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("change", [{"data": "abd"}, {"clips": ["a"]}, {"protocol": "peer"}, {"versions": {"pesq": "0.0.5"}}])
def test_other_data_protocol_or_versions_have_another_file(tmp_path, change):
    assert reference_cache.path_of(tmp_path, **INPUTS) != reference_cache.path_of(tmp_path, **(INPUTS | change))


def test_changed_code_has_another_file(tmp_path, monkeypatch):
    before = reference_cache.path_of(tmp_path, **INPUTS)
    monkeypatch.setattr(reference_cache, "MODULES", reference_cache.MODULES[:-1])
    assert reference_cache.path_of(tmp_path, **INPUTS) != before


def test_the_modules_of_the_key_exist():
    package = Path(reference_cache.__file__).parents[1]
    assert not [module for module in reference_cache.MODULES if not (package / f"{module}.py").is_file()]
    assert "evaluation/reference_cache" not in reference_cache.MODULES and "evaluation/metrics" in reference_cache.MODULES


def test_a_folder_that_cannot_be_written_is_ignored(tmp_path):
    (tmp_path / "file").write_text("")
    path = reference_cache.path_of(tmp_path / "file", **INPUTS)
    reference_cache.write(path, ROWS, COLUMNS)
    assert reference_cache.read(path) is None


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference_cache.default_folder() == tmp_path / "avsi_jax" / "references"
