"""A batch and a case -> the sound of every system for every clip, as rows that want scores: evaluate's work without its files.

Letters: B clips, G gaps, F frames, K bands, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avsi_jax.audio import gap_masks, stft
from avsi_jax.data import grid_text, input_pipeline
from avsi_jax.evaluation import conditions, metrics, occlusion
from avsi_jax.evaluation.conditions import Case
from avsi_jax.evaluation.protocols import Protocol, lengths_of
from avsi_jax.inference import recognizer
from avsi_jax.inference import restorer as restorer_lib
from avsi_jax.media import clip_io
from avsi_jax.presets import RECORD_RATE

VIDEO = ("landmarks", "landmarks_valid", "num_frames", "frame_size", "fps", "offset_s")  # the pictures' side of a batch


class SystemOutput(NamedTuple):
    """One sound: row, the cells of clips.csv known so far; item, for `metrics.score_many`; sound and truth (n,) at `rate`."""

    row: dict
    item: dict
    audio: np.ndarray
    truth: np.ndarray
    rate: int


# ---- clips ---------------------------------------------------------------------------------------------------------------------


def chosen_clips(records, max_clips: int) -> dict[str, int]:
    """clip id -> index in the records, spread evenly over the sorted ids where only some are wanted."""
    place = {clip: i for i, clip in enumerate(records.clip_ids)}
    wanted = spread(sorted(place), max_clips) if max_clips else sorted(place)
    return {clip: place[clip] for clip in wanted}


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread, in order; all of them where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


class Clips:
    """The clips of a split as raw batches, each with `speaker`, `text`, `words` and others' pictures under `donors`.

    'clip': of the speaker's next clip by id, or the next of anybody where the speaker has only one; 'speaker': of a clip of the
    next speaker, or the next of anybody where there is only one.
    """

    def __init__(self, records, place: dict[str, int]):
        self.raw = {clip: records[i] for clip, i in place.items()}
        speakers = {clip: r["speaker"] for clip, r in self.raw.items()}
        self.donors = {"clip": other_clips(speakers), "speaker": other_speakers(speakers)}
        self.hidden: dict[tuple, dict] = {}  # (gap_ms, family, value) -> clip id -> points, valid, mouth of its painted pictures

    def batches(self, size: int):
        ids = sorted(self.raw)
        for start in range(0, len(ids), size):
            yield self.batch(ids[start : start + size], size)

    def batch(self, ids: list[str], size: int) -> dict:
        """The clips, filled up with the last one at weight 0, so that every batch has one shape."""
        filled = ids + [ids[-1]] * (size - len(ids))
        batch = _stack([input_pipeline.to_example(self.raw[c]) for c in filled])
        batch["weight"] = np.asarray([1.0] * len(ids) + [0.0] * (size - len(ids)), np.float32)
        for key in ("speaker", "text", "words"):
            batch[key] = [self.raw[c][key] for c in filled]
        batch["donors"] = {kind: self._video([of[c] for c in filled]) for kind, of in self.donors.items()}
        batch["donors"] |= {key: _as_frames([of[c] for c in filled], batch) for key, of in self.hidden.items()}
        return batch

    def hide(self, raw: Path, cases: Sequence[Case], protocol: Protocol, num_workers: int, tick) -> None:
        """Paints and tracks the videos below `raw` for the cases of conditions.HIDDEN; what comes out goes into every later batch."""
        videos = occlusion.find_videos(raw, self.raw)
        keys = list(
            dict.fromkeys((c.gap_ms, c.family.removesuffix("_told"), c.value) for c in cases if c.family in conditions.HIDDEN)
        )
        jobs = []
        for clip in self.raw:
            batch = self.batch([clip], 1)
            changes = []
            for gap_ms, family, value in keys:
                video = value * float(batch["fps"][0]) / 1000
                span = (
                    conditions.around_gap(batch, protocol.place(batch, Case(gap_ms)), video)[0] if "covered" in family else (0, 0)
                )
                changes.append(((gap_ms, family, value), family, value, *span))
            jobs.append((str(videos[clip]), batch["landmarks"][0, : batch["num_frames"][0]], clip, changes))
        for clip, found in zip(self.raw, occlusion.track_all(jobs, num_workers, tick), strict=True):
            for key, made in found.items():
                self.hidden.setdefault(key, {})[clip] = made

    def _video(self, ids: list[str]) -> dict:
        batch = _stack([input_pipeline.to_example(self.raw[c]) for c in ids])
        return {k: batch[k] for k in VIDEO}


def _as_frames(found: list[tuple], batch: dict) -> dict:
    """[(points (T, 68, 2), valid (T,), mouth (T,)), ...] -> arrays of the batch's own T."""
    points, valid = batch["landmarks"].copy(), {k: np.zeros_like(batch["landmarks_valid"]) for k in ("landmarks_valid", "mouth")}
    for b, (seen_at, *seen) in enumerate(found):
        count = min(len(seen_at), points.shape[1])
        points[b, :count], points[b, count:] = seen_at[:count], seen_at[count - 1]
        for name, values in zip(valid, seen, strict=True):
            valid[name][b, :count] = values[:count]
    return {"landmarks": points, **valid}


def _stack(examples: list[dict]) -> dict:
    return {k: [e[k] for e in examples] if k == "clip_id" else np.stack([e[k] for e in examples]) for k in examples[0]}


def other_clips(speakers: dict[str, str]) -> dict[str, str]:
    """clip id -> the id whose video stands in for its own: the speaker's next, or where there is none anybody's."""
    partner = {}
    for pool in [sorted(speakers)] + [sorted(c for c in speakers if speakers[c] == s) for s in set(speakers.values())]:
        if len(pool) > 1:
            partner |= {clip: pool[(i + 1) % len(pool)] for i, clip in enumerate(pool)}
    return {clip: partner.get(clip, clip) for clip in speakers}


def other_speakers(speakers: dict[str, str]) -> dict[str, str]:
    """clip id -> the id of another speaker's clip, in turn; `other_clips` where there is one speaker."""
    names = sorted(set(speakers.values()))
    if len(names) < 2:
        return other_clips(speakers)
    of = {name: sorted(c for c in speakers if speakers[c] == name) for name in names}
    after = dict(zip(names, names[1:] + names[:1], strict=True))
    return {clip: of[after[name]][of[name].index(clip) % len(of[after[name]])] for clip, name in speakers.items()}


# ---- one batch -----------------------------------------------------------------------------------------------------------------


def restore_case(batch: dict, case: Case, protocol: Protocol, restorer, lineup: list[dict], judge=None) -> list[SystemOutput]:
    """The sound of every system of the lineup for every clip of a batch in one case, clip by clip in the order of the lineup.

    lineup: [{"name", "kind"}] with kinds damaged, interpolation, system, other_video, ceiling. judge: a `recognizer.Recogniser`.
    """
    spec, kinds = restorer.spec, {s["kind"] for s in lineup}
    gap = protocol.place(batch, case)
    given = conditions.changed(batch, gap, case, batch["donors"])
    levels, said = restore_levels(batch, given, gap, restorer, kinds)
    clean = restorer.hear(batch, gap)
    error = _level_errors(levels, clean, gap, spec)
    waveforms = protocol.waveforms(levels, given, gap, restorer.config.preset)
    truth = protocol.truth(batch, clean.target, restorer.config.preset)
    rate, score_rate = protocol.audio_rate(spec), protocol.score_rate(spec)
    ends = lengths_of(batch, spec) * rate // RECORD_RATE
    verdicts = {k: _judged(judge, waveforms[k], ends, rate, batch, gap) for k in waveforms if k in kinds} if judge else {}
    made = []
    for b in np.flatnonzero(batch["weight"]):
        here = [(s / RECORD_RATE, min(e, batch["audio_length"][b]) / RECORD_RATE) for s, e in gap[b].tolist() if e > s]
        reference = clip_io.resample(truth[b, : ends[b]], rate, score_rate)
        for system in lineup:
            kind = system["kind"]
            audio = waveforms[kind][b, : ends[b]]
            row = {
                **row_head(batch, b, case, here),
                "system": system["name"],
                "kind": kind,
                "gap_l1_mel_db": float(error[kind][b]) if kind in error else None,
                **heard(said.get(kind), restorer.config.ctc_units, batch["text"][b], b),
                **{k: v[b] for k, v in verdicts.get(kind, {}).items()},
            }
            degraded = clip_io.resample(audio, rate, score_rate)
            item = {"reference": reference, "degraded": degraded, "rate": score_rate, "gaps_s": tuple(here)}
            made.append(SystemOutput(row, item, audio, truth[b, : ends[b]], rate))
    return made


def row_head(batch: dict, b: int, case: Case, gaps_s: list[tuple[float, float]]) -> dict:
    return {
        "clip_id": batch["clip_id"][b],
        "speaker": batch["speaker"][b],
        "case": case.name,
        "gap_ms": case.gap_ms,
        "start_s": round(min(s for s, _ in gaps_s), 6),
        "end_s": round(max(e for _, e in gaps_s), 6),
        "gaps_s": " ".join(f"{s:.6f}-{e:.6f}" for s, e in sorted(gaps_s)),
        "in_words": bool(batch["has_words"][b]),
    }


def restore_levels(batch: dict, given: dict, gap: np.ndarray, restorer, kinds: set[str]) -> tuple[dict, dict]:
    """By kind: levels (B, F, K); of what reads, texts. `given` is the batch as the case leaves it to the network."""
    results = {}
    if "system" in kinds:
        results["system"] = restorer.restore(given, gap)
    if "other_video" in kinds:
        results["other_video"] = restorer.restore(given | batch["donors"]["clip"], gap)
    levels = {kind: r.level for kind, r in results.items()}
    if kinds & {"masked", "interpolation", "oracle_mel"}:
        features = restorer.hear(given, gap)
        levels["interpolation"] = restorer_lib.interpolate_level(features.spectrogram, features.mask, features.valid)
        levels["masked"] = features.spectrogram
        levels["oracle_mel"] = restorer.hear(batch, gap).target
    reads = restorer.system.reads
    return {k: v for k, v in levels.items() if k in kinds}, {k: r.transcript for k, r in results.items() if reads}


def _level_errors(levels: dict, clean, gap: np.ndarray, spec) -> dict:
    """By kind: mean |difference| (B,) from the clean level in dB, over all bands of the frames centred in the gap."""
    inside = np.asarray(gap_masks.centred_frames(gap, spec, spec.num_frames) & clean.valid)
    count = np.maximum(inside.sum(-1), 1)
    off = {kind: np.abs(np.asarray(level - clean.target)).mean(-1) for kind, level in levels.items() if kind != "masked"}
    return {kind: stft.db_per_level(spec) * (e * inside).sum(-1) / count for kind, e in off.items()}


def heard(texts: list[str] | None, units: str, spoken: str, b: int) -> dict:
    """Cells for what was read: empty where a system doesn't read, no error where the truth isn't known, else the error in
    characters or in phones.
    """
    cells = {"cer": None, "per": None, "said": "", "text": spoken}
    if texts is None:
        return cells
    name, measure = ("per", metrics.phone_error) if units == "phones" else ("cer", metrics.character_error)
    error = measure(spoken, texts[b])
    return cells | {name: None if math.isnan(error) else error, "said": texts[b]}


def _judged(judge: recognizer.Recognizer, waveform: np.ndarray, ends: np.ndarray, rate: int, batch: dict, gap: np.ndarray) -> dict:
    """Cells wer_gap, heard and touched of B sounds at `rate` Hz; the words' times are the judge's own where the clip has none."""
    size = judge.spec.record_samples
    lengths = np.minimum(batch["audio_length"], size)
    audio = np.zeros((len(waveform), size), np.float32)
    for row, x, end in zip(audio, waveform, ends, strict=True):
        x = clip_io.resample(x[:end], rate, RECORD_RATE)[:size]
        row[: len(x)] = x
    timed = all(len(words) == len(grid_text.SLOTS) for words in batch["words"])
    heard_at = None if timed else judge.hear(batch["audio"][:, :size], lengths).span_s
    spans = recognizer.word_spans(batch["words"], batch["offset_s"], heard_at)
    found = judge.judge(audio, lengths, batch["text"], spans, gap)
    return {
        "wer_gap": [None if math.isnan(e) else float(e) for e in found.error],
        "heard": found.words,
        "touched": ["".join("01"[t] for t in row) for row in found.touched.astype(int)],
    }
