"""Eight ranks on whatever cores there are, one of them killed again and again: the run ends as if none had been."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.faults import rows_if_any, trainer
from tests.ranks import Job, free_port
from tests.runs import differing, recipe, status, tensors

ROOT = Path(__file__).parents[2]
RANKS, STEPS = 8, 500

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3500)]


def test_500_steps_with_a_rank_killed_every_20_to_60_seconds(tmp_path: Path, digits: Path) -> None:
    training = {"steps": STEPS, "batch_size": 32, "critic_steps": 2, "deterministic": True}
    config = recipe(tmp_path, digits, training=training, checkpoint={"every": 5, "keep": 3})
    undisturbed = tmp_path / "undisturbed"
    assert Job(RANKS, ["train", str(config), f"run_dir={undisturbed}"]).wait(1200) == [0] * RANKS

    chance = random.Random(0)
    token = f"DISTGAN_SOAK={os.getpid()}"
    settings = {
        "VENV": str(Path(sys.executable).parents[1]), "MASTER_ADDR": "127.0.0.1", "NODE_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "PROCESSES_PER_NODE": str(RANKS), "MAX_RESTARTS": "1000",
        "OMP_NUM_THREADS": "1", "DISTGAN_SOAK": str(os.getpid()),
    }  # fmt: skip
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    kills = 0
    with open(tmp_path / "log", "wb") as log:
        launcher = subprocess.Popen(
            ["launch/slurm/node.sh", "train", str(config)], cwd=ROOT, stdout=log, stderr=log, env=inherited | settings
        )
        try:
            while launcher.poll() is None:
                seen = len(rows_if_any(tmp_path / "run"))
                end = time.monotonic() + chance.uniform(20, 60)
                while launcher.poll() is None and time.monotonic() < end:
                    time.sleep(0.2)
                # While the ranks still start, a kill would only start them again, and on slow machines for ever.
                if len(rows_if_any(tmp_path / "run")) > seen:
                    # They may have ended by themselves just now.
                    with contextlib.suppress(AssertionError):
                        trainer(token, chance.randrange(RANKS)).kill()
                        kills += 1
        finally:
            launcher.kill()
    assert launcher.returncode == 0, (tmp_path / "log").read_text()[-4000:]
    assert kills >= 2
    assert status(tmp_path / "run")["restarts"] == kills
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed, STEPS)) == []
