#!/usr/bin/env bash
# A training on a TPU VM or a pod slice, from this machine, by gcloud.
#
#   launch/tpu_vm.sh create  --name=N --zone=Z --type=v5litepod-16 [--spot]      make the slice now, or fail where there is none
#   launch/tpu_vm.sh queue   --name=N --zone=Z --type=v5litepod-16 [--spot]      ask for it, and get it when there is one
#   launch/tpu_vm.sh install --name=N --zone=Z                                   this checkout's last commit to every worker
#   launch/tpu_vm.sh run     --name=N --zone=Z --type=T -- ARGS                  train on all workers, follow it to its end
#   launch/tpu_vm.sh watch   --name=N --zone=Z --type=T [--queued] [--spot] -- ARGS   all of it, again after every pre-emption
#   launch/tpu_vm.sh stop    --name=N --zone=Z                                   the training saves and leaves; the slice stays
#   launch/tpu_vm.sh status  --name=N --zone=Z [-- --workdir=gs://...]           state of the slice, what the training is doing
#   launch/tpu_vm.sh logs    --name=N --zone=Z [--worker=0]                      the end of the workers' output
#   launch/tpu_vm.sh delete  --name=N --zone=Z [--queued]                        the slice and what it costs
#
# ARGS are those of avsi-train: --config=av_mtl_s2s --workdir=gs://BUCKET/run --config.data_dir=gs://BUCKET/data
#
# --name, --zone, --project, --type   or the environment: AVSI_TPU_NAME, AVSI_TPU_ZONE, AVSI_PROJECT, AVSI_TPU_TYPE
#                   (project: else the one that gcloud is set to). Types: v5litepod-16, v6e-16, v4-32, v5p-32 and their like.
# --version=V       the image (by the type: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, v2-alpha-tpuv5, tpu-ubuntu2204-base)
# --spot            cheap, and may be taken away at any time: use watch
# --queued          the slice is a queued resource of the same name: ask for it, look at it and delete it as such
# --service_account=EMAIL   whose rights the workers have (the project's default); it must read and write the buckets
# --worker=LIST     for logs: a number, several with commas, or all (all)
# --restarts=N      starts again after 143, 75, death by a signal and a lost connection, N times at most in a row (100)
# --pause=N         seconds between two looks at the slice (30)
# --keep            watch: leave the slice standing once the training is finished (else it is deleted: it costs by the hour)
# --dry_run         print the commands, run none
#
# Exit code: the training's, the worst of all workers; 130 after stop; 143 where `run` finds its slice taken away.
# Ctrl-C here leaves the training running: run or watch find it again, stop ends it.
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

# ---- what was asked for, refused before anything is paid for ---------------------------------------------------------------------

# Workers of the slice `type`: v5e and v6e count chips in their names, 8 to a host up to 8, then 4; the others count cores.
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

# The trainer's arguments as every worker gets them -> `arguments`. Its own disk is gone with a worker: buckets only.
check_run() {
  local field value
  check_arguments "$@"
  for field in workdir config.data_dir; do
    value=$(argument "$field" "$@")
    [[ $value == gs://?* ]] || fail "--$field: found '$value', expected gs://BUCKET/FOLDER: a worker's disk goes with the worker"
  done
  arguments=("$@")
  [ -n "$(argument cache_dir "$@")" ] || arguments+=(--cache_dir=/tmp/avsi_data)
  if ((hosts > 1)); then arguments+=(--distributed=on "--num_processes=$hosts"); fi
}

case $task in
  create | queue | install | run | stop | status | logs | watch | delete) ;;
  --help | -h) help_of "$0" ;;
  *) fail "found '$task', expected one of create, queue, install, run, stop, status, logs, watch, delete (--help says more)" ;;
esac
must_be_set name --name
must_be_set zone --zone
must_be_count --restarts "$restarts" 0
must_be_count --pause "$pause_s" 0
case $task in
  create | queue | run | watch)
    must_be_set type --type
    count_hosts
    choose_version
    ;;
esac
case $task in run | watch) check_run "$@" ;; esac
must_have gcloud "https://cloud.google.com/sdk/docs/install, then gcloud auth login"
place=("--zone=$zone" ${project:+"--project=$project"})

# ---- what gcloud is asked to do --------------------------------------------------------------------------------------------------

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

# $1: which workers, $2: the command for their shell.
on_workers() { run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1" "--command=$2"; }

# The last commit of the checkout, not what lies around it.
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

# The training on all workers, once -> `left`, the worst of their exit codes; 255 where a connection was lost, or there was none.
# gcloud itself tells the first worker's that isn't 0, therefore each worker says its own. It also gives a worker whose connection
# broke the same command again: by the attempt's number that one knows what has ended since.
train_once() {
  local command output codes
  command="bash avsi_jax/launch/tpu_worker.sh run --attempt=$(date +%s)-$$ -- $(printf '%q ' "${arguments[@]}")"
  if [ -n "$dry_run" ]; then on_workers all "${command% }"; left=0; return; fi
  output=$(mktemp)
  on_workers all "${command% }" 2>&1 | tee "$output" || true
  mapfile -t codes < <(sed -n 's/.*avsi-worker: .* left with code \([0-9]\{1,3\}\).*/\1/p' "$output")
  rm -f "$output"
  left=$(worst_of ${codes[@]+"${codes[@]}"})
  if ((left == 0 && ${#codes[@]} < hosts)); then left=255; fi
}

# State of the slice: a TPU's own (READY, PREEMPTED, ...), or that of its queued resource until that is ACTIVE; NONE where there is
# no such thing; UNKNOWN where gcloud could not say.
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

# ---- tasks that go on ------------------------------------------------------------------------------------------------------------

# One more restart, or the end: after code $1, which took $2 seconds.
count_restart() {
  (($2 < ${AVSI_LONG_RUN_S:-600})) || again=0
  again=$((again + 1))
  if ((again > restarts)); then
    say "gives up after $restarts restarts in a row, code $1: look at the log (tpu_vm.sh logs); --restarts allows more"
    exit "$1"
  fi
}

# Trains until code `left` says that another start mends nothing, or the connection is lost (255); the last start took `lasted` s.
train() {
  local began
  while :; do
    began=$SECONDS
    train_once
    lasted=$((SECONDS - began))
    ((left != 255)) || return 0
    restartable "$left" || return 0
    count_restart "$left" "$lasted"
    say "left with code $left, starts again ($again of $restarts)"
    sleep "${AVSI_PAUSE_S:-5}"
  done
}

run_here() {
  local state again=0
  if [ -n "$dry_run" ]; then train_once; return; fi
  while :; do
    train
    ((left == 255)) || exit "$left"
    state=$(state_of_slice)
    case $state in
      READY | UNKNOWN) count_restart 255 "$lasted"; say "lost the connection, the slice is $state, connects again"; sleep "$pause_s" ;;
      *) say "lost the slice, it is $state: tpu_vm.sh watch makes it anew and goes on"; exit 143 ;;
    esac
  done
}

watch() {
  local state last='' ready='' again=0
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
        create || { count_restart 1 0; say "could not make the slice, tries again ($again of $restarts)"; sleep "$pause_s"; }
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDED)
        ready=''
        delete || count_restart 1 0
        ;;
      STOPPED) fail "found the slice STOPPED, expected it to run: gcloud compute tpus tpu-vm start $name, or tpu_vm.sh delete" ;;
      UNKNOWN) count_restart 1 0 ;;
      *) ready='' ;; # on its way to one of those above
    esac
    case $state in
      READY | NONE | PREEMPTED | TERMINATED | FAILED | SUSPENDED) sleep "${AVSI_PAUSE_S:-5}" ;;
      *) sleep "$pause_s" ;;
    esac
  done
  if ((left == 0)) && [ -z "$keep" ]; then delete; fi
  ((left == 0)) || say "left with code $left, which another start does not mend; the slice still stands, and costs: tpu_vm.sh delete"
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
