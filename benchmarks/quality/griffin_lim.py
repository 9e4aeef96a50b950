"""Compares the vocoders with librosa, and measures their upper bound with the oracle mel: the numbers of docs/vocoder.md.

    python -m benchmarks.quality.griffin_lim speed --data_dir=DATA                            ours and librosa's, alternately
    python -m benchmarks.quality.griffin_lim oracle_mel --data_dir=DATA --run=RUN [--run=RUN]   true and predicted levels

--json=FILE merges the results into FILE. RUN is the workdir of a training, which determines the preset. Clips are spread over one
split, by default validation_seen, so that no clip with a reported result is measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import librosa
import numpy as np
from scipy import signal

from avsi_jax.audio import gap_masks, griffin_lim, stft
from avsi_jax.data import input_pipeline
from avsi_jax.evaluation import bootstrap, metrics
from avsi_jax.evaluation.run_systems import Clips, select_clips
from avsi_jax.inference import restorer as restorer_lib
from avsi_jax.presets import RECORD_RATE, Spec, get

PRESETS = ("paper", "wide")
GAP_MS = (300, 600, 900, 1200, 1500)
SCORES = ("pesq_nb", "pesq_wb", "stoi", "estoi", "gap_l1_db")
BATCH = 32  # clips per call of ours
SERIAL = 6  # clips for librosa, one per call
ROUNDS = 3


def read_clips(data_dir: str, split: str, count: int) -> dict:
    """A batch of `count` clips spread over the split, as input_pipeline gives it."""
    records = input_pipeline.Records(input_pipeline.find_dataset(data_dir, "speaker_independent"), split, mouth=False)
    clips = Clips(records, select_clips(records, count))
    batch = clips.batch(sorted(clips.raw), len(clips.raw))
    return {k: v for k, v in batch.items() if isinstance(v, np.ndarray) or k == "clip_id"}


def audio_of(batch: dict, spec: Spec) -> jax.Array:
    """The recordings (B, N) at the preset's rate."""
    return stft.decimate(jnp.asarray(restorer_lib.recording(batch, spec)), spec)


# ---- speed ---------------------------------------------------------------------------------------------------------------------


def speed(batch: dict, preset: str) -> dict:
    """Milliseconds per clip of each vocoder, ours in a batch and librosa's clip by clip, alternately; PESQ and STOI of both."""
    spec, results = get(preset), {}
    audio = audio_of(batch, spec)[:BATCH]
    level, seeds = np.asarray(stft.log_mel(audio, spec)), batch["id_hash"][:BATCH]
    for name, (ours, theirs) in chains(spec, level, seeds).items():
        results[name] = alternate(ours, theirs) | scores_of_chain(ours, theirs, np.asarray(audio), spec)
        print(f"{preset} {name}: {results[name]}", file=sys.stderr, flush=True)
    return {"preset": preset, "batch": len(level), "serial": SERIAL, "chains": results, "inpaint_ms": gap_times(batch, spec)}


def chains(spec: Spec, level: np.ndarray, seeds: np.ndarray) -> dict[str, tuple[Callable, Callable]]:
    """Vocoder -> (ours for all clips at once, librosa's for one clip)."""
    length = spec.num_samples
    options = {"n_fft": spec.n_fft, "hop_length": spec.hop, "win_length": spec.window, "length": length}
    basis = {"sr": spec.rate, "n_fft": spec.n_fft, "power": 1.0}
    bands = np.asarray(stft.magnitude_from_level(jnp.asarray(level), spec))
    inverse = np.linalg.pinv(librosa.filters.mel(sr=spec.rate, n_fft=spec.n_fft, n_mels=spec.bands))

    def audio_by_librosa(i, magnitude, iterations, momentum):
        restored = librosa.griffinlim(magnitude, n_iter=iterations, momentum=momentum, random_state=int(seeds[i]), **options)
        return signal.lfilter([1.0], [1.0, -spec.pre_emphasis], restored).astype(np.float32)

    def paper_by_librosa(i):
        return audio_by_librosa(i, np.maximum(inverse @ bands[i].T, 1e-10) ** 1.5, griffin_lim.PAPER_ITERATIONS, 0.0)

    def whole_by_librosa(i):
        magnitude = librosa.feature.inverse.mel_to_stft(bands[i].T, **basis)  # by non-negative least squares
        return audio_by_librosa(i, magnitude, griffin_lim.CLIP_ITERATIONS, griffin_lim.MOMENTUM)

    given = {"length": length, "seeds": seeds}
    whole = {"whole_clip": (lambda: griffin_lim.whole_clip(level, spec, **given), whole_by_librosa)}
    if spec.name != "paper":  # the paper's inversion is only for its preset
        return whole
    return whole | {"paper_inversion": (lambda: griffin_lim.paper_inversion(level, spec, **given), paper_by_librosa)}


def alternate(ours: Callable, theirs: Callable) -> dict:
    """Median times of both over ROUNDS rounds, and their ratio; separately the first call of ours, which compiles."""
    first, batch = timed(lambda: np.asarray(ours()))
    our_times, their_times = [], []
    for r in range(ROUNDS):
        our_times.append(timed(lambda: np.asarray(ours()))[0] / len(batch))
        their_times.extend(timed(lambda i=i: theirs(i))[0] for i in range(r, SERIAL, ROUNDS))
    a, b = 1000 * statistics.median(our_times), 1000 * statistics.median(their_times)
    return {"ours_ms": round(a, 2), "librosa_ms": round(b, 1), "ratio": round(b / a, 1), "first_call_s": round(first, 1)}


def timed(work: Callable) -> tuple[float, object]:
    """Seconds that a call takes, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def scores_of_chain(ours: Callable, theirs: Callable, true: np.ndarray, spec: Spec) -> dict:
    """Mean PESQ and STOI of SERIAL clips against the recordings."""
    restored = {"ours": np.asarray(ours())[:SERIAL], "librosa": np.stack([theirs(i) for i in range(SERIAL)])}
    metric = "pesq_wb" if spec.rate == RECORD_RATE else "pesq_nb"
    results = {}
    for name, waveforms in restored.items():
        items = [(true[i], waveforms[i], spec.rate, ((0.0, true.shape[1] / spec.rate),)) for i in range(SERIAL)]
        rows = metrics.score_many(items, 1)
        results |= {f"{name}_{m}": round(float(np.mean([r[m] for r in rows])), 3) for m in (metric, "stoi")}
    return results


def gap_times(batch: dict, spec: Spec) -> list[dict]:
    """Milliseconds of a call of `griffin_lim.inpaint_gap`, compiled, for batches of 1 and 16 and three gap lengths."""
    rows = []
    for size in (1, 16):
        for gap_ms in (300, 900, 1500):
            part = {k: v[:size] for k, v in batch.items()}
            known, missing = masked(part, spec, gap_places(part, gap_ms, spec))
            level = np.asarray(stft.log_mel(audio_of(part, spec), spec))
            options = {"seeds": part["id_hash"], "lengths": lengths_of(part, spec)}
            work = lambda a=(level, known, missing), o=options: np.asarray(griffin_lim.inpaint_gap(*a, spec, **o))
            work()
            rows.append({"batch": size, "gap_ms": gap_ms, "ms": round(1000 * min(timed(work)[0] for _ in range(2 * ROUNDS)), 1)})
    return rows


# ---- oracle mel ----------------------------------------------------------------------------------------------------------------


def gap_places(batch: dict, gap_ms: int, spec: Spec) -> np.ndarray:
    """Gaps (B, 1, 2) inside the words, as in the headline protocol."""
    lengths = np.minimum(batch["audio_length"], spec.record_samples)
    rows = zip(batch["clip_id"], batch["speech"], lengths, strict=True)
    return np.asarray([[gap_masks.place_in_speech(c, gap_ms, tuple(s), int(n))] for c, s, n in rows])


def masked(batch: dict, spec: Spec, gap: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Masked audio and which samples are missing, (B, N) at the preset's rate."""
    missing = gap_masks.gap_samples(jnp.asarray(gap), spec.record_samples)
    return stft.decimate(
        gap_masks.mask_audio(jnp.asarray(restorer_lib.recording(batch, spec)), missing), spec
    ), gap_masks.gap_at_preset(missing, spec)


def lengths_of(batch: dict, spec: Spec) -> np.ndarray:
    """(B,) samples of each clip at the preset's rate, before its padding."""
    return -(-np.minimum(batch["audio_length"], spec.record_samples) // spec.decimation)


def measure_oracle_mel(batch: dict, run: Path, gap_lengths: Sequence[int]) -> dict:
    """Scores of every vocoder with true and with predicted levels, against the recordings at the preset's rate."""
    restorer = restorer_lib.Restorer.from_workdir(run)
    spec, seeds = restorer.spec, jnp.asarray(batch["id_hash"])
    true_audio = np.asarray(audio_of(batch, spec))
    arrays = {k: v for k, v in batch.items() if isinstance(v, np.ndarray)}
    true = np.asarray(stft.log_mel(true_audio, spec))
    rows = clip_rows(true, true_audio, batch, spec)
    for gap_ms in gap_lengths:
        gap = gap_places(batch, gap_ms, spec)
        known, missing = masked(batch, spec, gap)
        predicted = np.asarray(restorer.restore(arrays, gap).level)
        waveforms = {("masked", "masked"): np.asarray(known)}
        for kind, level in (("true", true), ("predicted", predicted)):
            options = {"seeds": seeds, "lengths": lengths_of(batch, spec)}
            waveforms[kind, "inpaint_gap"] = griffin_lim.inpaint_gap(level, known, missing, spec, **options)
            waveforms[kind, "splice"] = griffin_lim.splice(level, known, missing, spec, seeds=seeds)
        for (kind, name), restored in waveforms.items():
            rows.append({"level": kind, "vocoder": name, "gap_ms": gap_ms, **scored(true_audio, restored, batch, spec, gap)})
            if name in ("inpaint_gap", "splice"):
                rows[-1] |= seams(np.asarray(restored), true_audio, np.asarray(missing), batch, spec)
            print(f"{spec.name} {rows[-1]}", file=sys.stderr, flush=True)
    return {"system": restorer.name, "preset": spec.name, "n": len(true), "rows": rows}


def clip_rows(true: np.ndarray, true_audio: np.ndarray, batch: dict, spec: Spec) -> list[dict]:
    """Scores of the vocoders of full clips with the true level and no known samples: their upper bound."""
    options = {"length": spec.num_samples, "seeds": jnp.asarray(batch["id_hash"])}
    restored = {
        "whole_clip": griffin_lim.whole_clip(true, spec, **options),
        "paper_inversion": griffin_lim.paper_inversion(true, spec, **options),
    }
    gap = np.stack([0 * batch["audio_length"], np.minimum(batch["audio_length"], spec.record_samples)], -1)[:, None]
    return [{"level": "true", "vocoder": k, "gap_ms": None, **scored(true_audio, v, batch, spec, gap)} for k, v in restored.items()]


def scored(true: np.ndarray, restored: np.ndarray, batch: dict, spec: Spec, gap: np.ndarray) -> dict:
    """Means over the clips, each with its 95 % interval."""
    values = scores_of(true, restored, batch, spec, gap)
    return {m: [round(v, 4) for v in bootstrap.bootstrap_mean(x)] for m, x in values.items() if not np.isnan(x).all()}


def scores_of(true: np.ndarray, restored: np.ndarray, batch: dict, spec: Spec, gap: np.ndarray) -> dict[str, np.ndarray]:
    """The SCORES of each clip, (B,) each."""
    ends = np.minimum(batch["audio_length"], spec.record_samples) // spec.decimation
    restored = np.asarray(restored, np.float32)
    gap_s = (gap / RECORD_RATE).tolist()
    items = [(true[b, : ends[b]], restored[b, : ends[b]], spec.rate, tuple(map(tuple, gap_s[b]))) for b in range(len(true))]
    rows = metrics.score_many(items)
    return {m: np.array([r.get(m) for r in rows], float) for m in SCORES}


# ---- seams ---------------------------------------------------------------------------------------------------------------------


def seams(restored: np.ndarray, true: np.ndarray, missing: np.ndarray, batch: dict, spec: Spec) -> dict:
    """Shares of gap edges whose spectral flux, and whose level step, is above the 95th percentile within the clip's speech.

    `natural`: the same for the recording, which may have an onset there.
    """
    above = {f"{name}{kind}": [] for name in ("flux", "step") for kind in ("", "_natural")}
    for clip, x, gap, speech in zip(restored, true, missing, batch["speech"], strict=True):
        edges = np.flatnonzero(np.diff(gap.astype(int))) + 1
        inside = np.arange(int(speech[0] * spec.rate), int(speech[1] * spec.rate), spec.rate // 200)
        for name, measure in (("flux", flux), ("step", level_step)):
            usual = np.quantile(measure(x, inside, spec.rate), 0.95)
            for kind, audio in (("", clip), ("_natural", x)):
                above[name + kind].extend((measure(audio, edges, spec.rate) > usual).tolist())
    return {f"{k}_above_p95": round(float(np.mean(v)), 3) for k, v in above.items()} | {"seams": len(above["flux"])}


def flux(x: np.ndarray, at: np.ndarray, rate: int) -> np.ndarray:
    """Spectral flux at samples `at`: largest increase of the magnitude spectrum in 5 ms, summed over bins, within 5 ms."""
    hop = rate // 400
    frames = np.stack([_cut(x, at + k * hop, 2 * hop) for k in range(-3, 4)])  # 5 ms each, 2.5 ms apart
    spectra = np.abs(np.fft.rfft(frames * np.hanning(4 * hop), axis=-1))
    return np.maximum(spectra[2:] - spectra[:-2], 0).sum(-1).max(0)


def level_step(x: np.ndarray, at: np.ndarray, rate: int) -> np.ndarray:
    """Absolute level difference in dB between the 10 ms before and the 10 ms after samples `at`."""
    n = rate // 100
    before, after = (np.sqrt(np.mean(_cut(x, at + d, n // 2) ** 2, -1)) for d in (-n // 2, n // 2))
    return np.abs(20 * np.log10((after + 1e-4) / (before + 1e-4)))


def _cut(x: np.ndarray, centre: np.ndarray, half: int) -> np.ndarray:
    """(S, 2 half) samples around each centre, zeros outside the clip."""
    padded = np.pad(x, 4 * half)
    return padded[centre[:, None] + 4 * half + np.arange(-half, half)]


# ---- command -------------------------------------------------------------------------------------------------------------------


def machine() -> dict:
    """Cores, device and versions."""
    versions = {"jax": jax.__version__, "librosa": librosa.__version__}
    return {"cores": os.cpu_count(), "device": jax.devices()[0].platform, **versions}


def main(argv: list[str] | None = None) -> int:
    """The command `python -m benchmarks.quality.griffin_lim`; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "oracle_mel"))
    parser.add_argument("--data_dir", required=True, help="dataset written by avsi-prepare")
    parser.add_argument("--split", default="validation_seen", help="default: %(default)s")
    parser.add_argument("--clips", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--run", type=Path, action="append", default=[], help="oracle_mel: workdir of a training")
    parser.add_argument("--gap_ms", default=",".join(map(str, GAP_MS)), help="oracle_mel: gap lengths (default: %(default)s)")
    parser.add_argument("--preset", choices=PRESETS, action="append", help="speed: default both")
    parser.add_argument("--json", type=Path, help="file to merge the results into")
    args = parser.parse_args(argv)
    try:
        if args.what == "oracle_mel" and not args.run:
            raise ValueError("no --run given; expected the workdir of a training that restores")
        batch = read_clips(args.data_dir, args.split, args.clips)
        lengths = [int(ms) for ms in args.gap_ms.split(",")]
        if args.what == "speed":
            results = {f"speed-{p}": speed(batch, p) | machine() for p in args.preset or PRESETS}
        else:
            of_runs = [measure_oracle_mel(batch, run, lengths) | {"split": args.split} for run in args.run]
            results = {f"oracle_mel-{r['preset']}": r for r in of_runs}
    except (ValueError, OSError) as error:
        print(f"griffin_lim: {error}", file=sys.stderr)
        return 2
    print(json.dumps(results, indent=1))
    if args.json:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(before | results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
