#!/usr/bin/env bash
# The whole way, as a user would type it: build the dataset, train two systems, evaluate one against the other, repair a clip.
#   GRID=DIR bash launch/demo.sh     (`make demo GRID=DIR` sets up the environment first)
# GRID: a folder of Grid clips, any layout avsi-prepare takes.  OUT: where everything goes (./demo_out).
# EPOCHS: how long to train (20: enough to see every part work and the lips be read a little, not to be good).  CLIP: the clip to repair (the first one of GRID).
set -euo pipefail

GRID=${GRID:-}
OUT=${OUT:-demo_out}
EPOCHS=${EPOCHS:-20}
CLIP=${CLIP:-}

fail() { echo "demo: $*" >&2; exit 2; }

# Shows a command as it would be typed, then runs it.
run() { printf '\n$'; printf ' %q' "$@"; printf '\n'; "$@"; }

# The first loose clip of GRID, untouched ones (.mpg) before others, that is not kept back for independent checks.
first_clip() {
  local suffix
  for suffix in mpg mp4 mov mkv avi; do find -L "$GRID" -type f -name "*.$suffix" | LC_ALL=C sort; done |
    awk -v kept="$GRID/RESERVED.txt" '
      BEGIN { while ((getline id < kept) > 0) if (id != "") reserved[id] }
      !found { id = $0; sub(/.*\//, "", id); sub(/\.[^.]*$/, "", id); if (!(id in reserved)) { print; found = 1 } }'
}

[ -n "$GRID" ] || fail "needs a folder of Grid clips: GRID=DIR bash launch/demo.sh"
[ -d "$GRID" ] || fail "found no folder '$GRID', expected one of Grid clips: GRID=DIR bash launch/demo.sh"
CLIP=${CLIP:-$(first_clip)}
[ -n "$CLIP" ] || fail "found no loose clip (.mpg .mp4 .avi .mov .mkv) in '$GRID' to repair; name one: CLIP=FILE"

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

run avsi-inpaint "$CLIP" --gap 0.93-1.73 --output "$OUT/restored.wav" --checkpoint="$OUT/av_mtl_s2s" --overwrite

echo
echo "restored sound: $OUT/restored.wav"
find "$OUT/av_mtl_s2s/eval" -name report.html | sed 's/^/report: /'
