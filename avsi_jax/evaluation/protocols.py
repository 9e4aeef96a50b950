"""What an evaluation means by damage, by a restored sound and by the truth: three protocols, whose numbers are never to be mixed.

waveform  ours, everything headline: the samples are gone; the gap lies in the words; its sound joins the recording on both sides;
          scored against the recording at the rate of the system's preset.
paper     as the paper's code: whole frames of the spectrogram set to silence, 1 to 8 gaps of N(900, 300) ms in all; the whole
          spectrogram, what was heard included, goes through its own inversion, and so does the truth (from other phases), against
          which it is scored at 8 kHz.
peer      as the table of re-implementations that compares systems of this kind: the samples are gone; one gap anywhere in the
          clip; the gap's sound cut out of a Griffin-Lim of the whole clip; scored against the recording at 16 kHz, wide band.

Letters: B clips, G gaps, F frames, K bands, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avsi_jax.audio import gap_masks, griffin_lim
from avsi_jax.evaluation.conditions import LONGEST_MS, Case
from avsi_jax.inference import restorer
from avsi_jax.presets import RECORD_RATE, Spec, get

PEER_MS = (160, 320, 500, 750, 1000, 1250, 1500)
PAPER_CASE = Case(900, "paper_gaps", 8, 8)  # 900: the mean of what is lost in all
APART = RECORD_RATE // 50  # samples at least from one of several gaps to the next
OTHER_PHASES = np.uint32(0x9E3779B9)  # added to a clip's seed: the truth doesn't start from the phases of what is measured by it


class Protocol(NamedTuple):
    """name; damage: of gap_masks.PROTOCOLS; cases: what replaces a suite's own lengths, or all of its cases; presets: those it is
    defined for, () for all.

    place(batch, case) -> gaps (B, G, 2) in record samples. sounds(levels {kind: (B, F, K)}, batch, gap, preset) -> {kind: (B, N)
    float32} at `sound_rate`; truth(batch, target level (B, F, K), preset) -> (B, N) at the same. Scored at `score_rate`.
    """

    name: str
    damage: str
    gap_ms: tuple[int, ...]
    cases: tuple[Case, ...]
    presets: tuple[str, ...]
    place: Callable[[dict, Case], np.ndarray]
    waveforms: Callable[[dict, dict, np.ndarray, str], dict]
    truth: Callable[[dict, jax.Array, str], np.ndarray]
    audio_rate: Callable[[Spec], int]
    score_rate: Callable[[Spec], int]
    transcript: str  # in a report, what was done


def lengths_of(batch: dict, spec: Spec) -> np.ndarray:
    """(B,) record samples of each clip that its preset takes."""
    return np.minimum(batch["audio_length"], spec.record_samples)


# ---- where the gaps are --------------------------------------------------------------------------------------------------------


def in_speech(batch: dict, case: Case) -> np.ndarray:
    """Gaps (B, count, 2) in the words, by id and case; all of the clip where nothing else would do."""
    return np.stack([_in_speech(*row, case) for row in zip(batch["clip_id"], batch["speech"], batch["audio_length"], strict=True)])


def _in_speech(clip_id: str, speech_s, num_samples, case: Case) -> np.ndarray:
    """(count, 2). Several gaps are of one length; what is left between the words' ends is shared out by hashes of the id."""
    num_samples, speech_s = int(num_samples), tuple(speech_s)
    if case.gap_ms >= LONGEST_MS:
        return np.array([[0, num_samples]])
    if case.count == 1:
        return np.array([gap_masks.place_in_speech(clip_id, case.gap_ms, speech_s, num_samples)])
    first, last = (min(round(t * RECORD_RATE), num_samples) for t in speech_s)
    between = (case.count - 1) * APART
    length = min(case.gap_ms * RECORD_RATE // 1000, num_samples - between) // case.count
    total = case.count * length + between
    if last - first < total:  # centred on the words, as one gap that is longer than they are
        first = int(np.clip((first + last - total) // 2, 0, num_samples - total))
        last = first + total
    cuts = np.sort([gap_masks.hashed_uniform(f"{clip_id}:{case.gap_ms}:{case.count}:{i}") for i in range(case.count)])
    starts = first + np.floor(cuts * (last - first - total)).astype(int) + np.arange(case.count) * (length + APART)
    return np.stack([starts, starts + length], -1)


def anywhere(batch: dict, case: Case) -> np.ndarray:
    """One gap (B, 1, 2) a clip, its start uniform over the clip by sha256 of '42:gap:ID'."""
    length = case.gap_ms * RECORD_RATE // 1000
    room = np.maximum(batch["audio_length"] - length, 0)
    start = np.array([int(gap_masks.hashed_uniform(f"42:gap:{c}") * (r + 1)) for c, r in zip(batch["clip_id"], room, strict=True)])
    return np.stack([start, np.minimum(start + length, batch["audio_length"])], -1)[:, None]


def as_in_the_paper(batch: dict, case: Case) -> np.ndarray:
    """(B, 8, 2): the paper's draw, by the clip's id."""
    wanted = {"max_count": case.count, "total": "normal", "total_mean_ms": 900.0, "total_std_ms": 300.0, "min_ms": 60.0}
    return np.asarray(gap_masks.draw_batch(jax.random.key(0), batch["id_hash"], jnp.asarray(batch["audio_length"]), **wanted))


# ---- sound -----------------------------------------------------------------------------------------------------------------------


def joined(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """The recording outside the gap, inside what joins it: restorer.fill."""
    waveforms = {kind: restorer.fill(level, batch, gap, preset) for kind, level in levels.items() if kind != "masked"}
    return waveforms | _with_gap(batch, gap, preset)


def spliced(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """The recording outside the gap, inside the same stretch of Griffin-Lim of the whole clip, as it comes."""
    spec = get(preset)
    missing = np.asarray(gap_masks.gap_samples(gap, spec.record_samples))
    waveforms = _with_gap(batch, gap, preset)
    for kind in levels.keys() - {"masked"}:
        whole = restorer.at_record_rate(np.asarray(_whole(levels[kind], jnp.asarray(batch["id_hash"]), spec)), spec)
        waveforms[kind] = np.where(missing, whole, restorer.recording(batch, spec)).astype(np.float32)
    return waveforms


def inverted(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """All of the spectrogram through the paper's inversion."""
    return {kind: _inverted(level, batch, preset, 0) for kind, level in levels.items()}


def _inverted(level: jax.Array, batch: dict, preset: str, more: int) -> np.ndarray:
    spec = get(preset)
    seeds = jnp.asarray(batch["id_hash"].astype(np.uint32) + np.uint32(more))
    return np.asarray(griffin_lim.paper_inversion(level, spec, length=spec.record_samples // spec.decimation, seeds=seeds))


def _with_gap(batch: dict, gap: np.ndarray, preset: str) -> dict:
    """{"masked": (B, N)}: the recording with zeros for what is lost."""
    spec = get(preset)
    missing = np.asarray(gap_masks.gap_samples(gap, spec.record_samples))
    return {"masked": np.where(missing, 0, restorer.recording(batch, spec)).astype(np.float32)}


def _whole(level, seeds, spec):
    """(B, F, K) -> (B, N) at the preset's rate: Griffin-Lim of everything, the level's own pre-emphasis taken off."""
    return griffin_lim.whole_clip(level, spec, length=spec.record_samples // spec.decimation, seeds=seeds)


def recorded(batch: dict, target: jax.Array, preset: str) -> np.ndarray:
    return restorer.recording(batch, get(preset))


def inverted_truth(batch: dict, target: jax.Array, preset: str) -> np.ndarray:
    return _inverted(target, batch, preset, OTHER_PHASES)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("waveform", "waveform", (), (), (), in_speech, joined, recorded, lambda spec: RECORD_RATE, lambda spec: spec.rate,
                 "samples lost inside the words; scored against the recording at the rate of the system's preset"),
        Protocol("paper", "paper", (), (PAPER_CASE,), ("paper",), as_in_the_paper, inverted, inverted_truth,
                 lambda spec: spec.rate, lambda spec: spec.rate,
                 "frames of the spectrogram lost, 1 to 8 gaps of N(900, 300) ms in all; scored against the vocoded truth at 8 kHz"),
        Protocol("peer", "waveform", PEER_MS, (), (), anywhere, spliced, recorded, lambda spec: RECORD_RATE, lambda spec: 16_000,
                 "samples lost anywhere in the clip; Griffin-Lim cut in; scored against the recording at 16 kHz"),
    )
}  # fmt: skip
