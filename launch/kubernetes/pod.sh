#!/usr/bin/env bash
# What a pod runs: `pod.sh train RECIPE [key=value...]`. Options of torchrun are in the environment, as PET_ variables.
# Its exit code tells Kubernetes what to do: 0 is done, 42 is not to be tried again, 138 is to be started again (the
# Kubeflow operator tries again from 128 on).
set -euo pipefail

# Restarted ranks must not find the addresses of those before them; and one pod holds the rendezvous.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [[ -n ${JOB_COMPLETION_INDEX:-} ]]; then
  export PET_RDZV_CONF="is_host=$((JOB_COMPLETION_INDEX == 0)),read_timeout=600,join_timeout=600"
fi

# How long ranks may take to save, of the 120 s that the manifests give a pod.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110}"

torchrun -m distgan "$@" &
launcher=$!
# The eviction of one pod: all ranks save and leave together.
trap 'kill -TERM "$launcher"' TERM
code=0
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done

standing=$(distgan status ${PET_RDZV_ID:+--launch "$PET_RDZV_ID"} "${@:2}") || exit 42
echo "pod.sh: $standing"
case $standing in
  finished* | preempted*"stop request") exit "$code" ;;
  failed*) exit 42 ;;
  *) exit 138 ;;
esac
