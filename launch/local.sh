#!/usr/bin/env bash
# A training on this machine in several processes, as a pod runs it: the local twin of the others, and for a machine whose GPUs
# shall have a process each.
#
#   launch/local.sh --processes=2 -- --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
#
# --processes=N   how many (2)
# --devices=N     CPU devices of each (1)
# --gpus          one GPU a process in place of CPU devices: process I gets GPU I
# --logs=DIR      the output of each process, DIR/rank0.log and on, besides the console
# --restarts=N    starts again after 143, 75 and death by a signal, N times at most in a row (20)
# --grace=N       seconds that the others have to save once one has died, then they are killed (30)
# --dry_run       print the commands, run none
#
# One dies: all are stopped, then all start again, on another port. SIGTERM or Ctrl-C here: all save, nothing starts again, the
# exit code is 143 or 130. Otherwise it is the worst of theirs. AVSI_TRAIN: another command than avsi-train.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=2 devices=1 gpus='' logs='' restarts=20 grace=30 dry_run=''
while (($#)); do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --devices=*) devices=${1#*=} ;;
    --gpus) gpus=1 ;;
    --logs=*) logs=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --grace=*) grace=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) help_of "$0" ;;
    --) shift; break ;;
    *) fail "found '$1', expected a flag of ${0##*/} (--help lists them), those of avsi-train after --" ;;
  esac
  shift
done
must_be_count --processes "$processes" 1
must_be_count --devices "$devices" 1
must_be_count --restarts "$restarts" 0
must_be_count --grace "$grace" 0
check_arguments "$@"
read -ra trainer <<< "${AVSI_TRAIN:-avsi-train}"
must_have "${trainer[0]}" "pip install avsi_jax, or name another command: AVSI_TRAIN"
must_have setsid "it comes with util-linux"

# A port that nobody listens on, below those that the system hands out by itself.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo "$port"; return; }
  done
}

# The process $1 of those that meet at port $2 -> the array `command`.
rank_command() {
  local rank=$1 port=$2
  shift 2
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  [ -z "$gpus" ] || command=(env JAX_PLATFORMS=cuda "CUDA_VISIBLE_DEVICES=$rank")
  command+=("${trainer[@]}" "$@")
  ((processes == 1)) || command+=(--distributed=on "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$rank")
}

# shellcheck disable=SC2329 # called by all_ranks
# Copies what process $1 says to the console, its number before every line, and to its log.
show_output() {
  if [ -n "$logs" ]; then tee -a "$logs/rank$1.log" | sed -u "s/^/[$1] /"; else sed -u "s/^/[$1] /"; fi
}

# shellcheck disable=SC2329 # called by keep_running
# Every process once, to the end of all; returns the worst of their codes. Those that left because they were told to don't count.
all_ranks() {
  local rank port output told='' deadline=0 alive=() pids=() readers=() codes=() own=()
  trap 'leaving=1' TERM
  trap '' INT # the terminal sends it to everyone: the readers below must outlive the trainers
  leaving=''
  port=$(free_port)
  for ((rank = 0; rank < processes; rank++)); do
    rank_command "$rank" "$port" "$@"
    exec {output}> >(show_output "$rank")
    readers[rank]=$!
    setsid "${command[@]}" >&"$output" 2>&1 < /dev/null & # a session of its own: what it started can be killed with it
    pids[rank]=$!
    exec {output}>&-
  done
  alive=("${!pids[@]}")
  while ((${#alive[@]})); do
    gather
    if [ -z "$told" ] && { [ -n "$leaving" ] || ((${#own[@]} > 0 && $(worst_of "${own[@]}") != 0)); }; then
      if [ -z "$leaving" ]; then
        pause 0.3 # what killed one may have killed others: their codes count
        gather
      fi
      told=1 deadline=$((SECONDS + grace))
      for rank in "${alive[@]}"; do kill -TERM "${pids[rank]}" 2> /dev/null || true; done
    fi
    if [ -n "$told" ] && ((SECONDS > deadline)); then
      for rank in "${alive[@]}"; do
        say "process $rank has not left within $grace s, kills it"
        end_group "${pids[rank]}"
      done
      deadline=$((SECONDS + grace))
    fi
    ((${#alive[@]} == 0)) || pause 0.1
  done
  for rank in "${!pids[@]}"; do end_group "${pids[rank]}"; done
  for rank in "${!readers[@]}"; do wait "${readers[rank]}" || true; done
  if ((${#own[@]})); then return "$(worst_of "${own[@]}")"; fi
  return "$(worst_of "${codes[@]}")"
}

# shellcheck disable=SC2329,SC2154 # called by all_ranks; waited comes from wait_for
# Takes the exit codes of those that have ended (variables of all_ranks).
gather() {
  local still=()
  for rank in "${alive[@]}"; do
    if kill -0 "${pids[rank]}" 2> /dev/null; then
      still+=("$rank")
    else
      wait_for "${pids[rank]}"
      codes[rank]=$waited
      [ -n "$told" ] || own+=("$waited")
      say "process $rank left with code $waited"
    fi
  done
  alive=(${still[@]+"${still[@]}"})
}

if [ -n "$dry_run" ]; then
  port=$(free_port)
  for ((rank = 0; rank < processes; rank++)); do
    rank_command "$rank" "$port" "$@"
    run "${command[@]}"
  done
  exit 0
fi
[ -z "$logs" ] || mkdir -p "$logs"
code=0
keep_running "$restarts" all_ranks "$@" || code=$?
exit "$code"
