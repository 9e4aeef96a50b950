#!/usr/bin/env bash
# The whole way, as a user would type it: build the dataset, train two systems, evaluate one against the other, repair a clip.
#   bash launch/demo.sh             on a synthetic corpus that it makes first (`make demo` sets up the environment as well)
#   GRID=DIR bash launch/demo.sh    on a folder of Grid clips, any layout avsi-prepare takes
# OUT: where everything goes (./demo_out); a second run goes on with what it finds there.
# EPOCHS: how long to train (synthetic: configs/demo.py; Grid: 20, enough to see every part work, not to be good).
# CLIP: the clip to repair (one of those that the training did not see).
# Fails on the synthetic corpus where the lips don't help: see the end.
set -euo pipefail

GRID=${GRID:-}
OUT=${OUT:-demo_out}
EPOCHS=${EPOCHS:-}
CLIP=${CLIP:-}

fail() { echo "demo: $*" >&2; exit 2; }

# Shows a command as it would be typed, then runs it.
run() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }

# A clip of the folder $2 that no training saw: the first example of the evaluation's summary $1.
unseen_clip() {
  local id
  id=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["examples"][0]["clip_id"])' "$1")
  find -L "$2" -type f \( -name "$id.mpg" -o -name "$id.mp4" -o -name "$id.mov" -o -name "$id.mkv" -o -name "$id.avi" \) |
    LC_ALL=C sort | head -n 1
}

# The gap's error by length, av_mtl_s2s beside a_si, from the evaluation's summary $1; fails where $2 is "must" and the lips
# don't help at 600 ms or longer.
compare() {
  python - "$@" <<'PYTHON'
import json, sys

summary, must = json.load(open(sys.argv[1])), sys.argv[2:] == ["must"]
mean = {(t["system"], t["gap_ms"]): t["mean"] for t in summary["table"] if t["metric"] == "gap_l1_db"}
pairs = [p for p in summary["paired"] if (p["a"], p["b"], p["metric"]) == ("av_mtl_s2s", "a_si", "gap_l1_db")]
print(f"\nGap error in dB, {summary['num_clips']} clips of {summary['split']}, one gap inside speech in each (lower is better):")
print("gap        a_si   av_mtl_s2s   what the lips gain, 95 % interval")
for p in pairs:
    sound, both = (mean[system, p["gap_ms"]] for system in ("a_si", "av_mtl_s2s"))
    print(f"{p['gap_ms']:4} ms  {sound:6.2f}   {both:10.2f}   {-p['mean']:5.2f}   {-p['high']:.2f} to {-p['low']:.2f}")
lost = [p["gap_ms"] for p in pairs if p["gap_ms"] >= 600 and not p["high"] < 0]  # "better": the 95 % interval of the difference
if must and (lost or not any(p["gap_ms"] >= 600 for p in pairs)):
    sys.exit(f"demo: av_mtl_s2s is not better than a_si at {lost or '600 and more'} ms, expected it to be: something is broken")
PYTHON
}

if [ -n "$GRID" ]; then
  [ -d "$GRID" ] || fail "found no folder '$GRID', expected one of Grid clips: GRID=DIR bash launch/demo.sh"
  raw=$GRID source="clips of $GRID" must=
  av=(--config=av_mtl_s2s) a=(--config=a_si)
  options=(--config.batch_size=16 --config.schedule=cosine --config.early_stop_patience=0 --config.monitor=val_gap_l1_db
    --config.validation_split=validation_seen --config.checkpoint_every=5 --config.epochs="${EPOCHS:-20}")
else
  raw=$OUT/raw source="synthetic clips" must=must
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
  echo "demo: goes on with the dataset of an earlier run in $OUT/data (another OUT, or removing $OUT, starts anew)"
else
  run avsi-prepare --raw="$raw" --data_dir="$OUT/data"
fi

run avsi-train "${av[@]}" --workdir="$OUT/av_mtl_s2s" --config.data_dir="$OUT/data" ${options[@]+"${options[@]}"}
run avsi-train "${a[@]}" --workdir="$OUT/a_si" --config.data_dir="$OUT/data" ${options[@]+"${options[@]}"}

run avsi-evaluate --config=eval --workdir="$OUT/av_mtl_s2s" --baseline="$OUT/a_si" \
  --config.split=test_seen --config.gap_ms=300,600,900,1200,1500 --overwrite
summary=$OUT/av_mtl_s2s/eval/waveform-test_seen-lengths/summary.json

CLIP=${CLIP:-$(unseen_clip "$summary" "$raw")}
if [ -z "$CLIP" ]; then
  echo "demo: its example clip lies in an archive of $raw, nothing is repaired; name one: CLIP=clip.mpg"
else
  run avsi-inpaint "$CLIP" --gap 0.93-1.73 --output "$OUT/restored.wav" --checkpoint="$OUT/av_mtl_s2s" --overwrite
  printf '\nrestored sound: %s\n' "$OUT/restored.wav"
fi

find "$OUT/av_mtl_s2s/eval" -name report.html | sed 's/^/report: /'
compare "$summary" $must
