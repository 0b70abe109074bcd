# shellcheck shell=bash
# Shared code of the Slurm scripts, which source it. Set these variables in the environment of sbatch:
#
#   VENV=FOLDER             virtual environment whose Python runs
#   CONTAINER=IMAGE         image to run in, with $HOME and the current folder mounted. apptainer runs a .sif file, a
#                           folder or a URL such as docker://NAME; set APPTAINER_BIND=/data to mount other folders.
#                           pyxis and enroot run anything else, an image name such as REGISTRY#NAME:TAG or a .sqsh file;
#                           set CONTAINER_MOUNTS=/data:/data,/scratch:/scratch to mount other folders
#   ACCELERATE_CONFIG=FILE  accelerate config, which chooses the engine, such as launch/accelerate/deepspeed-zero2.yaml
#   PROCESSES_PER_NODE=N    default: the number of GPUs that Slurm allocates per node, or 1
#   MAX_RESTARTS=N          number of times that the launcher restarts the ranks within one job after it lost a rank;
#                           default: 3
#   MASTER_ADDR=HOST        host of the rendezvous; default: Slurm's name of the first node
#   MASTER_PORT=PORT        port of the rendezvous; default: a free port from 20000 to 29999
#   NODE_ADDR=HOST          address at which other nodes reach this node; default: Slurm's name of the node
#   NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME
#                           network interfaces, such as ib0, for GPUs (NCCL) and hosts (gloo). By default gloo uses the
#                           interface that the node's own name resolves to. On many clusters that is slow or loopback.
#                           `distgan doctor` measures both.
#   DRY_RUN=1               print the commands instead of running them; works without Slurm
#
# sbatch and srun pass the environment on to the ranks.

# Options with which pyxis makes srun start a step inside the container; empty for others.
pyxis=()
if [[ ${CONTAINER:-} == *.sif || ${CONTAINER:-} == *://* || -d ${CONTAINER:-} ]]; then
  python=(apptainer exec --nv "$CONTAINER" python)
elif [[ -n ${CONTAINER:-} ]]; then
  pyxis=(--container-image="$CONTAINER" --container-mounts="$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    --container-workdir="$PWD" --container-mount-home)
  # The batch script runs outside of the container, beside the step that trains. node.sh runs inside.
  python=(srun --overlap --nodes=1 --ntasks=1 ${SLURMD_NODENAME:+--nodelist="$SLURMD_NODENAME"} "${pyxis[@]}" python)
  # enroot mounts the GPU driver only if these say so. Images with CUDA have them, others do not.
  export NVIDIA_VISIBLE_DEVICES="${NVIDIA_VISIBLE_DEVICES:-all}"
  export NVIDIA_DRIVER_CAPABILITIES="${NVIDIA_DRIVER_CAPABILITIES:-compute,utility}"
elif [[ -n ${VENV:-} ]]; then
  python=("$VENV/bin/python")
else
  python=(python)
fi

# Launch ID of this start of the job. The run stores it in status.json.
if [[ -n ${SLURM_JOB_ID:-} ]]; then
  export PET_RDZV_ID="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
fi

# First port to try. It depends on the job ID, so that jobs on one node rarely try the same port.
default_port=$((20000 + ${SLURM_JOB_ID:-0} % 10000))

distgan() {
  "${python[@]}" -m distgan "$@"
}

# Print how the run stands. While its store does not answer (code 75), try again for more than a minute.
run_status() {
  local pause code
  for pause in 5 10 20 40 0; do
    code=0
    distgan status "$@" || code=$?
    ((code == 75)) || return "$code"
    sleep "$pause"
  done
  return "$code"
}

# Run a command, or print it if DRY_RUN is set.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

# Print the name of the job's first node.
first_node() {
  local names=${SLURM_JOB_NODELIST:-}
  if [[ -z $names ]]; then
    hostname
  elif command -v scontrol >/dev/null; then
    scontrol show hostnames "$names" | head -n 1
  else  # inside a container: take the first number of each bracket, as in node[01-04,07],login1
    while [[ $names =~ ^([^[]*)\[([0-9]+)[^]]*\](.*)$ ]]; do
      names=${BASH_REMATCH[1]}${BASH_REMATCH[2]}${BASH_REMATCH[3]}
    done
    echo "${names%%,*}"
  fi
}

# Run a distgan command with all processes of the job: start one launcher per node.
on_all_nodes() {
  # The batch script runs on the first node, which hosts the rendezvous, so it can find a free port there.
  if [[ -z ${MASTER_PORT:-} && -z ${DRY_RUN:-} ]]; then
    MASTER_PORT=$("${python[@]}" launch/slurm/port.py choose "$default_port")
    export MASTER_PORT
  fi
  # srun does not inherit --cpus-per-task from sbatch.
  run srun --ntasks-per-node=1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
    --kill-on-bad-exit=1 "${pyxis[@]}" launch/slurm/node.sh "$@"
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '# and node 0 of %s runs\n' "${SLURM_NNODES:-1}"
    launch/slurm/node.sh "$@"
  fi
}
