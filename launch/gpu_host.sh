#!/usr/bin/env bash
# Runs a training on one machine with several GPUs, in a single process.
#
#   launch/gpu_host.sh --gpus=0,1,2,3 -- --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
#
# --gpus=LIST     numbers of the GPUs to use (all, or those of the environment variable CUDA_VISIBLE_DEVICES)
# --restarts=N    restart after exit codes 143, 75 and death by a signal, at most N times in a row (20)
# --dry_run       only print the command
#
# After SIGTERM or Ctrl-C the training saves and is not restarted; the exit code is 143 or 130. Otherwise it is that of the training.
# The global batch (config.batch_size) is divided among the GPUs. AVSI_TRAIN: a command to use instead of avsi-train.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

gpus=${CUDA_VISIBLE_DEVICES:-} restarts=20 dry_run=''
while (($#)); do
  case $1 in
    --gpus=*) gpus=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --help | -h) help_of "$0" ;;
    --) shift; break ;;
    *) fail "found '$1', expected a flag of ${0##*/} (--help lists them), those of avsi-train after --" ;;
  esac
  shift
done
require_count --restarts "$restarts" 0
[[ $gpus =~ ^[A-Za-z0-9/-]*(,[A-Za-z0-9/-]+)*$ ]] || fail "--gpus: found '$gpus', expected numbers or names with commas between, such as 0,1"
check_arguments "$@"
read -ra trainer <<< "${AVSI_TRAIN:-avsi-train}"
require_command "${trainer[0]}" "pip install 'avsi_jax[cuda]', or name another command: AVSI_TRAIN"
require_command setsid "it comes with util-linux"

# Only cuda: without a GPU it ends with a message instead of training on the CPU.
command=(env JAX_PLATFORMS=cuda ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"} "${trainer[@]}" "$@" --distributed=off)
if [ -n "$dry_run" ]; then run "${command[@]}"; exit 0; fi
code=0
keep_running "$restarts" setsid "${command[@]}" || code=$? # setsid: Ctrl-C reaches it only once, through this script
exit "$code"
