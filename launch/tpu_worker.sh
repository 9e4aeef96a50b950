#!/usr/bin/env bash
# What tpu_vm.sh has every worker of a TPU VM do; lies there in ~/avsi_jax/launch.
#
#   tpu_worker.sh install        an environment with avsi_jax and the TPU's libraries (Python 3.11 by uv: the images have an older one)
#   tpu_worker.sh run [--attempt=ID] -- ARGS
#                                start avsi-train apart from this session, or find the one that runs, and follow it to its end;
#                                where the attempt of that name has ended already, say how
#   tpu_worker.sh stop           SIGTERM to it: it saves, and `run` says 130 to its caller: not to be started again
#
# A lost connection is no end of the training, therefore: the next `run` with the same arguments follows it on.
# AVSI_RUN: where pid, log and exit code lie (~/avsi_run)          AVSI_TRAIN: the command (~/avsi_env/bin/avsi-train)
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder=${AVSI_RUN:-$HOME/avsi_run}
log=$folder/train.log

install() {
  local unpacked checkout=$HOME/avsi_jax
  unpacked=$(cd "$(dirname "$0")/.." && pwd)
  if [ -d "$folder" ] && is_running; then say "a training runs here, nothing is installed under it"; return; fi
  if [ "$unpacked" != "$checkout" ]; then rm -rf "$checkout" && mv "$unpacked" "$checkout"; fi
  # pesq is built from source. A fresh image is often still at its own upgrades: wait for them.
  command -v cc > /dev/null || sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq gcc
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --seed --python 3.11 "$HOME/avsi_env"
  "$HOME/avsi_env/bin/python" -m pip install --quiet "${checkout}[tpu,gcs]" --constraint "$checkout/constraints/tpu.txt"
}

# Whether a training runs: it holds the lock, and no reboot or reused number can fake that.
is_running() {
  local code=0
  flock --nonblock --conflict-exit-code=99 "$folder/lock" true 2> /dev/null || code=$?
  ((code == 99))
}

# The trainer under the lock, its number and its code left in files. In a session of its own, with nothing of the caller's open.
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
    say "a training with these arguments runs already, follows it"
  elif [ -n "$attempt" ] && [ "$attempt" = "$(cat "$folder/attempt" 2> /dev/null)" ]; then
    tell_code
  else
    [ ! -f "$log" ] || from=$(($(wc -c < "$log") + 1))
    rm -f "$folder/code" "$folder/asked" "$folder/pid"
    echo "$*" > "$folder/arguments"
    echo "$attempt" > "$folder/attempt"
    read -ra trainer <<< "${AVSI_TRAIN:-$HOME/avsi_env/bin/avsi-train}"
    # jax would train on the CPU, in silence, where the TPU doesn't answer
    JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} setsid nohup bash "$0" supervise "${trainer[@]}" "$@" >> "$log" 2>&1 < /dev/null &
    until [ -f "$folder/pid" ] || ((++tries > 100)); do sleep 0.1; done
  fi
  tail -c "+$from" --pid=$$ -f "$log" & # --pid: it ends with this script, however that ends
  while is_running; do sleep "${AVSI_LOOK_S:-2}"; done
  sleep 0.2 # tail's last lines
  kill $! 2> /dev/null || true
  tell_code
}

# Leaves with the trainer's exit code, and says it.
tell_code() {
  local code
  code=$(cat "$folder/code" 2> /dev/null || echo 137) # none: the trainer's keeper was killed with it
  if [ -f "$folder/asked" ] && restartable "$code"; then code=130; fi
  echo "avsi-worker: $(hostname) left with code $code"
  exit "$code"
}

case ${1:-} in
  install) install ;;
  run) shift; follow "$@" ;;
  supervise) shift; supervise "$@" ;;
  stop)
    if [ -d "$folder" ] && is_running; then touch "$folder/asked"; kill -TERM "$(cat "$folder/pid")"; else say "no training runs here"; fi
    ;;
  --help | -h) help_of "$0" ;;
  *) fail "found '${1:-}', expected install, run -- ARGS, stop or --help" ;;
esac
