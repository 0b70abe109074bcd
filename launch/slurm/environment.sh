# shellcheck shell=bash
# Sourced by the scripts beside it. What can be set in the environment that sbatch is called in:
#
#   VENV=FOLDER             run the Python of this virtual environment
#   CONTAINER=IMAGE         run in this image by apptainer (folders besides $HOME and this one: APPTAINER_BIND=/data)
#   ACCELERATE_CONFIG=FILE  the engine, such as launch/accelerate/deepspeed-zero2.yaml
#   PROCESSES_PER_NODE=N    default: the GPUs that Slurm gives a node, or one process
#   MAX_RESTARTS=N          how often the ranks are started again within the job when one is lost; default 3
#   MASTER_ADDR, MASTER_PORT, NODE_ADDR
#                           where the ranks meet, and how the others reach a node; default: Slurm's name of the first
#                           node, a port from 20000 to 29999 that is free there, and Slurm's name of each node
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                           the network interfaces, such as ib0, that GPUs (NCCL) and hosts (gloo) talk over. gloo takes
#                           the one that the node's own name resolves to, which on many clusters is a slow one or even
#                           loopback; `distgan doctor` measures both
#   DRY_RUN=1               print the commands instead; needs no Slurm
#
# All of them also reach the ranks, because sbatch and srun pass the environment on.

if [[ -n ${CONTAINER:-} ]]; then
  python=(apptainer exec --nv "$CONTAINER" python)
elif [[ -n ${VENV:-} ]]; then
  python=("$VENV/bin/python")
else
  python=(python)
fi

# torchrun's name for this start of the job, which the run keeps in its status.json.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  export PET_RDZV_ID="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
fi

# The first that is tried; another job has another.
default_port=$((20000 + ${SLURM_JOB_ID:-0} % 10000))

distgan() {
  "${python[@]}" -m distgan "$@"
}

# Run a command, or show it.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Run a distgan command on all processes of the job: one launcher a node.
on_all_nodes() {
  # A batch script runs on the first node, so that it can see which port is free there.
  if [[ -z ${MASTER_PORT:-} && -z ${DRY_RUN:-} ]]; then
    MASTER_PORT=$("${python[@]}" launch/slurm/port.py choose "$default_port")
    export MASTER_PORT
  fi
  # The cores of a task are not passed on from sbatch to srun by themselves.
  run srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --kill-on-bad-exit=1 launch/slurm/node.sh "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '# and node 0 of %s runs\n' "${SLURM_NNODES:-1}"
    launch/slurm/node.sh "$@"
  fi
}
