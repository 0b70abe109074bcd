#!/usr/bin/env bash
# Launcher of one node, started by srun: `srun --ntasks-per-node=1 launch/slurm/node.sh doctor`.
# Its arguments are those of distgan. environment.sh lists the environment variables to set.
set -euo pipefail
# shellcheck source=launch/slurm/environment.sh
source launch/slurm/environment.sh

nodes=${SLURM_NNODES:-1}
node=${SLURM_NODEID:-0}
per_node=${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
if ((${#pyxis[@]})); then
  python=(python)  # srun has started this script inside the container
fi
MASTER_ADDR=${MASTER_ADDR:-$(first_node)}
MASTER_PORT=${MASTER_PORT:-$default_port}
if ((node == 0)) && [[ -z ${DRY_RUN:-} ]]; then
  "${python[@]}" launch/slurm/port.py check "$MASTER_PORT"
fi

restarts=0
if [[ $1 == train ]]; then
  restarts=${MAX_RESTARTS:-3}
fi

# accelerate launch runs torchrun, which reads its options from PET_ variables. Restarted ranks would find the addresses
# of the earlier ranks in a shared store, and hang.
export PET_RDZV_ENDPOINT="$MASTER_ADDR:$MASTER_PORT"
export PET_LOCAL_ADDR="${NODE_ADDR:-${SLURMD_NODENAME:-$(hostname)}}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Seconds that ranks get to save a checkpoint after the launcher receives SIGTERM. Slurm may kill them earlier.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# torchrun sets both for its ranks. It must not pass these values on instead.
unset MASTER_ADDR MASTER_PORT

# `scancel --signal=USR1` signals launchers and ranks. Ranks save a checkpoint and exit. A launcher would die, so it
# ignores the signal.
trap '' USR1

run exec "${python[@]}" -m accelerate.commands.launch \
  --config_file "${ACCELERATE_CONFIG:-launch/accelerate/multi-node.yaml}" \
  --num_machines "$nodes" --num_processes "$((nodes * per_node))" --machine_rank "$node" \
  --main_process_ip "${PET_RDZV_ENDPOINT%:*}" --main_process_port "${PET_RDZV_ENDPOINT##*:}" \
  --rdzv_backend c10d --rdzv_conf "is_host=$((node == 0)),read_timeout=600,join_timeout=600" \
  --max_restarts "$restarts" -m distgan "$@"
