"""Former names of config fields and of kinds of systems: configs, weights and results that use them are read under today's names.

Every such file passes through `current_config` or `current_kinds` when it is read.
"""

from __future__ import annotations

from typing import Any

RENAMED_FIELDS = {  # config fields by group, "" is the top level: {former name: today's name}
    "": {"lip_layers": "video_layers", "pictures_every": "images_every"},
    "augment": {"lose_video": "drop_video", "lose_sound": "drop_audio"},
}
RENAMED_KINDS = {"damaged": "masked", "ceiling": "oracle_mel"}  # kinds of systems in results
RENAMED_INPUTS = {"sound and lips": "audio and video", "sound": "audio", "lips": "video"}  # of the measured quality of weights


def current_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config.json under today's names; a current config is returned unchanged.

    The former gaps.low_ms and gaps.high_ms were mean and standard deviation for gaps.total='normal', and the range for 'uniform'.
    """
    fields = _renamed(fields, RENAMED_FIELDS[""])
    for group, names in RENAMED_FIELDS.items():
        if group and isinstance(fields.get(group), dict):
            fields[group] = _renamed(fields[group], names)
    gaps = fields.get("gaps")
    if isinstance(gaps, dict) and "low_ms" in gaps:
        names = ("total_mean_ms", "total_std_ms") if gaps.get("total", "normal") == "normal" else ("total_min_ms", "total_max_ms")
        unused = {"total_mean_ms": 900.0, "total_std_ms": 300.0, "total_min_ms": 160.0, "total_max_ms": 1600.0}
        fields["gaps"] = unused | _renamed(gaps, dict(zip(("low_ms", "high_ms"), names, strict=True)))
    return fields


def current_kinds(value: Any) -> Any:
    """A JSON value of results with today's names of the kinds of systems in every {"kind": ...}, at any depth."""
    if isinstance(value, dict):
        return {k: RENAMED_KINDS.get(v, v) if k == "kind" and isinstance(v, str) else current_kinds(v) for k, v in value.items()}
    return [current_kinds(v) for v in value] if isinstance(value, list) else value


def current_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts of weights (`inference/model_card.py`) under current names."""
    facts = current_kinds(facts)
    return facts | {"measured": _renamed(facts["measured"], RENAMED_INPUTS)} if "measured" in facts else facts


def _renamed(fields: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in fields.items()}
