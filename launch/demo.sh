#!/usr/bin/env bash
# The whole way, as a user would type it: build the dataset, train two systems, evaluate one against the other, repair a clip.
#   GRID=DIR bash launch/demo.sh     (`make demo GRID=DIR` sets up the environment first)
# GRID: a folder of Grid clips, any layout avsi-prepare takes.  OUT: where everything goes (./demo_out).
# EPOCHS: how long to train (20: enough to see every part work, not to be good).
# CLIP: the clip to repair (one of GRID that the training did not see).
set -euo pipefail

GRID=${GRID:-}
OUT=${OUT:-demo_out}
EPOCHS=${EPOCHS:-20}
CLIP=${CLIP:-}

fail() { echo "demo: $*" >&2; exit 2; }

# Shows a command as it would be typed, then runs it.
run() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }

# A clip of GRID that no training saw: the first example of the evaluation's report.
unseen_clip() {
  local id
  id=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["examples"][0]["clip_id"])' "$1")
  find -L "$GRID" -type f \( -name "$id.mpg" -o -name "$id.mp4" -o -name "$id.mov" -o -name "$id.mkv" -o -name "$id.avi" \) |
    LC_ALL=C sort | head -n 1
}

[ -n "$GRID" ] || fail "needs a folder of Grid clips: GRID=DIR bash launch/demo.sh"
[ -d "$GRID" ] || fail "found no folder '$GRID', expected one of Grid clips: GRID=DIR bash launch/demo.sh"

if [ -d "$OUT/data/grid/speaker_independent" ]; then
  echo "demo: goes on with the dataset of an earlier run in $OUT/data (another OUT, or removing $OUT, starts anew)"
else
  run avsi-prepare --raw="$GRID" --data_dir="$OUT/data"
fi

for system in av_mtl_s2s a_si; do
  run avsi-train --config="$system" --workdir="$OUT/$system" --config.data_dir="$OUT/data" --config.epochs="$EPOCHS" \
    --config.batch_size=16 --config.schedule=cosine --config.early_stop_patience=0 --config.monitor=val_gap_l1_db \
    --config.validation_split=validation_seen --config.checkpoint_every=5
done

run avsi-evaluate --config=eval --workdir="$OUT/av_mtl_s2s" --baseline="$OUT/a_si" \
  --config.split=test_seen --overwrite

CLIP=${CLIP:-$(unseen_clip "$OUT/av_mtl_s2s/eval/waveform-test_seen-lengths/summary.json")}
run avsi-inpaint "$CLIP" --gap 0.93-1.73 --output "$OUT/restored.wav" --checkpoint="$OUT/av_mtl_s2s" --overwrite

echo
echo "restored sound: $OUT/restored.wav"
find "$OUT/av_mtl_s2s/eval" -name report.html | sed 's/^/report: /'
