# shellcheck shell=bash
# Functions that the launchers share: messages, dry runs, the arguments of avsi-train, and the rule for restarting.
#
# AVSI_TRAIN: the trainer's command (avsi-train)         AVSI_PAUSE_S: seconds before a restart (5)
# AVSI_LONG_RUN_S: a start that lasted at least so many seconds (600) resets the count of restarts

say() { echo "${launcher:-${0##*/}}: $*" >&2; }
fail() { say "$@"; exit 2; }

# Prints the first comment of the script $1 (--help).
help_of() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"; exit 0; }

# Runs a command; with --dry_run only prints it as it would be typed.
run() { if [ -n "${dry_run:-}" ]; then printf '%q ' "$@" | sed 's/ $//'; echo; else "$@"; fi; }

# $1: name of a command, $2: how to install it. Not checked in a dry run.
require_command() { [ -n "${dry_run:-}" ] || command -v "$1" > /dev/null || fail "found no command $1, expected it on PATH: $2"; }

# $1: name of a variable, $2: the flag that sets it.
require_value() { [ -n "${!1:-}" ] || fail "found no $2, expected a value: give $2=VALUE, or the environment variable $1"; }

# $1: a flag, $2: its value, $3: the minimum.
require_count() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then fail "$1: found '$2', expected a whole number of $3 or more"; fi
}

# The value of --NAME among the trainer's arguments (after $1); nothing if it is missing.
argument() {
  local name=$1 given
  shift
  for given in "$@"; do
    case $given in "--$name="*) echo "${given#*=}"; return ;; esac
  done
}

# Checks the trainer's arguments that every launcher needs.
check_arguments() {
  (($#)) || fail "found no arguments for avsi-train, expected them after --: ${launcher:-${0##*/}} ... -- --config=NAME --workdir=DIR"
  [ -n "$(argument workdir "$@")" ] || fail "found no --workdir=DIR among the arguments after --, expected one: a run resumes from it"
}

# Whether running the same command again helps after exit code $1: preemption (143), watchdog (75), death by a signal (128 + number).
# It does not after 0 (finished), 1 (a bug), 2 (a usage error or a reported fault), 126, 127 (no such command), 130 (Ctrl-C).
restartable() {
  case $1 in
    75) return 0 ;;
    130) return 1 ;;
    *) (($1 > 128 && $1 <= 192)) ;;
  esac
}

# The exit code that represents all of "$@": first a reported fault (2), which only the user can fix; then codes that are restarted,
# since a process whose peers died may exit with any code; then any other code except 0.
worst_code() {
  local code worst=0 rank=0 now
  for code in "$@"; do
    case $code in
      0) now=0 ;;
      2) now=5 ;;
      75) now=3 ;;
      143) now=2 ;;
      *) if restartable "$code"; then now=4; else now=1; fi ;;
    esac
    ((now <= rank)) || { worst=$code rank=$now; }
  done
  echo "$worst"
}

# Waits for the child $1, also if signals interrupt the wait -> $waited, its exit code.
wait_for() {
  local before
  while :; do
    signalled='' before=${waited:-0} waited=0
    wait "$1" 2> /dev/null || waited=$? # 2>: bash prints a message about a killed child, and so does the launcher
    ((waited != 127)) || waited=$before
    [ -n "$signalled" ] || return 0
  done
}

# A signal to the launcher: the trainer saves on SIGTERM, and is not restarted.
on_signal() {
  stop_code=$1 signalled=1
  [ -z "${child:-}" ] || send_sigterm
}

send_sigterm() {
  [ "${terminated:-}" != "$child" ] || return 0
  terminated=$child
  kill -TERM "$child" 2> /dev/null || true
}

# Kills the rest of the session led by $1: workers of a killed trainer would keep pipes, locks and GPU memory.
end_group() { kill -KILL -- "-$1" 2> /dev/null || true; }

# Runs the command after $1, and restarts it as long as that helps, at most $1 times in a row of short runs.
# Returns the last exit code; 143 or 130 if this launcher received a signal and the trainer has saved.
keep_running() {
  local limit=$1 attempts=0 began
  shift
  stop_code='' child='' terminated='' waited=0
  trap 'on_signal 143' TERM
  trap 'on_signal 130' INT
  while :; do
    began=$SECONDS
    "$@" &
    child=$!
    [ -z "$stop_code" ] || send_sigterm
    wait_for "$child"
    end_group "$child"
    child=''
    if [ -n "$stop_code" ]; then
      ! restartable "$waited" || waited=$stop_code
      return "$waited"
    fi
    restartable "$waited" || return "$waited"
    ((SECONDS - began < ${AVSI_LONG_RUN_S:-600})) || attempts=0
    attempts=$((attempts + 1))
    if ((attempts > limit)); then
      say "left with code $waited, after $limit restarts in a row: look at train.log in the workdir; --restarts allows more"
      return "$waited"
    fi
    say "left with code $waited, starts again ($attempts of $limit)"
    pause "${AVSI_PAUSE_S:-5}"
    [ -z "$stop_code" ] || return "$stop_code"
  done
}

# Sleeps $1 seconds, or until a signal.
pause() {
  sleep "$1" &
  wait $! || true
}
