#!/usr/bin/env bash
# A training on one machine with several GPUs: one process drives all of them, so nothing has to be distributed.
#
#   launch/gpu_host.sh --gpus=0,1,2,3 -- --config=av_mtl_s2s --workdir=DIR --config.data_dir=DATA
#
# --gpus=LIST     numbers of the GPUs to take (all; or those of the environment variable CUDA_VISIBLE_DEVICES)
# --restarts=N    starts again after 143, 75 and death by a signal, N times at most in a row (20)
# --dry_run       print the command, run none
#
# SIGTERM or Ctrl-C here: the training saves and is not started again; exit code 143 or 130. Otherwise the code is the training's.
# The global batch (config.batch_size) is divided among the GPUs. AVSI_TRAIN: another command than avsi-train.
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
must_be_count --restarts "$restarts" 0
[[ $gpus =~ ^[A-Za-z0-9/-]*(,[A-Za-z0-9/-]+)*$ ]] || fail "--gpus: found '$gpus', expected numbers or names with commas between, such as 0,1"
check_arguments "$@"
read -ra trainer <<< "${AVSI_TRAIN:-avsi-train}"
must_have "${trainer[0]}" "pip install 'avsi_jax[cuda]', or name another command: AVSI_TRAIN"
must_have setsid "it comes with util-linux"

# cuda alone: without a GPU it ends with a message, rather than training on the CPU for days.
command=(env JAX_PLATFORMS=cuda ${gpus:+"CUDA_VISIBLE_DEVICES=$gpus"} "${trainer[@]}" "$@" --distributed=off)
if [ -n "$dry_run" ]; then run "${command[@]}"; exit 0; fi
code=0
keep_running "$restarts" setsid "${command[@]}" || code=$? # setsid: Ctrl-C reaches it through this script alone, once
exit "$code"
