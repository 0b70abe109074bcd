"""The job scripts of sweeps and evaluations in a real Slurm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.faults import wait_for_step
from tests.cluster.jobs import (
    CHECKPOINT,
    ENVIRONMENT,
    TRAINING,
)
from tests.cluster.slurm import Slurm, missing, wait_until
from tests.runs import recipe, status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.usefixtures("no_job_left"),
]


def test_a_sweep(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = recipe(tmp_path, digits, training=TRAINING | {"steps": 12})
    (tmp_path / "sweep.txt").write_text(f"seed=1\nseed=2 run_dir={tmp_path / 'two'}\n")
    job = cluster.submit(
        "array-sweep.sbatch", str(config), str(tmp_path / "sweep.txt"), "training.steps=6", options=["--array=1-2"],
        **ENVIRONMENT,
    )  # fmt: skip
    for folder in (tmp_path / "sweep" / "1", tmp_path / "two"):
        wait_until(lambda folder=folder: (folder / "status.json").exists(), f"{folder} does not start")
        wait_until(lambda folder=folder: status(folder)["outcome"] == "finished", f"{folder} does not finish")
        assert status(folder)["step"] == 6
    cluster.wait_for(job, "COMPLETED")


def test_a_warned_task_of_a_sweep_leaves_the_others_alone(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = recipe(tmp_path, digits, training=TRAINING | {"steps": 1_000_000}, checkpoint=CHECKPOINT)
    (tmp_path / "sweep.txt").write_text("seed=1\nseed=2\n")
    array = cluster.submit(
        "array-sweep.sbatch", str(config), str(tmp_path / "sweep.txt"), options=["--array=1-2"], **ENVIRONMENT
    )
    runs = [tmp_path / "sweep" / number for number in ("1", "2")]
    for run in runs:
        wait_for_step(run, 10)
    # Its number is that of the whole array.
    [last] = [task for task in ("1", "2") if cluster.show(f"{array}_{task}")["JobId"] == array]
    cluster.warn(f"{array}_{last}")
    wait_until(lambda: cluster.restarts(f"{array}_{last}") == 1, "not requeued")
    wait_until(lambda: status(runs[int(last) - 1])["restarts"] == 1, "not continued")
    other = str(3 - int(last))
    assert cluster.restarts(f"{array}_{other}") == 0
    assert status(runs[int(other) - 1])["restarts"] == 0
    assert cluster.state(f"{array}_{other}") == "RUNNING"


def test_an_evaluation(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = cluster.submit(
        "evaluate.sbatch", str(undisturbed), "evaluation.num_samples=128", options=["--nodes=2"],
        **ENVIRONMENT,
        DISTGAN_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    cluster.wait_for(job, "COMPLETED")
    assert '"fid' in cluster.log(job)
