"""The job scripts in a real Slurm: whatever happens to a job, it ends with the weights of the undisturbed run."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.cluster.faults import measure, rows_if_any, trainer, wait_for_step
from tests.cluster.jobs import (
    CHECKPOINT,
    ENVIRONMENT,
    TRAINING,
    check_nothing_lost,
    check_same,
    make_recipe,
    submit,
)
from tests.cluster.slurm import Slurm, missing, wait_until
from tests.ranks import Job
from tests.runs import losses, recipe, status

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=missing() or ""),
    pytest.mark.usefixtures("no_job_left"),
]


def test_two_nodes(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), nodes="2")
    cluster.wait_for(job, "COMPLETED")
    assert status(tmp_path / "run")["world_size"] == 2
    assert "finished at step 100" in cluster.log(job)
    check_same(tmp_path / "run", undisturbed)


def test_warned_twice_in_a_row_no_step_is_lost(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    for step in (20, 40):
        wait_for_step(tmp_path / "run", step)
        measure("the warning before a time limit, twice in a row", tmp_path / "run", lambda: cluster.warn(job))
    cluster.wait_for(job, "COMPLETED")
    check_nothing_lost(cluster, job, tmp_path / "run", 2)
    check_same(tmp_path / "run", undisturbed)


def test_warned_before_the_first_step(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    cluster.wait_for(job, "RUNNING")
    wait_until(lambda: cluster.has_steps(job), "no step")
    cluster.warn(job)
    wait_until(lambda: cluster.restarts(job) == 1, "not requeued")
    cluster.wait_for(job, "COMPLETED")
    check_same(tmp_path / "run", undisturbed)


def test_warned_during_an_evaluation(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    evaluation = {"every": 20, "num_samples": 20_000, "batch_size": 16, "cache_dir": str(tmp_path / "cache")}
    config = recipe(tmp_path, digits, training=TRAINING | {"steps": 40}, checkpoint=CHECKPOINT, evaluation=evaluation)
    job = submit(cluster, config)
    wait_until(
        lambda: 20 in [row["step"] for row in rows_if_any(tmp_path / "run")] or in_evaluation(tmp_path), "no evaluation"
    )
    cluster.warn(job)
    wait_until(lambda: cluster.restarts(job) == 1, "not requeued")
    cluster.wait_for(job, "COMPLETED")
    assert "stop requested during the evaluation" in cluster.log(job)
    assert status(tmp_path / "run")["outcome"] == "finished"


def in_evaluation(folder: Path) -> bool:
    return (folder / "cache").exists()


def test_the_time_limit(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = make_recipe(tmp_path, digits)
    # The limit is the partition's, 2 minutes.
    options = ["--partition=short", "--nodes=1", "--cpus-per-task=2"]
    job = cluster.submit(
        "train.sbatch", str(config), "training.steps=1000000", options=options,
        **ENVIRONMENT, PROCESSES_PER_NODE="2",
    )  # fmt: skip
    wait_until(lambda: cluster.restarts(job) == 1, "not requeued")
    assert "warned and saved" in cluster.log(job)
    wait_until(lambda: "resuming from" in cluster.log(job), "not continued")
    check_nothing_lost(cluster, job, tmp_path / "run", 1)


def test_the_port_of_a_job_is_in_use(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = recipe(tmp_path, digits, training=TRAINING | {"steps": 4})
    options = ["--hold", "--nodes=2", "--cpus-per-task=2"]
    job = cluster.submit("train.sbatch", str(config), options=options, **ENVIRONMENT, PROCESSES_PER_NODE="1")
    port = 20_000 + int(job) % 10_000
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", port))
        server.listen()
        cluster.release(job)
        cluster.wait_for(job, "COMPLETED")
    assert status(tmp_path / "run")["world_size"] == 2
    assert f"port {port} of {socket.gethostname()} is in use by process {os.getpid()} " in cluster.log(job)
    assert cluster.restarts(job) == 0


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_signaled_by_scancel(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path, name: str) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    wait_for_step(tmp_path / "run", 20)
    measure(f"`scancel --signal={name}`", tmp_path / "run", lambda: cluster.signal(job, name))
    cluster.wait_for(job, "COMPLETED")
    check_nothing_lost(cluster, job, tmp_path / "run", 1)
    check_same(tmp_path / "run", undisturbed)


def test_preempted_twice_by_more_urgent_jobs(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), nodes="2")
    for step in (20, 40):
        wait_for_step(tmp_path / "run", step)
        measure("preempted by a more urgent job, twice in a row", tmp_path / "run", cluster.preempt)
    cluster.wait_for(job, "COMPLETED")
    check_nothing_lost(cluster, job, tmp_path / "run", 2)
    check_same(tmp_path / "run", undisturbed)


def test_preempted_while_starting(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    wait_until(lambda: cluster.has_steps(job), "no step")
    cluster.preempt()
    wait_until(lambda: cluster.restarts(job) == 1, "not requeued")
    cluster.wait_for(job, "COMPLETED")
    check_same(tmp_path / "run", undisturbed)


def test_canceled_for_good(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), "training.steps=1000000")
    wait_for_step(tmp_path / "run", 10)
    cluster.cancel(job)
    assert cluster.state(job) == "CANCELLED"
    assert cluster.restarts(job) == 0


def test_a_run_that_its_user_stops_stays_stopped(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), "training.steps=1000000")
    wait_for_step(tmp_path / "run", 10)
    Job(1, ["stop", str(tmp_path / "run")]).wait()
    cluster.wait_for(job, "COMPLETED")
    assert "train.sbatch: preempted at step" in cluster.log(job)
    assert cluster.restarts(job) == 0


@pytest.mark.parametrize("restarts", [3, 0])
def test_a_rank_is_killed(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path, restarts: int) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), restarts=restarts)
    wait_for_step(tmp_path / "run", 20)
    name = (
        "a rank is killed (`kill -9`), and the launcher starts all again"
        if restarts
        else "a rank is killed, and Slurm queues the job again"
    )
    measure(name, tmp_path / "run", trainer(f"SLURM_JOB_ID={job}", 1).kill)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.restarts(job) == (0 if restarts else 1)
    assert "for rank 1 on " in cluster.log(job)
    check_same(tmp_path / "run", undisturbed)


def test_all_processes_of_a_node_are_killed(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits), nodes="2")
    wait_for_step(tmp_path / "run", 20)
    rank = trainer(f"SLURM_JOB_ID={job}", 1)
    launcher = rank.parent()
    assert launcher is not None

    def fault() -> None:
        launcher.kill()
        rank.kill()

    measure("all processes of one of two nodes are killed", tmp_path / "run", fault)
    cluster.wait_for(job, "COMPLETED")
    assert cluster.restarts(job) == 1
    assert "for rank 1 on " in cluster.log(job)
    check_same(tmp_path / "run", undisturbed)


def test_a_job_that_fails_by_itself_does_not_loop(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = recipe(
        tmp_path, digits, discriminator={"optimizer": {"learning_rate": 1e30}, "normalization": "none"},
        training={"steps": 200, "batch_size": 16, "max_skipped_updates": 5},
        monitoring={"every": 5}, checkpoint={"every": 1, "keep": 2},
    )  # fmt: skip
    job = submit(cluster, config)
    assert cluster.wait_for(job, "FAILED", "COMPLETED") == "FAILED"
    assert cluster.restarts(job) == 0
    assert "train.sbatch: failed:" in cluster.log(job)
    assert status(tmp_path / "run")["restarts"] == 0


def test_what_is_killed_without_progress_does_not_loop(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = recipe(tmp_path, digits, training=TRAINING | {"steps": 1_000_000}, checkpoint={"every": 1_000_000})
    job = submit(cluster, config, restarts=0)
    wait_until(lambda: len(rows_if_any(tmp_path / "run")) > 1, "does not train")
    trainer(f"SLURM_JOB_ID={job}", 0).send_signal(signal.SIGKILL)
    cluster.wait_for(job, "FAILED")
    assert cluster.restarts(job) == 0
    assert "lost contact" in cluster.log(job)


def test_requeued_without_a_warning(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    wait_for_step(tmp_path / "run", 20)
    measure("`scontrol requeue`, without a warning", tmp_path / "run", lambda: cluster.requeue(job))
    cluster.wait_for(job, "COMPLETED")
    check_same(tmp_path / "run", undisturbed)


def test_a_node_goes_down(tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path) -> None:
    job = submit(cluster, make_recipe(tmp_path, digits))
    wait_for_step(tmp_path / "run", 20)
    node = cluster.show(job)["NodeList"]
    try:
        measure(
            "the job's node goes down, and the job continues on another",
            tmp_path / "run",
            lambda: cluster.set_node(node, "DOWN"),
        )
        cluster.wait_for(job, "COMPLETED")
    finally:
        cluster.set_node(node, "RESUME")
    check_same(tmp_path / "run", undisturbed)


def test_fewer_and_more_nodes_continue_the_same_stream(
    tmp_path: Path, digits: Path, cluster: Slurm, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    job = submit(cluster, make_recipe(tmp_path, digits), "training.steps=1000000", nodes="1-2")
    wait_for_step(run, 20)
    assert status(run)["world_size"] == 2
    try:
        cluster.set_node("n2", "DOWN")
        wait_for_step(run, 50)
        assert status(run)["world_size"] == 1
    finally:
        cluster.set_node("n2", "RESUME")
    wait_until(lambda: "State=IDLE " in cluster.control("show", "node", "n2"), "n2 does not come up")
    cluster.warn(job)
    wait_until(lambda: cluster.log(job).count("(saved on ") == 2, "does not go on")
    wait_for_step(run, 100)
    assert status(run)["world_size"] == 2
    for step, values in losses(undisturbed).items():
        if step <= 60:
            assert losses(run)[step] == pytest.approx(values, rel=1e-2, abs=1e-3)


def test_a_second_job_of_a_run_fails_and_the_first_goes_on(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    config = make_recipe(tmp_path, digits)
    first = submit(cluster, config, "training.steps=1000000")
    wait_for_step(tmp_path / "run", 10)
    second = submit(cluster, config, "training.steps=1000000", restarts=0)
    cluster.wait_for(second, "FAILED")
    assert cluster.restarts(second) == 0
    assert "another job is training there" in cluster.log(second)
    assert "train.sbatch: failed: unstarted, see above" in cluster.log(second)
    assert cluster.state(first) == "RUNNING"
    assert status(tmp_path / "run")["restarts"] == 0


def test_an_evaluation_that_never_ends_in_time_does_not_loop(tmp_path: Path, digits: Path, cluster: Slurm) -> None:
    evaluation = {"every": 20, "num_samples": 10_000_000, "batch_size": 16, "cache_dir": str(tmp_path / "cache")}
    config = recipe(tmp_path, digits, training=TRAINING, checkpoint=CHECKPOINT, evaluation=evaluation)
    job = submit(cluster, config)
    for requeues in (1, 2):
        wait_until(lambda n=requeues: cluster.log(job).count("generated samples") == n, "no evaluation")
        cluster.warn(job)
        if requeues == 1:
            wait_until(lambda: cluster.restarts(job) == 1, "not requeued")
    cluster.wait_for(job, "FAILED")
    assert cluster.restarts(job) == 1
    assert "no step between two warnings; raise --time" in cluster.log(job)
