"""The vocoders against librosa on the same work, and the most that a better one could win : the numbers of docs/vocoder.md.

    python -m benchmarks.quality.griffin_lim speed --data_dir=DATA                          ours and librosa's, in turns
    python -m benchmarks.quality.griffin_lim ceilings --data_dir=DATA --run=RUN [--run=RUN]   true and predicted levels through every vocoder

--json=FILE merges what was measured into FILE. RUN is the workdir of a training; its preset decides what it stands for. The clips
are spread over one split, by default validation_seen: no clip is measured here that a result is reported of.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from scipy import signal

from avsi_jax.audio import gap_masks, griffin_lim, stft
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap, metrics
from avsi_jax.evaluation.run_systems import Clips, chosen_clips
from avsi_jax.inference import restorer as restorer_lib
from avsi_jax.presets import RECORD_RATE, Spec, get

PRESETS = ("paper", "wide")
GAP_MS = (300, 600, 900, 1200, 1500)
SCORES = ("pesq_nb", "pesq_wb", "stoi", "estoi", "gap_l1_db")
BATCH = 32  # clips at once, ours
SERIAL = 6  # clips of librosa's, one after the other
ROUNDS = 3


def read_clips(data_dir: str, split: str, count: int) -> dict:
    """A raw batch of `count` clips spread over the split."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    clips = Clips(records, chosen_clips(records, count))
    batch = clips.batch(sorted(clips.raw), len(clips.raw))
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray) or k == "clip_id"}


def audio_of(batch: dict, spec: Spec) -> jax.Array:
    """(B, N) at the preset's rate."""
    return stft.decimate(jnp.asarray(restorer_lib.recording(batch, spec)), spec)


# ---- speed ---------------------------------------------------------------------------------------------------------------------


def speed(batch: dict, preset: str) -> dict:
    """Milliseconds a clip of each chain, ours in a batch and librosa's one clip after the other, in turns; PESQ of both."""
    spec, results = get(preset), {}
    audio = audio_of(batch, spec)[:BATCH]
    level, seeds = np.asarray(stft.log_mel(audio, spec)), batch["id_hash"][:BATCH]
    for name, (ours, theirs) in chains(spec, level, seeds).items():
        results[name] = in_turns(ours, theirs) | scores_of_chain(ours, theirs, np.asarray(audio), spec)
        print(f"{preset} {name}: {results[name]}", file=sys.stderr, flush=True)
    return {"preset": preset, "batch": len(level), "serial": SERIAL, "chains": results, "fill_ms": fill_times(batch, spec)}


def chains(spec: Spec, level: np.ndarray, seeds: np.ndarray) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (ours for all clips at once, librosa's for one clip)."""
    length = spec.num_samples
    options = {"n_fft": spec.n_fft, "hop_length": spec.hop, "win_length": spec.window, "length": length}
    basis = {"sr": spec.rate, "n_fft": spec.n_fft, "power": 1.0}
    bands = np.asarray(stft.magnitude_from_level(jnp.asarray(level), spec))
    inverse = np.linalg.pinv(librosa.filters.mel(sr=spec.rate, n_fft=spec.n_fft, n_mels=spec.bands))

    def audio_by_librosa(i, magnitude, iterations, momentum):
        made = librosa.griffinlim(magnitude, n_iter=iterations, momentum=momentum, random_state=int(seeds[i]), **options)
        return signal.lfilter([1.0], [1.0, -spec.pre_emphasis], made).astype(np.float32)

    def paper_by_librosa(i):
        return audio_by_librosa(i, np.maximum(inverse @ bands[i].T, 1e-10) ** 1.5, griffin_lim.PAPER_ITERATIONS, 0.0)

    def whole_by_librosa(i):
        magnitude = librosa.feature.inverse.mel_to_stft(bands[i].T, **basis)  # its non-negative least squares
        return audio_by_librosa(i, magnitude, griffin_lim.WGAP_ITERATIONS, griffin_lim.MOMENTUM)

    given = {"length": length, "seeds": seeds}
    whole = {"whole_clip": (lambda: griffin_lim.whole_clip(level, spec, **given), whole_by_librosa)}
    if spec.name != "paper":  # the paper's protocol knows no other preset
        return whole
    return whole | {"paper_inversion": (lambda: griffin_lim.paper_inversion(level, spec, **given), paper_by_librosa)}


def in_turns(ours: Callable, theirs: Callable) -> dict:
    """Medians over ROUNDS rounds of both, and their ratio; the first call of ours, which compiles, is told apart."""
    first, batch = timed(lambda: np.asarray(ours()))
    mine, librosas = [], []
    for r in range(ROUNDS):
        mine.append(timed(lambda: np.asarray(ours()))[0] / len(batch))
        librosas.extend(timed(lambda i=i: theirs(i))[0] for i in range(r, SERIAL, ROUNDS))
    a, b = 1000 * statistics.median(mine), 1000 * statistics.median(librosas)
    return {"ours_ms": round(a, 2), "librosa_ms": round(b, 1), "ratio": round(b / a, 1), "first_call_s": round(first, 1)}


def timed(work: Callable) -> tuple[float, object]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def scores_of_chain(ours: Callable, theirs: Callable, true: np.ndarray, spec: Spec) -> dict:
    """Mean PESQ and STOI of the same SERIAL clips against the recording."""
    made = {"ours": np.asarray(ours())[:SERIAL], "librosa": np.stack([theirs(i) for i in range(SERIAL)])}
    metric = "pesq_wb" if spec.rate == RECORD_RATE else "pesq_nb"
    results = {}
    for name, waveforms in made.items():
        items = [(true[i], waveforms[i], spec.rate, ((0.0, true.shape[1] / spec.rate),)) for i in range(SERIAL)]
        rows = metrics.score_many(items, 1)
        results |= {f"{name}_{m}": round(float(np.mean([r[m] for r in rows])), 3) for m in (metric, "stoi")}
    return results


def fill_times(batch: dict, spec: Spec) -> list[dict]:
    """Milliseconds of `griffin_lim.fill_gap` in all, warm, for batches of 1 and 16 and gaps of some lengths."""
    rows = []
    for size in (1, 16):
        for gap_ms in (300, 900, 1500):
            part = {k: v[:size] for k, v in batch.items()}
            known, missing = masked(part, spec, places(part, gap_ms, spec))
            level = np.asarray(stft.log_mel(audio_of(part, spec), spec))
            work = lambda a=(level, known, missing), s=part["id_hash"]: np.asarray(griffin_lim.inpaint_gap(*a, spec, seeds=s))
            work()
            rows.append({"batch": size, "gap_ms": gap_ms, "ms": round(1000 * min(timed(work)[0] for _ in range(2 * ROUNDS)), 1)})
    return rows


# ---- ceilings ------------------------------------------------------------------------------------------------------------------


def places(batch: dict, gap_ms: int, spec: Spec) -> np.ndarray:
    """(B, 1, 2) in the words, as the headline's."""
    lengths = np.minimum(batch["audio_length"], spec.record_samples)
    rows = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
    return np.asarray([[gap_masks.place_in_speech(c, gap_ms, tuple(s), int(n))] for c, s, n in rows])


def masked(batch: dict, spec: Spec, gap: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Known sound and which samples are lost, (B, N) at the preset's rate."""
    missing = gap_masks.gap_samples(jnp.asarray(gap), spec.record_samples)
    return stft.decimate(
        gap_masks.damage(jnp.asarray(restorer_lib.recording(batch, spec)), missing), spec
    ), gap_masks.gap_at_preset(missing, spec)


def oracle_mels(batch: dict, run: Path, gap_lengths) -> dict:
    """Scores of true and predicted levels through every vocoder, against the recording at the preset's rate."""
    restorer = restorer_lib.Restorer.from_workdir(run)
    spec, seeds = restorer.spec, jnp.asarray(batch["id_hash"])
    true_audio = np.asarray(audio_of(batch, spec))
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    true = np.asarray(stft.log_mel(true_audio, spec))
    rows = whole_rows(true, true_audio, batch, spec)
    for gap_ms in gap_lengths:
        gap = places(batch, gap_ms, spec)
        known, missing = masked(batch, spec, gap)
        predicted = np.asarray(restorer.restore(arrays, gap).level)
        waveforms = {("masked", "masked"): np.asarray(known)}
        for kind, level in (("true", true), ("predicted", predicted)):
            waveforms[kind, "fill_gap"] = griffin_lim.inpaint_gap(level, known, missing, spec, seeds=seeds)
            waveforms[kind, "splice"] = griffin_lim.splice(level, known, missing, spec, seeds=seeds)
        for (kind, name), made in waveforms.items():
            rows.append({"level": kind, "vocoder": name, "gap_ms": gap_ms, **scored(true_audio, made, batch, spec, gap)})
            if name in ("fill_gap", "splice"):
                rows[-1] |= seams(np.asarray(made), true_audio, np.asarray(missing), batch, spec)
            print(f"{spec.name} {rows[-1]}", file=sys.stderr, flush=True)
    return {"system": restorer.name, "preset": spec.name, "n": len(true), "rows": rows}


def whole_rows(true, true_audio, batch: dict, spec: Spec) -> list[dict]:
    """The true level of the whole clip, nothing known: what a vocoder of whole clips can keep at most."""
    options = {"length": spec.num_samples, "seeds": jnp.asarray(batch["id_hash"])}
    made = {
        "whole_clip": griffin_lim.whole_clip(true, spec, **options),
        "paper_inversion": griffin_lim.paper_inversion(true, spec, **options),
    }
    gap = np.stack([0 * batch["audio_length"], np.minimum(batch["audio_length"], spec.record_samples)], -1)[:, None]
    return [{"level": "true", "vocoder": k, "gap_ms": None, **scored(true_audio, v, batch, spec, gap)} for k, v in made.items()]


def scored(true, made, batch: dict, spec: Spec, gap: np.ndarray) -> dict:
    """Means over the clips, each with its 95 % interval."""
    values = scores_of(true, made, batch, spec, gap)
    return {m: [round(v, 4) for v in bootstrap.bootstrap_mean(x)] for m, x in values.items() if not np.isnan(x).all()}


def scores_of(true, made, batch: dict, spec: Spec, gap: np.ndarray) -> dict[str, np.ndarray]:
    """SCORES, (B,) each."""
    ends = np.minimum(batch["audio_length"], spec.record_samples) // spec.decimation
    made = np.asarray(made, np.float32)
    gap_s = (gap / RECORD_RATE).tolist()
    items = [(true[b, : ends[b]], made[b, : ends[b]], spec.rate, tuple(map(tuple, gap_s[b]))) for b in range(len(true))]
    rows = metrics.score_many(items)
    return {m: np.array([r.get(m) for r in rows], float) for m in SCORES}


# ---- seams ---------------------------------------------------------------------------------------------------------------------


def seams(made: np.ndarray, true: np.ndarray, missing: np.ndarray, batch: dict, spec: Spec) -> dict:
    """Shares of the seams whose flux, and whose step in level, is above the 95th percentile of the same clip's own speech.

    `natural`: of the recording at the same places, which may have an onset there.
    """
    above = {f"{name}{kind}": [] for name in ("flux", "step") for kind in ("", "_natural")}
    for clip, x, gap, speech in zip(made, true, missing, batch["speech"], strict=True):
        edges = np.flatnonzero(np.diff(gap.astype(int))) + 1
        inside = np.arange(int(speech[0] * spec.rate), int(speech[1] * spec.rate), spec.rate // 200)
        for name, measure in (("flux", flux), ("step", level_step)):
            usual = np.quantile(measure(x, inside, spec.rate), 0.95)
            for kind, audio in (("", clip), ("_natural", x)):
                above[name + kind].extend((measure(audio, edges, spec.rate) > usual).tolist())
    return {f"{k}_above_p95": round(float(np.mean(v)), 3) for k, v in above.items()} | {"seams": len(above["flux"])}


def flux(x: np.ndarray, at: np.ndarray, rate: int) -> np.ndarray:
    """Spectral flux at samples `at`: largest rise of the magnitude spectrum in 5 ms, summed over bins, within 5 ms of there."""
    hop = rate // 400
    frames = np.stack([_cut(x, at + k * hop, 2 * hop) for k in range(-3, 4)])  # 5 ms each, 2.5 ms apart
    spectra = np.abs(np.fft.rfft(frames * np.hanning(4 * hop), axis=-1))
    return np.maximum(spectra[2:] - spectra[:-2], 0).sum(-1).max(0)


def level_step(x: np.ndarray, at: np.ndarray, rate: int) -> np.ndarray:
    """|dB| between the 10 ms before and the 10 ms from samples `at` on."""
    n = rate // 100
    before, after = (np.sqrt(np.mean(_cut(x, at + d, n // 2) ** 2, -1)) for d in (-n // 2, n // 2))
    return np.abs(20 * np.log10((after + 1e-4) / (before + 1e-4)))


def _cut(x: np.ndarray, centre: np.ndarray, half: int) -> np.ndarray:
    """(S, 2 half) samples around each centre, zeros outside the clip."""
    padded = np.pad(x, 4 * half)
    return padded[centre[:, None] + 4 * half + np.arange(-half, half)]


# ---- command -------------------------------------------------------------------------------------------------------------------


def machine() -> dict:
    versions = {"jax": jax.__version__, "librosa": librosa.__version__}
    return {"cores": os.cpu_count(), "device": jax.devices()[0].platform, **versions}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "ceilings"))
    parser.add_argument("--data_dir", required=True, help="where avsi-prepare wrote")
    parser.add_argument("--split", default="validation_seen")
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--run", type=Path, action="append", default=[], help="workdir of a training, for ceilings")
    parser.add_argument("--gap_ms", default=",".join(map(str, GAP_MS)))
    parser.add_argument("--preset", choices=PRESETS, action="append", help="for speed; both where not said")
    parser.add_argument("--json", type=Path, help="file to merge the measurement into")
    known = parser.parse_args(argv)
    try:
        if known.what == "ceilings" and not known.run:
            raise ValueError("no --run given; expected the workdir of a training that restores")
        batch = read_clips(known.data_dir, known.split, known.clips)
        lengths = [int(ms) for ms in known.gap_ms.split(",")]
        if known.what == "speed":
            found = {f"speed-{p}": speed(batch, p) | machine() for p in known.preset or PRESETS}
        else:
            results = [oracle_mels(batch, run, lengths) | {"split": known.split} for run in known.run]
            found = {f"ceilings-{r['preset']}": r for r in results}
    except (ValueError, OSError) as error:
        print(f"vocoder.py: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1))
    if known.json:
        before = json.loads(known.json.read_text()) if known.json.exists() else {}
        known.json.write_text(json.dumps(before | found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
