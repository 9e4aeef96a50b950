#!/usr/bin/env bash
# Runs a training on a TPU slice of a GKE cluster: fills in launch/jobset.yaml and applies it with kubectl.
#
#   launch/gke.sh apply  --name=avsi --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 -- ARGS
#   launch/gke.sh status --name=avsi         the job set and its pods
#   launch/gke.sh logs   --name=avsi         output of all pods, followed until they end
#   launch/gke.sh delete --name=avsi         stops the training, which saves; the nodes stay
#
# ARGS are those of avsi-train: --config=av_mtl_s2s --workdir=gs://BUCKET/run --config.data_dir=gs://BUCKET/data
#
# --image=IMAGE     built from launch/Dockerfile (or AVSI_IMAGE)
# --accelerator=A   tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v4-podslice, tpu-v5p-slice or tpu7x (or AVSI_ACCELERATOR)
# --topology=T      chips along each axis, 4x4 or 2x2x4, as in the node pool (or AVSI_TOPOLOGY)
# --chips_per_host=N   4 (8 for 2x4 of v5e and v6e, all for smaller ones); number of hosts: chips of the topology / N
# --namespace=NS    (kubectl's current one)
# --service_account=NAME   Kubernetes service account with access to the buckets (default)
# --restarts=N      restart after exit codes 143, 75, death by a signal and lost nodes, at most N times (100)
# --spot            use spot nodes
# --dry_run         only print: apply the filled-in YAML, the others their commands
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' image=${AVSI_IMAGE:-} accelerator=${AVSI_ACCELERATOR:-} topology=${AVSI_TOPOLOGY:-} chips_per_host='' namespace=''
service_account=default restarts=100 spot='' dry_run=''
task=${1:-}
(($# == 0)) || shift
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --accelerator=*) accelerator=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips_per_host=*) chips_per_host=${1#*=} ;;
    --namespace=*) namespace=${1#*=} ;;
    --service_account=*) service_account=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --spot) spot=1 ;;
    --dry_run) dry_run=1 ;;
    --help | -h) help_of "$0" ;;
    --) shift; break ;;
    *) fail "found '$1', expected a flag of ${0##*/} (--help lists them), those of avsi-train after --" ;;
  esac
  shift
done

# $1: a flag, $2: its value, $3: the regular expression it must match, $4: its description.
require_match() { [[ $2 =~ $3 ]] || fail "$1: found '$2', expected $4"; }

# Number of hosts of the slice, and of chips per host -> `hosts`, `chips_per_host`.
count_hosts() {
  local side sides chips=1 axes=3
  case $accelerator in
    tpu-v5-lite-podslice | tpu-v6e-slice) axes=2 ;;
    tpu-v4-podslice | tpu-v5p-slice | tpu7x) ;;
    *) fail "--accelerator: found '$accelerator', expected tpu-v5-lite-podslice, tpu-v6e-slice, tpu-v4-podslice, tpu-v5p-slice or tpu7x" ;;
  esac
  require_match --topology "$topology" '^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$' "chips along each axis, such as 4x4 or 2x2x4"
  IFS=x read -ra sides <<< "$topology"
  ((${#sides[@]} == axes)) || fail "--topology: found '$topology', expected $axes axes for $accelerator"
  for side in "${sides[@]}"; do chips=$((chips * side)); done
  if [ -z "$chips_per_host" ]; then
    chips_per_host=4
    if ((axes == 2 && chips == 8)); then chips_per_host=8; fi
    ((chips >= 4)) || chips_per_host=$chips
  fi
  require_count --chips_per_host "$chips_per_host" 1
  ((chips % chips_per_host == 0)) ||
    fail "--chips_per_host: found $chips_per_host, expected a divisor of the $chips chips of --topology=$topology"
  hosts=$((chips / chips_per_host))
}

# "$@" as a YAML list of literal strings: $(...) is escaped, since Kubernetes would replace it by a variable.
# shellcheck disable=SC2016
quoted_list() {
  local text list=''
  for text in "$@"; do
    [[ $text != *[[:cntrl:]]* ]] || fail "found a line break or another control character in ${text@Q}, expected none in an argument"
    text=${text//\\/\\\\}
    text=${text//'$('/'$$('}
    list+=", \"${text//\"/\\\"}\""
  done
  echo "[${list#, }]"
}

# The trainer's arguments for every pod -> `arguments`.
check_run() {
  local field value
  check_arguments "$@"
  for field in workdir config.data_dir; do
    value=$(argument "$field" "$@")
    [[ $value == gs://?* ]] || fail "--$field: found '$value', expected gs://BUCKET/FOLDER: a pod's disk is deleted with the pod"
  done
  arguments=("$@")
  [ -n "$(argument cache_dir "$@")" ] || arguments+=(--cache_dir=/cache)
  if ((hosts > 1)); then arguments+=(--distributed=on "--num_processes=$hosts"); fi
}

# shellcheck disable=SC2016 # ${...} is in jobset.yaml
filled_in() {
  local text nodes list
  list=$(quoted_list "${arguments[@]}") || exit
  nodes="{cloud.google.com/gke-tpu-accelerator: $accelerator, cloud.google.com/gke-tpu-topology: \"$topology\""
  [ -z "$spot" ] || nodes+=', cloud.google.com/gke-spot: "true"'
  text=$(< "$here/jobset.yaml")
  text=${text//'${NAME}'/"$name"}
  text=${text//'${RESTARTS}'/"$restarts"}
  text=${text//'${HOSTS}'/"$hosts"}
  text=${text//'${CHIPS}'/"$chips_per_host"}
  text=${text//'${SERVICE_ACCOUNT}'/"$service_account"}
  text=${text//'${NODES}'/"$nodes}"}
  text=${text//'${IMAGE}'/"$image"}
  text=${text//'${ARGUMENTS}'/"$list"}
  echo "$text"
}

case $task in
  apply | status | logs | delete) ;;
  --help | -h) help_of "$0" ;;
  *) fail "found '$task', expected one of apply, status, logs, delete (see --help)" ;;
esac
label='lower-case letters, digits and - between them'
[ -n "$name" ] || fail "found no --name, expected one: --name=NAME, of $label"
require_match --name "$name" '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' "at most 40 of $label, a letter first"
require_match --namespace "$namespace" '^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)?$' "$label"
cluster=(kubectl ${namespace:+"--namespace=$namespace"})
require_command kubectl "gcloud components install kubectl, then gcloud container clusters get-credentials CLUSTER"
case $task in
  apply)
    require_value image --image
    require_value accelerator --accelerator
    require_value topology --topology
    require_count --restarts "$restarts" 0
    require_match --image "$image" '^[A-Za-z0-9][A-Za-z0-9._/:@-]*$' "an image such as REGION-docker.pkg.dev/PROJECT/REPOSITORY/avsi_jax:TAG"
    require_match --service_account "$service_account" '^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$' "$label"
    count_hosts
    check_run "$@"
    filled=$(filled_in)
    if [ -n "$dry_run" ]; then echo "$filled"; else "${cluster[@]}" apply --filename=- <<< "$filled"; fi
    ;;
  status) run "${cluster[@]}" get "jobset/$name" && run "${cluster[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide ;;
  logs)
    run "${cluster[@]}" logs "--selector=jobset.sigs.k8s.io/jobset-name=$name" --prefix --follow --tail=100 --max-log-requests=256
    ;;
  delete) run "${cluster[@]}" delete "jobset/$name" --wait ;;
esac
