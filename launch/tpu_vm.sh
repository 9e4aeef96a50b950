#!/usr/bin/env bash
# Runs a training on a TPU VM or a pod slice, from this machine, with gcloud.
#
#   launch/tpu_vm.sh create  --name=N --zone=Z --type=v5litepod-16 [--spot]      create the slice now, or fail if none is available
#   launch/tpu_vm.sh queue   --name=N --zone=Z --type=v5litepod-16 [--spot]      request it and wait until one is available
#   launch/tpu_vm.sh install --name=N --zone=Z                                   install this checkout's last commit on every worker
#   launch/tpu_vm.sh run     --name=N --zone=Z --type=T -- ARGS                  train on all workers, and follow until the end
#   launch/tpu_vm.sh watch   --name=N --zone=Z --type=T [--queued] [--spot] -- ARGS   all of this, again after every preemption
#   launch/tpu_vm.sh stop    --name=N --zone=Z                                   stop the training, which saves; the slice stays
#   launch/tpu_vm.sh status  --name=N --zone=Z [-- --workdir=gs://...]           state of the slice and of the training
#   launch/tpu_vm.sh logs    --name=N --zone=Z [--worker=0]                      last output of the workers
#   launch/tpu_vm.sh delete  --name=N --zone=Z [--queued]                        delete the slice, which ends its cost
#
# ARGS are those of avsi-train: --config=av_mtl_s2s --workdir=gs://BUCKET/run --config.data_dir=gs://BUCKET/data
#
# --name, --zone, --project, --type   or the environment: AVSI_TPU_NAME, AVSI_TPU_ZONE, AVSI_PROJECT, AVSI_TPU_TYPE
#                   (default of project: gcloud's). Types: v5litepod-16, v6e-16, v4-32, v5p-32 and similar.
# --version=V       the image (default by type: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base)
# --spot            cheap, but may be preempted at any time: use watch
# --queued          create, query and delete the slice as a queued resource of the same name
# --service_account=EMAIL   of the workers (the project's default); it needs read and write access to the buckets
# --worker=LIST     for logs: numbers separated by commas, or all (all)
# --restarts=N      restart after exit codes 143, 75, death by a signal and a lost connection, at most N times in a row (100)
# --pause=N         seconds between two queries of the slice (30)
# --keep            watch: do not delete the slice when the training is finished (it costs by the hour)
# --dry_run         only print the commands
#
# Exit code: that of the training, the most serious of all workers; 130 after stop; 143 if the slice of `run` was preempted.
# After Ctrl-C the training keeps running: run or watch follow it again, stop ends it.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name=${AVSI_TPU_NAME:-} zone=${AVSI_TPU_ZONE:-} project=${AVSI_PROJECT:-} type=${AVSI_TPU_TYPE:-}
version='' spot='' queued='' service_account='' worker=all restarts=100 pause_s=30 keep='' dry_run=''
task=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --pause=*) pause_s=${1#*=} ;;
    --spot) spot=1 ;;
    --queued) queued=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) help_of "$0" ;;
    --) shift; break ;;
    *) fail "found '$1', expected a flag of ${0##*/} (--help lists them), those of avsi-train after --" ;;
  esac
  shift
done

# ---- arguments, checked before anything costs money ------------------------------------------------------------------------------

# Number of workers of a slice of this type: v5e and v6e types count chips (up to 8 on one host, else 4 per host), the others cores.
count_hosts() {
  local count=${type##*-}
  [[ $type =~ ^(v2|v3|v4|v5p|v5litepod|v6e)-[1-9][0-9]*$ ]] ||
    fail "--type: found '$type', expected a type and its size, such as v5litepod-16, v6e-16, v4-32 or v5p-32"
  case $type in
    v5litepod-* | v6e-*) hosts=$((count <= 8 ? 1 : count / 4)) ;;
    *) hosts=$((count <= 8 ? 1 : count / 8)) ;;
  esac
}

choose_version() {
  [ -z "$version" ] || return 0
  case $type in
    v6e-*) version=v2-alpha-tpuv6e ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
}

# The trainer's arguments for every worker -> `arguments`. Only buckets: a worker's disk is deleted with the worker.
check_run() {
  local field value
  check_arguments "$@"
  for field in workdir config.data_dir; do
    value=$(argument "$field" "$@")
    [[ $value == gs://?* ]] || fail "--$field: found '$value', expected gs://BUCKET/FOLDER: a worker's disk is deleted with the worker"
  done
  arguments=("$@")
  [ -n "$(argument cache_dir "$@")" ] || arguments+=(--cache_dir=/tmp/avsi_data)
  if ((hosts > 1)); then arguments+=(--distributed=on "--num_processes=$hosts"); fi
}

case $task in
  create | queue | install | run | stop | status | logs | watch | delete) ;;
  --help | -h) help_of "$0" ;;
  *) fail "found '$task', expected one of create, queue, install, run, stop, status, logs, watch, delete (see --help)" ;;
esac
require_value name --name
require_value zone --zone
require_count --restarts "$restarts" 0
require_count --pause "$pause_s" 0
case $task in
  create | queue | run | watch)
    require_value type --type
    count_hosts
    choose_version
    ;;
esac
case $task in run | watch) check_run "$@" ;; esac
require_command gcloud "https://cloud.google.com/sdk/docs/install, then gcloud auth login"
place=("--zone=$zone" ${project:+"--project=$project"})

# ---- gcloud commands -------------------------------------------------------------------------------------------------------------

create() {
  if [ -n "$queued" ]; then queue; return; fi
  run gcloud compute tpus tpu-vm create "$name" "${place[@]}" "--accelerator-type=$type" "--version=$version" \
    ${spot:+--spot} ${service_account:+"--service-account=$service_account"}
}

queue() {
  run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${place[@]}" "--accelerator-type=$type" \
    "--runtime-version=$version" ${spot:+--spot} ${service_account:+"--service-account=$service_account"}
}

delete() {
  if [ -n "$queued" ]; then
    run gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    run gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

# $1: which workers, $2: a shell command for them.
on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"; }

# Installs the last commit of the checkout, without uncommitted files.
install() {
  local folder packed code=0
  folder=$(mktemp -d)
  packed=$folder/avsi_jax.tar.gz
  run git -C "$here/.." archive --format=tar.gz "--output=$packed" HEAD &&
    run gcloud compute tpus tpu-vm scp "$packed" "$name:avsi_jax.tar.gz" "${place[@]}" --worker=all &&
    on_workers all "rm -rf avsi_new && mkdir avsi_new && tar -xzf avsi_jax.tar.gz -C avsi_new && bash avsi_new/launch/tpu_worker.sh install" ||
    code=$?
  rm -rf "$folder"
  return "$code"
}

# Runs the training on all workers once -> `left`, the most serious of their exit codes; 255 if a connection was lost or failed.
# gcloud only reports the first code that is not 0, so each worker prints its own. gcloud also repeats the command on a worker whose
# connection was lost: the number of the attempt shows that worker whether its training has ended since.
train_once() {
  local command output codes
  command="bash avsi_jax/launch/tpu_worker.sh run --attempt=$(date +%s)-$$ -- $(printf '%q ' "${arguments[@]}")"
  if [ -n "$dry_run" ]; then on_workers all "${command% }"; left=0; return; fi
  output=$(mktemp)
  on_workers all "${command% }" 2>&1 | tee "$output" || true
  mapfile -t codes < <(sed -n 's/.*avsi-worker: .* left with code \([0-9]\{1,3\}\).*/\1/p' "$output")
  rm -f "$output"
  left=$(worst_code ${codes[@]+"${codes[@]}"})
  if ((left == 0 && ${#codes[@]} < hosts)); then left=255; fi
}

# State of the slice: of the TPU (READY, PREEMPTED, ...), or of its queued resource until that is ACTIVE; NONE if there is none;
# UNKNOWN if gcloud fails.
state_of_slice() {
  local state
  if [ -n "$queued" ]; then
    state=$(ask queued-resources 'value(state.state)')
    [ "$state" = ACTIVE ] || { echo "$state"; return; }
  fi
  ask tpu-vm 'value(state)'
}

ask() {
  local errors answer
  errors=$(mktemp)
  if answer=$(gcloud compute tpus "$1" describe "$name" "${place[@]}" "--format=$2" 2> "$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qi 'not.\?found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNKNOWN
  fi
  rm -f "$errors"
}

# ---- run and watch ---------------------------------------------------------------------------------------------------------------

# Counts a restart after code $1 and a run of $2 seconds; exits if there were too many.
count_restart() {
  (($2 < ${AVSI_LONG_RUN_S:-600})) || attempts=0
  attempts=$((attempts + 1))
  if ((attempts > restarts)); then
    say "gives up after $restarts restarts in a row, code $1: see the log (tpu_vm.sh logs); --restarts allows more"
    exit "$1"
  fi
}

# Trains until the code `left` is one that a restart does not help, or the connection is lost (255); the last run took `lasted` s.
train() {
  local began
  while :; do
    began=$SECONDS
    train_once
    lasted=$((SECONDS - began))
    ((left != 255)) || return 0
    restartable "$left" || return 0
    count_restart "$left" "$lasted"
    say "left with code $left, starts again ($attempts of $restarts)"
    sleep "${AVSI_PAUSE_S:-5}"
  done
}

run_here() {
  local state attempts=0
  if [ -n "$dry_run" ]; then train_once; return; fi
  while :; do
    train
    ((left == 255)) || exit "$left"
    state=$(state_of_slice)
    case $state in
      READY | UNKNOWN) count_restart 255 "$lasted"; say "lost the connection, the slice is $state, connects again"; sleep "$pause_s" ;;
      *) say "lost the slice, it is $state: tpu_vm.sh watch creates it again and continues"; exit 143 ;;
    esac
  done
}

watch() {
  local state last='' ready='' attempts=0
  if [ -n "$dry_run" ]; then create; install; train_once; delete; return; fi
  while :; do
    state=$(state_of_slice)
    [ "$state" = "$last" ] || say "slice $name is $state"
    last=$state
    case $state in
      READY)
        if [ -z "$ready" ]; then
          if install; then ready=1; else count_restart 1 0; sleep "$pause_s"; continue; fi
        fi
        train
        ((left == 255)) || break
        count_restart 255 "$lasted"
        ;;
      NONE)
        ready=''
        create || { count_restart 1 0; say "could not create the slice, tries again ($attempts of $restarts)"; sleep "$pause_s"; }
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        ready=''
        delete || count_restart 1 0
        ;;
      STOPPED) fail "found the slice STOPPED, expected it to run: gcloud compute tpus tpu-vm start $name, or tpu_vm.sh delete" ;;
      UNKNOWN) count_restart 1 0 ;;
      *) ready='' ;; # in transition to one of the states above
    esac
    case $state in
      READY | NONE | PREEMPTED | TERMINATED | FAILED | SUSPENDED) sleep "${AVSI_PAUSE_S:-5}" ;;
      *) sleep "$pause_s" ;;
    esac
  done
  if ((left == 0)) && [ -z "$keep" ]; then delete; fi
  ((left == 0)) || say "left with code $left, which a restart does not help; the slice still exists, and costs money: tpu_vm.sh delete"
  exit "$left"
}

status() {
  local workdir
  if [ -n "$queued" ]; then run gcloud compute tpus queued-resources describe "$name" "${place[@]}" '--format=value(state.state)'; fi
  run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" '--format=value(state,health)'
  workdir=$(argument workdir "$@")
  [ -z "$workdir" ] || run gcloud storage cat "${workdir%/}/status.json"
}

case $task in
  create) create ;;
  queue) queue ;;
  install) install ;;
  run) run_here ;;
  stop) on_workers all "bash avsi_jax/launch/tpu_worker.sh stop" ;;
  status) status "$@" ;;
  logs) on_workers "$worker" "tail -n 100 avsi_run/train.log" ;;
  watch) watch ;;
  delete) delete ;;
esac
