#!/usr/bin/env bash
# Commands that tpu_vm.sh runs on every worker of a TPU VM, where this file is in ~/avsi_jax/launch.
#
#   tpu_worker.sh install        make an environment with avsi_jax and the TPU libraries (Python 3.11 from uv: the images have an older one)
#   tpu_worker.sh run [--attempt=ID] -- ARGS
#                                start avsi-train detached from this session, or follow the one that runs, until it ends;
#                                if the attempt with this ID has ended already, report its exit code
#   tpu_worker.sh stop           send SIGTERM: the training saves, and `run` reports 130, so that it is not restarted
#
# So a lost connection does not end the training: the next `run` with the same arguments follows it.
# AVSI_RUN: folder of pid, log and exit code (~/avsi_run)          AVSI_TRAIN: the command (~/avsi_env/bin/avsi-train)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=${AVSI_RUN:-$HOME/avsi_run}
log=$folder/train.log

install() {
  local unpacked checkout=$HOME/avsi_jax
  unpacked=$(cd "$(dirname "$0")/.." && pwd)
  if [ -d "$folder" ] && is_running; then say "a training is running here, nothing is installed"; return; fi
  if [ "$unpacked" != "$checkout" ]; then rm -rf "$checkout" && mv "$unpacked" "$checkout"; fi
  # pesq is built from source. A fresh image is often still upgrading itself: wait for that.
  command -v cc > /dev/null || sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcc
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --seed --python 3.11 "$HOME/avsi_env"
  "$HOME/avsi_env/bin/python" -m pip install --quiet "${checkout}[tpu,gcs]" --constraint "$checkout/constraints/tpu.txt"
}

# Whether a training is running: it holds the lock, which a reboot or a reused process number cannot fake.
is_running() {
  local code=0
  flock --nonblock --conflict-exit-code=99 "$folder/lock" true 2> /dev/null || code=$?
  ((code == 99))
}

# Runs the trainer while holding the lock; writes its process number and exit code to files. Detached from the caller's session.
supervise() {
  local code=0
  exec 9> "$folder/lock"
  flock --wait=10 9 || fail "found $folder/lock taken, expected it free: another training has started here"
  setsid "$@" &
  echo $! > "$folder/pid"
  wait $! || code=$?
  end_group $!
  echo "$code" > "$folder/code.new" && mv "$folder/code.new" "$folder/code"
}

follow() {
  local from=1 tries=0 attempt=''
  case ${1:-} in --attempt=*) attempt=${1#*=}; shift ;; esac
  [ "${1:-}" = -- ] || fail "found '${1:-}', expected the arguments of avsi-train after --"
  shift
  mkdir -p "$folder"
  if is_running; then
    [ "$(cat "$folder/arguments")" = "$*" ] ||
      fail "found a training with other arguments ($(cat "$folder/arguments")), expected none or this one: stop it first (tpu_vm.sh stop)"
    say "a training with these arguments is running already, follows it"
  elif [ -n "$attempt" ] && [ "$attempt" = "$(cat "$folder/attempt" 2> /dev/null)" ]; then
    report_code
  else
    [ ! -f "$log" ] || from=$(($(wc -c < "$log") + 1))
    rm -f "$folder/code" "$folder/stop_requested" "$folder/pid"
    echo "$*" > "$folder/arguments"
    echo "$attempt" > "$folder/attempt"
    read -ra trainer <<< "${AVSI_TRAIN:-$HOME/avsi_env/bin/avsi-train}"
    # without this, jax would silently train on the CPU if the TPU does not respond
    JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} setsid nohup bash "$0" supervise "${trainer[@]}" "$@" >> "$log" 2>&1 < /dev/null &
    until [ -f "$folder/pid" ] || ((++tries > 100)); do sleep 0.1; done
  fi
  tail -c "+$from" --pid=$$ -f "$log" & # --pid: it ends with this script in any case
  while is_running; do sleep "${AVSI_LOOK_S:-2}"; done
  sleep 0.2 # tail's last lines
  kill $! 2> /dev/null || true
  report_code
}

# Exits with the trainer's exit code, and prints it.
report_code() {
  local code
  code=$(cat "$folder/code" 2> /dev/null || echo 137) # none: supervise was killed too
  if [ -f "$folder/stop_requested" ] && restartable "$code"; then code=130; fi
  echo "avsi-worker: $(hostname) left with code $code"
  exit "$code"
}

case ${1:-} in
  install) install ;;
  run) shift; follow "$@" ;;
  supervise) shift; supervise "$@" ;;
  stop)
    if [ -d "$folder" ] && is_running; then touch "$folder/stop_requested"; kill -TERM "$(cat "$folder/pid")"; else say "no training is running here"; fi
    ;;
  --help | -h) help_of "$0" ;;
  *) fail "found '${1:-}', expected install, run -- ARGS, stop or --help" ;;
esac
