#!/usr/bin/env bash
# Runs a training on this machine in several processes, like on a pod: to try it out, or for one process per GPU.
#
#   launch/local.sh --processes=2 -- --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
#
# --processes=N   number of processes (2)
# --devices=N     CPU devices per process (1)
# --gpus          one GPU per process instead of CPU devices: process I gets GPU I
# --logs=DIR      also write the output of each process to DIR/rank0.log, ...
# --restarts=N    restart after exit codes 143, 75 and death by a signal, at most N times in a row (20)
# --grace=N       seconds that the other processes have to save after one has died, before they are killed (30)
# --dry_run       only print the commands
#
# If one process dies, all are stopped and restarted on another port. After SIGTERM or Ctrl-C all save and none is restarted; the
# exit code is 143 or 130. Otherwise it is the most serious of theirs. AVSI_TRAIN: a command to use instead of avsi-train.
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
require_count --processes "$processes" 1
require_count --devices "$devices" 1
require_count --restarts "$restarts" 0
require_count --grace "$grace" 0
check_arguments "$@"
read -ra trainer <<< "${AVSI_TRAIN:-avsi-train}"
require_command "${trainer[0]}" "pip install avsi_jax, or name another command: AVSI_TRAIN"
require_command setsid "it comes with util-linux"

# A free port below the range that the system assigns itself.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null || { echo "$port"; return; }
  done
}

# The command of process $1, with the coordinator at port $2 -> the array `command`.
rank_command() {
  local rank=$1 port=$2
  shift 2
  command=(env JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$devices")
  [ -z "$gpus" ] || command=(env JAX_PLATFORMS=cuda "CUDA_VISIBLE_DEVICES=$rank")
  command+=("${trainer[@]}" "$@")
  ((processes == 1)) || command+=(--distributed=on "--coordinator=127.0.0.1:$port" "--num_processes=$processes" "--process_id=$rank")
}

# shellcheck disable=SC2329 # called by all_ranks
# Copies the output of process $1 to the console, with its number before every line, and to its log.
show_output() {
  if [ -n "$logs" ]; then tee -a "$logs/rank$1.log" | sed -u "s/^/[$1] /"; else sed -u "s/^/[$1] /"; fi
}

# shellcheck disable=SC2329 # called by keep_running
# Runs all processes once, until all have ended; returns the most serious of their codes, except of those that were terminated.
all_ranks() {
  local rank port output terminated='' deadline=0 alive=() pids=() readers=() codes=() own=()
  trap 'leaving=1' TERM
  trap '' INT # the terminal sends it to all processes: the readers below must outlive the trainers
  leaving=''
  port=$(free_port)
  for ((rank = 0; rank < processes; rank++)); do
    rank_command "$rank" "$port" "$@"
    exec {output}> >(show_output "$rank")
    readers[rank]=$!
    setsid "${command[@]}" >&"$output" 2>&1 < /dev/null & # in its own session, so that its child processes can be killed with it
    pids[rank]=$!
    exec {output}>&-
  done
  alive=("${!pids[@]}")
  while ((${#alive[@]})); do
    gather
    if [ -z "$terminated" ] && { [ -n "$leaving" ] || ((${#own[@]} > 0 && $(worst_code "${own[@]}") != 0)); }; then
      if [ -z "$leaving" ]; then
        pause 0.3 # the same cause may have killed others: their codes count too
        gather
      fi
      terminated=1 deadline=$((SECONDS + grace))
      for rank in "${alive[@]}"; do kill -TERM "${pids[rank]}" 2> /dev/null || true; done
    fi
    if [ -n "$terminated" ] && ((SECONDS > deadline)); then
      for rank in "${alive[@]}"; do
        say "process $rank has not left within $grace s, killing it"
        end_group "${pids[rank]}"
      done
      deadline=$((SECONDS + grace))
    fi
    ((${#alive[@]} == 0)) || pause 0.1
  done
  for rank in "${!pids[@]}"; do end_group "${pids[rank]}"; done
  for rank in "${!readers[@]}"; do wait "${readers[rank]}" || true; done
  if ((${#own[@]})); then return "$(worst_code "${own[@]}")"; fi
  return "$(worst_code "${codes[@]}")"
}

# shellcheck disable=SC2329,SC2154 # called by all_ranks; waited comes from wait_for
# Collects the exit codes of the processes that have ended (in variables of all_ranks).
gather() {
  local still=()
  for rank in "${alive[@]}"; do
    if kill -0 "${pids[rank]}" 2> /dev/null; then
      still+=("$rank")
    else
      wait_for "${pids[rank]}"
      codes[rank]=$waited
      [ -n "$terminated" ] || own+=("$waited")
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
