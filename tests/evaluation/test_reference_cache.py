"""The cache of reference rows: they are read back exactly, and only if everything that determines them is the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from avsi_jax.evaluation import reference_cache

COLUMNS = ("clip_id", "kind", "pesq_nb", "reason")
ROWS = [
    {"clip_id": "a", "kind": "masked", "pesq_nb": 0.1 + 0.2, "reason": 'a "quoted" word, twice'},
    {"clip_id": "b", "kind": "oracle_mel", "pesq_nb": None, "reason": ""},
]
code_hash = reference_cache.code_hash
INPUTS = {"data": "abc", "clips": ["a", "b"], "protocol": "waveform", "versions": {"pesq": "0.0.4"}}


@pytest.fixture(autouse=True)
def same_code(monkeypatch):
    """The code is hashed only in the tests about it."""
    monkeypatch.setattr(reference_cache, "code_hash", lambda: "code")


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


SOURCES = {  # of an invented package: what its rows are computed from
    "evaluation/__init__.py": "",
    "evaluation/cli.py": "from avsi_jax.evaluation import page, run_systems\n",
    "evaluation/run_systems.py": "from avsi_jax.models import network\nimport numpy\n",
    "evaluation/protocols.py": "def place():\n    from avsi_jax.audio.masks import draw\n    return draw()\n",
    "evaluation/metrics.py": "import avsi_jax.presets\n",
    "presets.py": "",
    "models/__init__.py": "",
    "models/network.py": "if True:\n    import avsi_jax.models.layers as layers\n",
    "models/layers.py": "",
    "audio/__init__.py": "",
    "audio/masks.py": "",
    "audio/bases.npz": "numbers",
}
OTHERS = {  # what has no influence on a row
    "evaluation/page.py": "",
    "evaluation/reference_cache.py": "",
    "audio/unused.py": "",
    "app/server.py": "",
    "weights.safetensors": "",
}
ONLY_ANNOTATED = "\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from avsi_jax.app import server\n"


@pytest.fixture
def package(tmp_path):
    for name, text in (SOURCES | OTHERS | {"evaluation/metrics.py": SOURCES["evaluation/metrics.py"] + ONLY_ANNOTATED}).items():
        path = tmp_path / "avsi_jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "avsi_jax"


def test_a_change_of_anything_that_rows_are_computed_from_changes_the_key(package):
    before, changed = code_hash(package), {}
    for name in SOURCES | OTHERS:
        text = (package / name).read_text()
        (package / name).write_text(f"{text}\n")
        changed[name] = code_hash(package) != before
        (package / name).write_text(text)
    assert changed == dict.fromkeys(SOURCES, True) | dict.fromkeys(OTHERS, False)


def test_the_key_includes_every_module_that_the_evaluation_loads():
    """Compared with the modules that Python has loaded after importing those that compute rows, and with files known to matter."""
    code = (
        "import sys; from avsi_jax.evaluation import metrics, protocols, run_systems; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('avsi_jax.') and m.__file__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = {Path(path).resolve() for path in done.stdout.split()}
    included = {path.resolve() for path in reference_cache.code_files()}
    assert len(loaded) > 20 and loaded <= included
    known = "data/input_pipeline.py data/tfrecords.py data/features.py models/systems.py models/lstm.py audio/mel_bases.npz".split()
    assert {(reference_cache.PACKAGE / name).resolve() for name in known} <= included


def test_the_key_contains_the_hash_of_the_code(tmp_path, monkeypatch):
    before = reference_cache.path_of(tmp_path, **INPUTS)
    monkeypatch.setattr(reference_cache, "code_hash", lambda: "another")
    assert reference_cache.path_of(tmp_path, **INPUTS) != before


def test_a_folder_that_cannot_be_written_is_ignored(tmp_path):
    (tmp_path / "file").write_text("")
    path = reference_cache.path_of(tmp_path / "file", **INPUTS)
    reference_cache.write(path, ROWS, COLUMNS)
    assert reference_cache.read(path) is None


def test_the_default_folder_is_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert reference_cache.default_folder() == tmp_path / "avsi_jax" / "references"
