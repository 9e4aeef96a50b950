"""Evaluation protocols: how gaps are placed and masked, how audio is made, and the reference. Numbers of different ones never mix.

waveform  ours, the headline protocol: samples are set to zero; the gap lies inside the words (place_in_speech of
          audio/gap_masks.py); the restored audio joins the recording on both sides; scored against the recording at the rate of the
          system's preset.
paper     as in the paper's code: whole spectrogram frames are set to silence, 1 to 8 gaps of N(900, 300) ms in all; the whole
          spectrogram, known frames included, is inverted by the paper's vocoder, and so is the reference (from other initial
          phases); scored against that at 8 kHz.
peer      as in the published comparison of re-implementations: samples are set to zero; one gap anywhere in the clip; its audio is
          cut out of a Griffin-Lim reconstruction of the whole clip; scored against the recording at 16 kHz, wide band.

Letters: B clips, G gaps, F spectrogram frames, K bands, N samples.
"""

from __future__ import annotations

import hashlib
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
PEER_SEED, PEER_HOP, PEER_FRAMES = 42, RECORD_RATE // 100, 300  # seed, samples in a frame, and frames of a clip of 3 s
PAPER_CASE = Case(900, "paper_gaps", 8, 8)  # 900: the mean total length
MIN_DISTANCE = RECORD_RATE // 50  # samples between two of several gaps
OTHER_PHASES = np.uint32(0x9E3779B9)  # added to a clip's seed, so that reference and result start from different phases


class Protocol(NamedTuple):
    """Gap placement, masking, audio and reference of an evaluation."""

    name: str
    masking: str  # of gap_masks.PROTOCOLS
    gap_ms: tuple[int, ...]  # gap lengths instead of the suite's own; () keeps those
    cases: tuple[Case, ...]  # cases instead of the suite's; () keeps those
    presets: tuple[str, ...]  # presets for which it is defined; () for all
    place: Callable[[dict, Case], np.ndarray]  # (batch, case) -> gaps (B, G, 2) in record samples
    waveforms: Callable[[dict, dict, np.ndarray, str], dict]
    # (levels {kind: (B, F, K)}, batch, gaps, preset) -> {kind: audio (B, N) float32} at audio_rate
    reference: Callable[[dict, jax.Array, str], np.ndarray]  # (batch, target level (B, F, K), preset) -> audio (B, N) at audio_rate
    audio_rate: Callable[[Spec], int]  # Hz
    score_rate: Callable[[Spec], int]  # Hz
    description: str  # for reports


def lengths_of(batch: dict, spec: Spec) -> np.ndarray:
    """(B,) record samples of each clip, at most the preset's length."""
    return np.minimum(batch["audio_length"], spec.record_samples)


# ---- placement of gaps ---------------------------------------------------------------------------------------------------------


def in_speech(batch: dict, case: Case) -> np.ndarray:
    """Gaps (B, count, 2) inside the words, by clip id and case; from LONGEST_MS on the whole clip."""
    return np.stack([_in_speech(*row, case) for row in zip(batch["clip_id"], batch["speech"], batch["audio_length"], strict=True)])


def _in_speech(clip_id: str, speech_s, num_samples, case: Case) -> np.ndarray:
    """(count, 2). Several gaps have the same length; the remaining time is distributed between them by hashes of the clip id."""
    num_samples, speech_s = int(num_samples), tuple(speech_s)
    if case.gap_ms >= LONGEST_MS:
        return np.array([[0, num_samples]])
    if case.count == 1:
        return np.array([gap_masks.place_in_speech(clip_id, case.gap_ms, speech_s, num_samples)])
    first, last = (min(round(t * RECORD_RATE), num_samples) for t in speech_s)
    between = (case.count - 1) * MIN_DISTANCE
    length = min(case.gap_ms * RECORD_RATE // 1000, num_samples - between) // case.count
    total = case.count * length + between
    if last - first < total:  # longer than the words: centred on them, like a single gap
        first = int(np.clip((first + last - total) // 2, 0, num_samples - total))
        last = first + total
    cuts = np.sort([gap_masks.hashed_uniform(f"{clip_id}:{case.gap_ms}:{case.count}:{i}") for i in range(case.count)])
    starts = first + np.floor(cuts * (last - first - total)).astype(int) + np.arange(case.count) * (length + MIN_DISTANCE)
    return np.stack([starts, starts + length], -1)


def anywhere(batch: dict, case: Case) -> np.ndarray:
    """One gap (B, 1, 2) per clip, anywhere in its three seconds, in whole 10-ms frames: the rule of the published comparison.

    Its code seeds NumPy's generator with the first 8 bytes, little-endian, of sha256("42:LENGTH_MS:ID") and pads every clip to 300
    frames. A gap ends with its clip; one that would begin after its clip is drawn over the frames of the clip instead.
    """
    return np.array([[_peer_gap(c, case.gap_ms, int(n))] for c, n in zip(batch["clip_id"], batch["audio_length"], strict=True)])


def _peer_gap(clip_id: str, gap_ms: int, num_samples: int) -> tuple[int, int]:
    token = f"{PEER_SEED}:{float(gap_ms):g}:{clip_id}"
    seed = int.from_bytes(hashlib.sha256(token.encode()).digest()[:8], "little")
    for num_frames in (PEER_FRAMES, -(-num_samples // PEER_HOP)):
        length = min(max(1, round(gap_ms / 10)), num_frames)
        start = PEER_HOP * int(np.random.default_rng(seed).integers(0, num_frames - length + 1))
        if start < num_samples:
            break
    return start, min(start + PEER_HOP * length, num_samples)


def random_gaps(batch: dict, case: Case) -> np.ndarray:
    """Gaps (B, 8, 2) by the paper's random draw, seeded by the clip's id."""
    wanted = {"max_count": case.count, "total": "normal", "total_mean_ms": 900.0, "total_std_ms": 300.0, "min_ms": 60.0}
    return np.asarray(gap_masks.draw_batch(jax.random.key(0), batch["id_hash"], jnp.asarray(batch["audio_length"]), **wanted))


# ---- audio -----------------------------------------------------------------------------------------------------------------------


def joined(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """The recording outside the gap, inside audio that joins both edges (`restorer.levels_to_audio`)."""
    waveforms = {kind: restorer.levels_to_audio(level, batch, gap, preset) for kind, level in levels.items() if kind != "masked"}
    return waveforms | _masked_audio(batch, gap, preset)


def spliced(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """The recording outside the gap, inside the same span of a Griffin-Lim reconstruction of the whole clip, without joining."""
    spec = get(preset)
    missing = np.asarray(gap_masks.gap_samples(gap, spec.record_samples))
    waveforms = _masked_audio(batch, gap, preset)
    for kind in levels.keys() - {"masked"}:
        full = restorer.at_record_rate(np.asarray(_full_clip(levels[kind], jnp.asarray(batch["id_hash"]), spec)), spec)
        waveforms[kind] = np.where(missing, full, restorer.recording(batch, spec)).astype(np.float32)
    return waveforms


def inverted(levels: dict, batch: dict, gap: np.ndarray, preset: str) -> dict:
    """The whole spectrogram through the paper's inversion."""
    return {kind: _inverted(level, batch, preset, 0) for kind, level in levels.items()}


def _inverted(level: jax.Array, batch: dict, preset: str, seed_offset: int) -> np.ndarray:
    spec = get(preset)
    seeds = jnp.asarray(batch["id_hash"].astype(np.uint32) + np.uint32(seed_offset))
    return np.asarray(griffin_lim.paper_inversion(level, spec, length=spec.record_samples // spec.decimation, seeds=seeds))


def _masked_audio(batch: dict, gap: np.ndarray, preset: str) -> dict:
    """{"masked": (B, N)}: the recording with the gaps set to zero."""
    spec = get(preset)
    missing = np.asarray(gap_masks.gap_samples(gap, spec.record_samples))
    return {"masked": np.where(missing, 0, restorer.recording(batch, spec)).astype(np.float32)}


def _full_clip(level, seeds, spec):
    """Levels (B, F, K) -> audio (B, N) at the preset's rate: Griffin-Lim of the whole clip, pre-emphasis removed."""
    return griffin_lim.whole_clip(level, spec, length=spec.record_samples // spec.decimation, seeds=seeds)


def recorded(batch: dict, target: jax.Array, preset: str) -> np.ndarray:
    """Reference: the recording."""
    return restorer.recording(batch, get(preset))


def inverted_target(batch: dict, target: jax.Array, preset: str) -> np.ndarray:
    """Reference: the true level through the paper's inversion, from other initial phases than the result."""
    return _inverted(target, batch, preset, OTHER_PHASES)


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("waveform", "waveform", (), (), (), in_speech, joined, recorded, lambda spec: RECORD_RATE, lambda spec: spec.rate,
                 "samples set to zero inside the words; scored against the recording at the rate of the system's preset"),
        Protocol("paper", "paper", (), (PAPER_CASE,), ("paper",), random_gaps, inverted, inverted_target,
                 lambda spec: spec.rate, lambda spec: spec.rate,
                 "spectrogram frames masked, 1 to 8 gaps of N(900, 300) ms in all; scored against the vocoded recording at 8 kHz"),
        Protocol("peer", "waveform", PEER_MS, (), (), anywhere, spliced, recorded, lambda spec: RECORD_RATE, lambda spec: 16_000,
                 "samples set to zero anywhere in the clip; Griffin-Lim cut in; scored against the recording at 16 kHz"),
    )
}  # fmt: skip
