# shellcheck shell=bash
# What the launchers share, sourced by them: messages, dry runs, the arguments of avsi-train, and the one rule of when to start again.
#
# AVSI_TRAIN: the trainer's command (avsi-train)         AVSI_PAUSE_S: seconds before it is started again (5)
# AVSI_LONG_RUN_S: a start that lasted so many seconds (600) was no failure: counting of restarts begins anew

say() { echo "${launcher:-${0##*/}}: $*" >&2; }
fail() { say "$@"; exit 2; }

# The first comment of the script $1, as its --help.
help_of() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"; exit 0; }

# Runs a command; with --dry_run shows it as it would be typed, and runs nothing.
run() { if [ -n "${dry_run:-}" ]; then printf '%q ' "$@" | sed 's/ $//'; echo; else "$@"; fi; }

# $1 is the command's name, $2 what installs it. Not asked for in a dry run.
must_have() { [ -n "${dry_run:-}" ] || command -v "$1" > /dev/null || fail "found no command $1, expected it on PATH: $2"; }

# $1 is a variable's name, $2 the flag that sets it.
must_be_set() { [ -n "${!1:-}" ] || fail "found no $2, expected a value: give $2=VALUE, or the environment variable $1"; }

# $1 is a flag, $2 its value, $3 the least that it may be.
must_be_count() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then fail "$1: found '$2', expected a whole number of $3 or more"; fi
}

# The value of --NAME among the trainer's arguments (after $1), nothing where it is not there.
argument() {
  local name=$1 given
  shift
  for given in "$@"; do
    case $given in "--$name="*) echo "${given#*=}"; return ;; esac
  done
}

# What every launcher needs of the trainer's arguments.
check_arguments() {
  (($#)) || fail "found no arguments for avsi-train, expected them after --: ${launcher:-${0##*/}} ... -- --config=NAME --workdir=DIR"
  [ -n "$(argument workdir "$@")" ] || fail "found no --workdir=DIR among the arguments after --, expected one: it is what a run resumes from"
}

# Whether the same command again is what mends exit code $1: pre-emption (143), watchdog (75), death by a signal (128 + its number).
# Not: 0 the training is finished; 1 a bug; 2 a mistake or a named fault; 126, 127 no such command; 130 Ctrl-C.
restartable() {
  case $1 in
    75) return 0 ;;
    130) return 1 ;;
    *) (($1 > 128 && $1 <= 192)) ;;
  esac
}

# The exit code that speaks for all of "$@": a named fault first, since nothing but a person mends it; then what starts again,
# since a process whose peers died may leave with any code; then whatever is left but 0.
worst_of() {
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

# Waits for the child $1 however often a signal interrupts that -> $waited, its exit code.
wait_for() {
  local before
  while :; do
    signalled='' before=${waited:-0} waited=0
    wait "$1" 2> /dev/null || waited=$? # 2>: bash tells of a child that was killed, so does the launcher
    ((waited != 127)) || waited=$before
    [ -n "$signalled" ] || return 0
  done
}

# A signal to the launcher: the trainer saves on SIGTERM, and is not started again.
pass_on() {
  asked=$1 signalled=1
  [ -z "${child:-}" ] || tell_to_stop
}

tell_to_stop() {
  [ "${told:-}" != "$child" ] || return 0
  told=$child
  kill -TERM "$child" 2> /dev/null || true
}

# Kills what is left of the session that $1 led: workers of a trainer that was killed keep pipes, locks and GPU memory.
end_group() { kill -KILL -- "-$1" 2> /dev/null || true; }

# Runs the command after $1 until it is done: again as long as that mends it, $1 times at most in a row of short ones.
# Returns its last exit code; 143 or 130 where this launcher was told to stop and the trainer has saved.
keep_running() {
  local limit=$1 again=0 began
  shift
  asked='' child='' told='' waited=0
  trap 'pass_on 143' TERM
  trap 'pass_on 130' INT
  while :; do
    began=$SECONDS
    "$@" &
    child=$!
    [ -z "$asked" ] || tell_to_stop
    wait_for "$child"
    end_group "$child"
    child=''
    if [ -n "$asked" ]; then
      ! restartable "$waited" || waited=$asked
      return "$waited"
    fi
    restartable "$waited" || return "$waited"
    ((SECONDS - began < ${AVSI_LONG_RUN_S:-600})) || again=0
    again=$((again + 1))
    if ((again > limit)); then
      say "left with code $waited, after $limit restarts in a row: look at train.log in the workdir; --restarts allows more"
      return "$waited"
    fi
    say "left with code $waited, starts again ($again of $limit)"
    pause "${AVSI_PAUSE_S:-5}"
    [ -z "$asked" ] || return "$asked"
  done
}

# Sleeps $1 seconds, or until a signal.
pause() {
  sleep "$1" &
  wait $! || true
}
