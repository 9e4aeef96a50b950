"""Runs all systems of an evaluation on a batch in one case: audio and unscored rows for every clip. Writes no files.

Letters: B clips, G gaps, F spectrogram frames, K bands, N samples, T video frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
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

VIDEO = ("landmarks", "landmarks_valid", "num_frames", "frame_size", "fps", "offset_s")  # video arrays of a batch


class SystemOutput(NamedTuple):
    """The audio of one system for one clip."""

    row: dict  # the cells of clips.csv except the scores
    item: dict  # for `metrics.score_many`
    audio: np.ndarray  # (n,)
    reference: np.ndarray  # (n,)
    rate: int  # Hz


# ---- clips ---------------------------------------------------------------------------------------------------------------------


def select_clips(records: input_pipeline.Records, max_clips: int) -> dict[str, int]:
    """clip id -> index in the records; max_clips spreads the selection evenly over the sorted ids, 0 selects all."""
    index = {clip: i for i, clip in enumerate(records.clip_ids)}
    selected = spread(sorted(index), max_clips) if max_clips else sorted(index)
    return {clip: index[clip] for clip in selected}


def spread(items: list, count: int) -> list:
    """`count` of the items, evenly spread, in order; all items where there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


class Clips:
    """The clips of a split as raw batches, each with `speaker`, `text`, `words`, and video of other clips under `donors`.

    donors['clip']: video of the speaker's next clip by id, or of any speaker's where the speaker has only one clip;
    donors['speaker']: of a clip of the next speaker, or of the next clip where there is only one speaker.
    """

    def __init__(self, records: input_pipeline.Records, index: dict[str, int]):
        self.raw = {clip: records[i] for clip, i in index.items()}
        speakers = {clip: r["speaker"] for clip, r in self.raw.items()}
        self.donors = {"clip": other_clips(speakers), "speaker": other_speakers(speakers)}
        self.occluded: dict[tuple, dict] = {}  # (gap_ms, family, value) -> clip id -> points, valid, mouth of its painted frames

    def batches(self, size: int) -> Iterator[dict]:
        """All clips, sorted by id, in batches of `size`."""
        ids = sorted(self.raw)
        for start in range(0, len(ids), size):
            yield self.batch(ids[start : start + size], size)

    def batch(self, ids: list[str], size: int) -> dict:
        """These clips, padded to `size` with the last one at weight 0, so that every batch has the same shape."""
        padded = ids + [ids[-1]] * (size - len(ids))
        batch = _stack([input_pipeline.to_example(self.raw[c]) for c in padded])
        batch["weight"] = np.asarray([1.0] * len(ids) + [0.0] * (size - len(ids)), np.float32)
        for key in ("speaker", "text", "words"):
            batch[key] = [self.raw[c][key] for c in padded]
        batch["donors"] = {kind: self._video([of[c] for c in padded]) for kind, of in self.donors.items()}
        batch["donors"] |= {key: _as_frames([of[c] for c in padded], batch) for key, of in self.occluded.items()}
        return batch

    def track_occluded(
        self, raw: Path, cases: Sequence[Case], protocol: Protocol, num_workers: int, progress: Callable[[int, int], None]
    ) -> None:
        """Paints and tracks the videos below `raw` for the cases of conditions.OCCLUDED; later batches contain the landmarks.

        progress(done, total) is called after each clip.
        """
        videos = occlusion.find_videos(raw, self.raw)
        occluded = [c for c in cases if c.family in conditions.OCCLUDED]
        keys = list(dict.fromkeys((c.gap_ms, c.family.removesuffix(conditions.FLAGGED), c.value) for c in occluded))
        jobs = []
        for clip in self.raw:
            batch = self.batch([clip], 1)
            changes = []
            for gap_ms, family, value in keys:
                count = value * float(batch["fps"][0]) / 1000
                span = (
                    conditions.around_gap(batch, protocol.place(batch, Case(gap_ms)), count)[0] if "covered" in family else (0, 0)
                )
                changes.append(((gap_ms, family, value), family, value, *span))
            jobs.append((str(videos[clip]), batch["landmarks"][0, : batch["num_frames"][0]], clip, changes))
        for clip, by_key in zip(self.raw, occlusion.track_all(jobs, num_workers, progress), strict=True):
            for key, tracked in by_key.items():
                self.occluded.setdefault(key, {})[clip] = tracked

    def _video(self, ids: list[str]) -> dict:
        batch = _stack([input_pipeline.to_example(self.raw[c]) for c in ids])
        return {k: batch[k] for k in VIDEO}


def _as_frames(tracked: list[tuple], batch: dict) -> dict:
    """[(points (T, 68, 2), valid (T,), mouth (T,)), ...] -> arrays padded to the batch's T."""
    points, flags = batch["landmarks"].copy(), {k: np.zeros_like(batch["landmarks_valid"]) for k in ("landmarks_valid", "mouth")}
    for b, (own_points, *own_flags) in enumerate(tracked):
        count = min(len(own_points), points.shape[1])
        points[b, :count], points[b, count:] = own_points[:count], own_points[count - 1]
        for name, values in zip(flags, own_flags, strict=True):
            flags[name][b, :count] = values[:count]
    return {"landmarks": points, **flags}


def _stack(examples: list[dict]) -> dict:
    return {k: [e[k] for e in examples] if k == "clip_id" else np.stack([e[k] for e in examples]) for k in examples[0]}


def other_clips(speakers: dict[str, str]) -> dict[str, str]:
    """clip id -> the id of the clip whose video replaces its own: the speaker's next, or any next where there is no other."""
    partner = {}
    for pool in [sorted(speakers)] + [sorted(c for c in speakers if speakers[c] == s) for s in set(speakers.values())]:
        if len(pool) > 1:
            partner |= {clip: pool[(i + 1) % len(pool)] for i, clip in enumerate(pool)}
    return {clip: partner.get(clip, clip) for clip in speakers}


def other_speakers(speakers: dict[str, str]) -> dict[str, str]:
    """clip id -> the id of a clip of the next speaker, in turn; `other_clips` where there is only one speaker."""
    names = sorted(set(speakers.values()))
    if len(names) < 2:
        return other_clips(speakers)
    of = {name: sorted(c for c in speakers if speakers[c] == name) for name in names}
    after = dict(zip(names, names[1:] + names[:1], strict=True))
    return {clip: of[after[name]][of[name].index(clip) % len(of[after[name]])] for clip, name in speakers.items()}


# ---- one batch -----------------------------------------------------------------------------------------------------------------


def restore_case(
    batch: dict, case: Case, protocol: Protocol, restorer: restorer_lib.Restorer, systems: list[dict],
    judge: recognizer.Recognizer | None = None,
) -> list[SystemOutput]:  # fmt: skip
    """The audio of all systems for all clips of a batch in one case: clip by clip, in the order of `systems`.

    systems: [{"name", "kind"}] with the kinds masked, interpolation, mean, system, other_video, oracle_mel.
    """
    spec, kinds = restorer.spec, {s["kind"] for s in systems}
    gap = protocol.place(batch, case)
    changed = conditions.changed(batch, gap, case, batch["donors"])
    levels, transcripts = restore_levels(batch, changed, gap, restorer, kinds)
    clean = restorer.features(batch, gap)
    error = _level_errors(levels, clean, gap, spec)
    of_levels = _paper_scores(levels, clean) if protocol.name == "paper" else {}
    waveforms = protocol.waveforms(levels, changed, gap, restorer.config.preset)
    references = protocol.reference(batch, clean.target, restorer.config.preset)
    rate, score_rate = protocol.audio_rate(spec), protocol.score_rate(spec)
    ends = lengths_of(batch, spec) * rate // RECORD_RATE
    judge_cells = {k: _judge(judge, waveforms[k], ends, rate, batch, gap) for k in waveforms if k in kinds} if judge else {}
    outputs = []
    for b in np.flatnonzero(batch["weight"]):
        gaps_s = [(s / RECORD_RATE, min(e, batch["audio_length"][b]) / RECORD_RATE) for s, e in gap[b].tolist() if e > s]
        reference = clip_io.resample(references[b, : ends[b]], rate, score_rate)
        for system in systems:
            kind = system["kind"]
            audio = waveforms[kind][b, : ends[b]]
            row = {
                **identifying_cells(batch, b, case, gaps_s),
                "system": system["name"],
                "kind": kind,
                "gap_l1_mel_db": error[kind][b] if kind in error else None,
                **{metric: values[b] for metric, values in of_levels.get(kind, {}).items()},
                **transcript_cells(transcripts.get(kind), restorer.config.ctc_units, batch["text"][b], b),
                **{k: v[b] for k, v in judge_cells.get(kind, {}).items()},
            }
            degraded = clip_io.resample(audio, rate, score_rate)
            item = {"reference": reference, "degraded": degraded, "rate": score_rate, "gaps_s": tuple(gaps_s)}
            outputs.append(SystemOutput(row, item, audio, references[b, : ends[b]], rate))
    return outputs


def identifying_cells(batch: dict, b: int, case: Case, gaps_s: list[tuple[float, float]]) -> dict:
    """Cells of clips.csv that identify clip b, its case and its gaps."""
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


def restore_levels(
    batch: dict, changed: dict, gap: np.ndarray, restorer: restorer_lib.Restorer, kinds: set[str]
) -> tuple[dict, dict]:
    """({kind: levels (B, F, K)}, {kind: transcripts of a text head}). `changed` is the batch that the network gets in the case."""
    results = {}
    if "system" in kinds:
        results["system"] = restorer.restore(changed, gap)
    if "mean" in kinds:
        results["mean"] = restorer.mean.restore(changed, gap)
    if "other_video" in kinds:
        results["other_video"] = restorer.restore(changed | batch["donors"]["clip"], gap)
    levels = {kind: r.level for kind, r in results.items()}
    if kinds & {"masked", "interpolation", "oracle_mel"}:
        features = restorer.features(changed, gap)
        levels["interpolation"] = restorer_lib.interpolate_level(features.spectrogram, features.mask, features.valid)
        levels["masked"] = features.spectrogram
        levels["oracle_mel"] = restorer.features(batch, gap).target
    reads = restorer.system.has_ctc_head
    return {k: v for k, v in levels.items() if k in kinds}, {k: r.transcript for k, r in results.items() if reads}


def _level_errors(levels: dict, clean, gap: np.ndarray, spec) -> dict:
    """{kind: B means of |difference| from the clean level in dB}, over all bands of the frames in the gap; None without any."""
    inside = np.asarray(gap_masks.centred_frames(gap, spec, spec.num_frames) & clean.valid)
    count = np.where(inside.any(-1), inside.sum(-1), np.nan)
    cells = lambda errors: [float(e) if math.isfinite(e) else None for e in errors]
    difference = {kind: np.abs(np.asarray(level - clean.target)).mean(-1) for kind, level in levels.items() if kind != "masked"}
    return {kind: cells(stft.db_per_level(spec) * (e * inside).sum(-1) / count) for kind, e in difference.items()}


def _paper_scores(levels: dict, clean) -> dict[str, dict[str, list[float | None]]]:
    """{kind: {metric: a value or None of each clip}} of the paper's scores of levels in [0, 1].

    psnr_db and ssim are of the valid frames of the spectrogram that is restored in the gaps, gap_mse of the frames in the gaps.
    """
    target, mask, valid = (np.asarray(x) for x in (clean.target, clean.mask, clean.valid))
    scores = {}
    for kind, level in levels.items():
        rows = [(np.asarray(x)[v], t[v], m[v]) for x, t, m, v in zip(level, target, mask, valid, strict=True)]
        cells = {
            "psnr_db": [metrics.psnr(t, x) for x, t, _ in rows],
            "ssim": [metrics.ssim(t, x) for x, t, _ in rows],
            "gap_mse": [float(np.square(x - t)[m].mean()) if m.any() else math.nan for x, t, m in rows],
        }
        scores[kind] = {k: [v if math.isfinite(v) else None for v in values] for k, values in cells.items()}
    return scores


def transcript_cells(transcripts: list[str] | None, units: str, text: str, b: int) -> dict:
    """Cells for the transcript of clip b: empty without a text head, no error where the true text is unknown, otherwise the error
    rate in characters or phones.
    """
    cells = {"cer": None, "per": None, "transcript": "", "text": text}
    if transcripts is None:
        return cells
    name, measure = ("per", metrics.phone_error) if units == "phones" else ("cer", metrics.character_error)
    error = measure(text, transcripts[b])
    return cells | {name: None if math.isnan(error) else error, "transcript": transcripts[b]}


def _judge(judge: recognizer.Recognizer, waveform: np.ndarray, ends: np.ndarray, rate: int, batch: dict, gap: np.ndarray) -> dict:
    """Cells wer_gap, recognized and touched of B clips at `rate` Hz; the judge times the words of clips without word times."""
    size = judge.spec.record_samples
    lengths = np.minimum(batch["audio_length"], size)
    audio = np.zeros((len(waveform), size), np.float32)
    for row, x, end in zip(audio, waveform, ends, strict=True):
        x = clip_io.resample(x[:end], rate, RECORD_RATE)[:size]
        row[: len(x)] = x
    timed = all(len(words) == len(grid_text.SLOTS) for words in batch["words"])
    recognized_spans = None if timed else judge.recognize(batch["audio"][:, :size], lengths).span_s
    spans = recognizer.word_spans(batch["words"], batch["offset_s"], recognized_spans)
    errors = judge.judge(audio, lengths, batch["text"], spans, gap)
    return {
        "wer_gap": [None if math.isnan(e) else float(e) for e in errors.error],
        "recognized": errors.words,
        "touched": ["".join("01"[t] for t in row) for row in errors.touched.astype(int)],
    }
