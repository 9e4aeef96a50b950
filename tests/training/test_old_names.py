"""Configs, weights and results with former names are read under today's names."""

import json

from avsi_jax import configs
from avsi_jax.training import old_names, run_directory

OLD = {
    "lip_layers": 2,
    "pictures_every": 5,
    "units": 8,
    "augment": {"lose_video": 0.1, "lose_sound": 0.2, "speed": 0.3},
    "gaps": {"total": "normal", "low_ms": 800.0, "high_ms": 200.0, "min_ms": 60.0},
}


def test_renamed_fields_are_read():
    current = old_names.current_config(OLD)
    assert (current["video_layers"], current["images_every"], current["units"]) == (2, 5, 8)
    assert current["augment"] == {"drop_video": 0.1, "drop_audio": 0.2, "speed": 0.3}


def test_former_gap_durations_depend_on_their_distribution():
    normal = old_names.current_config(OLD)["gaps"]
    assert (normal["total_mean_ms"], normal["total_std_ms"], normal["min_ms"]) == (800.0, 200.0, 60.0)
    uniform = old_names.current_config({"gaps": {"total": "uniform", "low_ms": 160.0, "high_ms": 1600.0}})["gaps"]
    assert (uniform["total_min_ms"], uniform["total_max_ms"]) == (160.0, 1600.0)
    assert "low_ms" not in normal and "high_ms" not in uniform


def test_a_current_config_is_unchanged():
    fields = json.loads(configs.load("av_unified").to_json())
    assert old_names.current_config(fields) == fields


def test_a_run_directory_with_former_names_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLD))
    assert run_directory.read_config(tmp_path)["video_layers"] == 2


def test_former_inputs_of_measured_quality_are_read():
    facts = {"measured": {"sound and lips": {"300": {"stoi": 0.5}}, "sound": {}, "lips": {}}, "license": "x"}
    current = old_names.current_facts(facts)
    assert current == {"measured": {"audio and video": {"300": {"stoi": 0.5}}, "audio": {}, "video": {}}, "license": "x"}
    assert old_names.current_facts(current) == current and old_names.current_facts({}) == {}


def test_former_kinds_of_systems_are_read():
    facts = {"table": [{"kind": "damaged", "mean": 1.0}, {"kind": "ceiling"}], "note": "damaged"}
    assert old_names.current_kinds(facts) == {"table": [{"kind": "masked", "mean": 1.0}, {"kind": "oracle_mel"}], "note": "damaged"}
