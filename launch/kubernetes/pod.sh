#!/usr/bin/env bash
# Entry point of a training pod: `pod.sh train RECIPE [key=value...]`. PET_ variables set the options of torchrun.
#
# Exit codes:
#   0    the run is finished, has diverged (training.on_divergence), or `distgan stop` stopped it
#   42   the run failed, or the command is wrong; do not restart
#   138  restart; the Kubeflow operator restarts on codes from 128 on
set -euo pipefail

# Restarted ranks would find the addresses of the earlier ranks in a shared store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# In an Indexed Job, pod 0 hosts the rendezvous store.
if [[ -n ${JOB_COMPLETION_INDEX:-} ]]; then
  export PET_RDZV_CONF="is_host=$((JOB_COMPLETION_INDEX == 0)),read_timeout=600,join_timeout=600"
fi

# Kubeflow Trainer sets the address of the first node, which torchrun reads for its static rendezvous only.
if [[ -n ${PET_MASTER_ADDR:-} && -z ${PET_RDZV_ENDPOINT:-} ]]; then
  export PET_RDZV_ENDPOINT="$PET_MASTER_ADDR:${PET_MASTER_PORT:-29400}"
fi

# Seconds that ranks get to save a checkpoint, out of the 120 s of grace that the manifests set.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

torchrun -m distgan "$@" &
launcher=$!
# When this pod is evicted, all ranks of the run save a checkpoint and exit together.
trap 'kill -TERM "$launcher"' TERM
code=0
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done

# Code 75: the store of the run does not answer. That does not say how the run ended, so restart in the end.
trap 'exit 138' TERM
for pause in 5 10 20 40 60 0; do
  code_of_status=0
  standing=$(distgan status ${PET_RDZV_ID:+--launch "$PET_RDZV_ID"} "${@:2}") || code_of_status=$?
  case $code_of_status in
    0) break ;;
    75) sleep "$pause" ;;
    *) exit 42 ;;
  esac
done
echo "pod.sh: $standing"
case $standing in
  finished* | diverged* | preempted*"stop request") exit "$code" ;;
  failed*) exit 42 ;;
  *) exit 138 ;;
esac
