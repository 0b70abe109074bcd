"""Training jobs of two ranks for a Slurm of the tests, and what they must leave."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from tests.cluster.slurm import Slurm
from tests.runs import differing, recipe, rows, tensors

STEPS = 100


CHECKPOINT = {"every": 10, "keep": 100}


ENVIRONMENT = {
    "VENV": str(Path(sys.executable).parents[1]),
    # Both nodes are this machine.
    "MASTER_ADDR": "127.0.0.1",
    "NODE_ADDR": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}


TRAINING = {"steps": STEPS, "batch_size": 16, "critic_steps": 2, "deterministic": True}


def submit(cluster: Slurm, config: Path, *arguments: str, nodes: str = "1", restarts: int = 3) -> str:
    """A training job of two processes on one node, or one on each of two."""
    environment = ENVIRONMENT | {
        "PROCESSES_PER_NODE": "2" if nodes == "1" else "1",
        "MAX_RESTARTS": str(restarts),
    }
    options = [f"--nodes={nodes}", "--cpus-per-task=2"]
    return cluster.submit("train.sbatch", str(config), *arguments, options=options, **environment)


def make_recipe(folder: Path, shards: Path) -> Path:
    return recipe(folder, shards, training=TRAINING, checkpoint=CHECKPOINT)


def check_same(run: Path, undisturbed: Path) -> None:
    assert differing(tensors(run, STEPS), tensors(undisturbed, STEPS)) == []
    assert [row["step"] for row in rows(run)] == [row["step"] for row in rows(undisturbed)]


def check_nothing_lost(cluster: Slurm, job: str, run: Path, warnings: int) -> None:
    """After each warning the job went on from the very step that it had reached."""
    assert cluster.restarts(job) == warnings
    log = cluster.log(job)
    saved = [int(step) for step in re.findall(r"warned and saved at step (\d+);", log)]
    assert len(saved) == warnings
    for step in saved:
        assert f"resuming from {run}/checkpoints/step-{step:08d}" in log
