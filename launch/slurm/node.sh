#!/usr/bin/env bash
# The launcher of one node, started there by srun: `srun --ntasks-per-node=1 launch/slurm/node.sh doctor`.
# Its arguments are those of distgan. environment.sh explains the settings.
set -euo pipefail
# shellcheck source=launch/slurm/environment.sh
source launch/slurm/environment.sh

nodes=${SLURM_NNODES:-1}
node=${SLURM_NODEID:-0}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
if [[ -z ${MASTER_ADDR:-} ]]; then
  MASTER_ADDR=$(hostname)
  if [[ -n ${SLURM_JOB_NODELIST:-} ]]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  fi
fi
MASTER_PORT=${MASTER_PORT:-$default_port}
if ((node == 0)) && [[ -z ${DRY_RUN:-} ]]; then
  "${python[@]}" launch/slurm/port.py check "$MASTER_PORT"
fi

restarts=0
if [[ $1 == train ]]; then
  restarts=${MAX_RESTARTS:-3}
fi

# The rendezvous is torchrun's, below accelerate: PET_ variables are its options. A restart must not find the addresses
# that the ranks before it left in the rendezvous' own store, or it hangs; and one node, named here, holds that store.
export PET_RDZV_ENDPOINT="$MASTER_ADDR:$MASTER_PORT"
export PET_LOCAL_ADDR="${NODE_ADDR:-${SLURMD_NODENAME:-$(hostname)}}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long ranks may take to save when a launcher is asked to leave; Slurm ends it sooner if it must.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# The processes that it starts have their own; these would be taken for theirs.
unset MASTER_ADDR MASTER_PORT

# `scancel --signal=USR1` reaches launchers and ranks alike. Ranks save and leave; a launcher would die of it.
trap '' USR1

run exec "${python[@]}" -m accelerate.commands.launch \
  --config_file "${ACCELERATE_CONFIG:-launch/accelerate/multi-node.yaml}" \
  --num_machines "$nodes" --num_processes "$((nodes * per_node))" --machine_rank "$node" \
  --main_process_ip "${PET_RDZV_ENDPOINT%:*}" --main_process_port "${PET_RDZV_ENDPOINT##*:}" \
  --rdzv_backend c10d --rdzv_conf "is_host=$((node == 0)),read_timeout=600,join_timeout=600" \
  --max_restarts "$restarts" -m distgan "$@"
