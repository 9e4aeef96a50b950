#!/usr/bin/env bash
# Runs the complete pipeline: build the dataset, train two systems, compare them in an evaluation, restore a clip.
#   bash launch/demo.sh             with a synthetic corpus that it makes first (`make demo` also sets up the environment)
#   GRID=DIR bash launch/demo.sh    with a folder of Grid clips in any layout that avsi-prepare accepts
# OUT: folder for everything (./demo_out); a second run continues from what is there.
# EPOCHS: how long to train (synthetic: configs/demo.py; Grid: 20, enough to see every part work, not for good results).
# CLIP: the clip to restore (default: one that was not in training).
# With the synthetic corpus it fails if video does not help: see the end.
set -euo pipefail

GRID=${GRID:-}
OUT=${OUT:-demo_out}
EPOCHS=${EPOCHS:-}
CLIP=${CLIP:-}

fail() { echo "demo: $*" >&2; exit 2; }

# Shows a command as it would be typed, then runs it.
run() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }

# A clip of the folder $2 that was not in training: the first example in the evaluation's summary $1.
unseen_clip() {
  local id
  id=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["examples"][0]["clip_id"])' "$1")
  find -L "$2" -type f \( -name "$id.mpg" -o -name "$id.mp4" -o -name "$id.mov" -o -name "$id.mkv" -o -name "$id.avi" \) |
    LC_ALL=C sort | head -n 1
}

# Prints the error in the gap by length for av_mtl_s2s and a_si, from the evaluation's summary $1; fails if $2 is "must" and video
# does not help at 600 ms or longer.
compare() {
  python - "$@" <<'PYTHON'
import json, sys

summary, must = json.load(open(sys.argv[1])), sys.argv[2:] == ["must"]
mean = {(t["system"], t["gap_ms"]): t["mean"] for t in summary["table"] if t["metric"] == "gap_l1_db"}
pairs = [p for p in summary["paired"] if (p["a"], p["b"], p["metric"]) == ("av_mtl_s2s", "a_si", "gap_l1_db")]
print(f"\nGap error in dB, {summary['num_clips']} clips of {summary['split']}, one gap inside speech in each (lower is better):")
print("gap        a_si   av_mtl_s2s   gain of video, 95 % interval")
for p in pairs:
    audio, both = (mean[system, p["gap_ms"]] for system in ("a_si", "av_mtl_s2s"))
    print(f"{p['gap_ms']:4} ms  {audio:6.2f}   {both:10.2f}   {-p['mean']:5.2f}   {-p['high']:.2f} to {-p['low']:.2f}")
no_gain = [p["gap_ms"] for p in pairs if p["gap_ms"] >= 600 and not p["high"] < 0]  # the 95 % interval contains 0
if must and (no_gain or not any(p["gap_ms"] >= 600 for p in pairs)):
    sys.exit(f"demo: av_mtl_s2s is not better than a_si at {no_gain or '600 and more'} ms, expected it to be better")
PYTHON
}

if [ -n "$GRID" ]; then
  [ -d "$GRID" ] || fail "found no folder '$GRID', expected one of Grid clips: GRID=DIR bash launch/demo.sh"
  raw=$GRID source="clips of $GRID" must="" note=""
  av=(--config=av_mtl_s2s) a=(--config=a_si)
  options=(--config.batch_size=16 --config.schedule=cosine --config.early_stop_patience=0 --config.monitor=val_gap_l1_db
    --config.validation_split=validation_seen --config.checkpoint_every=5 --config.epochs="${EPOCHS:-20}")
else
  raw=$OUT/raw source="synthetic clips" must=must
  note="The data are synthetic (eSpeak NG voices, one warped photo): these numbers do not transfer to real speech."
  av=(--config=demo) a=(--config=demo --config.system=a_si)
  options=(${EPOCHS:+--config.epochs="$EPOCHS"})
fi

mkdir -p "$OUT"
[ ! -f "$OUT/source" ] || [ "$(cat "$OUT/source")" = "$source" ] ||
  fail "$OUT holds a demo on $(cat "$OUT/source"), expected one on $source: give another OUT, or remove $OUT"
echo "$source" > "$OUT/source"

if [ -z "$GRID" ] && [ ! -f "$raw/README.txt" ]; then
  run python -m tfds_grid.synthetic --out="$raw" --speakers=4 --clips=60 --seed=0
fi

if ls "$OUT"/data/grid/speaker_independent/*/build_report.json > /dev/null 2>&1; then
  echo "demo: uses the dataset of an earlier run in $OUT/data (for a new one: another OUT, or remove $OUT)"
else
  run avsi-prepare --raw="$raw" --data_dir="$OUT/data"
fi

run avsi-train "${av[@]}" --workdir="$OUT/av_mtl_s2s" --config.data_dir="$OUT/data" ${options[@]+"${options[@]}"}
run avsi-train "${a[@]}" --workdir="$OUT/a_si" --config.data_dir="$OUT/data" ${options[@]+"${options[@]}"}

run avsi-evaluate --config=eval --workdir="$OUT/av_mtl_s2s" --baseline="$OUT/a_si" ${note:+--note="$note"} \
  --config.split=test_seen --config.gap_ms=300,600,900,1200,1500 --overwrite
summary=$OUT/av_mtl_s2s/eval/waveform-test_seen-lengths/summary.json

CLIP=${CLIP:-$(unseen_clip "$summary" "$raw")}
if [ -z "$CLIP" ]; then
  echo "demo: its example clip is in an archive of $raw, so no clip is restored; give one: CLIP=clip.mpg"
else
  run avsi-inpaint "$CLIP" --gap 0.93-1.73 --output "$OUT/restored.wav" --checkpoint="$OUT/av_mtl_s2s" --overwrite
  printf '\nrestored audio: %s\n' "$OUT/restored.wav"
fi

find "$OUT/av_mtl_s2s/eval" -name report.html | sed 's/^/report: /'
compare "$summary" $must
