"""A real Slurm of the test's own: controller, authentication and nodes as processes, all they keep in one folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 300.0
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "munged")


def missing() -> str | None:
    """Why there can be no Slurm here; None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """Two nodes, n1 and n2, of two cores each. Enter it with `slurm`.

    Args:
        folder: configuration, state and logs of all daemons.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        self._configure()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        # All that munge keeps for the whole machine elsewhere is in the folder, so that another one is not disturbed.
        kept = [f"--{what}={self.folder}/munge.{what}" for what in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemon("munged", "--force", "--foreground", f"--key-file={key}", *kept)
        wait_until(lambda: (self.folder / "munge.socket").exists(), "munged does not start")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until both nodes are up, and free."""
        wait_until(lambda: self.control("show", "node").count("State=IDLE ") == 2, "the nodes do not come up")

    def stop(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
            daemon.wait()

    def submit(self, script: str, *arguments: str, options: list[str] | None = None, **environment: str) -> str:
        """The number of a new job of a script of launch/slurm, submitted as a user would, from the root."""
        log = self.folder / "job-%j.log"
        command = ["sbatch", "--parsable", f"--output={log}", *(options or []), f"launch/slurm/{script}", *arguments]
        result = subprocess.run(
            command, cwd=ROOT, env={**self.environment, **environment}, capture_output=True, text=True, timeout=30
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, FAILED, ..."""
        return self.show(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.show(job)["Restarts"])

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        answer = ""

        def answers() -> bool:
            nonlocal answer
            answer = self.control("-o", "show", "job", job)
            return bool(answer)

        wait_until(answers, "Slurm does not answer")
        return dict(word.split("=", 1) for word in answer.split() if "=" in word)

    def has_steps(self, job: str) -> bool:
        """Whether an srun of the job has started."""
        return bool(self._run("squeue", "--steps", "--noheader", f"--jobs={job}").strip())

    def warn(self, job: str) -> None:
        """What Slurm does some time before a time limit, where the user has asked for `--signal=B:USR1@...`."""
        self._run("scancel", "--batch", "--signal=USR1", job)

    def signal(self, job: str, name: str) -> None:
        """A signal to all processes of the job but the batch script."""
        self._run("scancel", f"--signal={name}", job)

    def cancel(self, job: str) -> None:
        self._run("scancel", job)
        wait_until(lambda: not self._run("squeue", "--noheader", f"--jobs={job}").strip(), f"job {job} stays")

    def preempt(self) -> None:
        """A job that is more urgent takes all nodes for a moment."""
        self._run("sbatch", "--partition=urgent", "--nodes=2", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true")

    def set_node(self, node: str, state: str) -> None:
        self.control("update", f"NodeName={node}", f"State={state}", "Reason=test")

    def release(self, job: str) -> None:
        """Let a job start that was submitted with `--hold`."""
        self.control("release", job)

    def requeue(self, job: str) -> None:
        self.control("requeue", job)

    def cancel_all(self) -> None:
        """Leave no job behind."""
        for job in self._run("squeue", "--noheader", "--format=%A").split():
            # Without a chance to save, which only training asks for.
            self._run("scancel", "--full", "--signal=KILL", job)
            self._run("scancel", job)
        wait_until(lambda: not self._run("squeue", "--noheader").strip(), "jobs stay")

    def log(self, job: str) -> str:
        path = self.folder / f"job-{job}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, job: str, *states: str) -> str:
        """The state of a job once it is one of these. What the job said is in the failure otherwise."""
        found = ""

        def is_one() -> bool:
            nonlocal found
            found = self.state(job)
            return found in (*states, "FAILED", "CANCELLED", "TIMEOUT")

        wait_until(is_one, f"job {job} is not {' or '.join(states)}")
        assert found in states, f"job {job} is {found}:\n{self.log(job)[-4000:]}"
        return found

    def _configure(self) -> None:
        host = socket.gethostname()
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir(parents=True)
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": free_port(),
            "AuthType": "auth/munge",
            "CredType": "cred/munge",
            # A requeued job may start again only when the credential of its last start has expired.
            "AuthInfo": f"socket={self.folder}/munge.socket,cred_expire=5",
            "MpiDefault": "none",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "JobCompType": "jobcomp/none",
            "SwitchType": "switch/none",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "sched_interval=2,batch_sched_delay=1",
            # Jobs of the partition `urgent` send those of `main` away.
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
            "SlurmUser": "root",
            "SlurmdUser": "root",
            # Set down, a node stays so until it is resumed.
            "ReturnToService": 1,
            "KillWait": 5,
            "SlurmdTimeout": 20,
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
        }
        lines = [f"{key}={value}" for key, value in settings.items()]
        for node in ("n1", "n2"):
            where = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()}"
            lines.append(f"NodeName={node} {where} CPUs=2 State=UNKNOWN")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60")
        lines.append("PartitionName=short Nodes=ALL MaxTime=2 State=UP PriorityTier=1")
        lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _daemon(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.log", "ab") as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(process)

    def control(self, *arguments: str) -> str:
        return self._run("scontrol", *arguments)

    def _run(self, *command: str) -> str:
        # A controller that is busy starting answers late or not at all; callers ask again.
        try:
            return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=20).stdout
        except subprocess.TimeoutExpired:
            return ""


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """A Slurm that is gone afterwards, with all that its jobs have started."""
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        with contextlib.suppress(AssertionError):
            cluster.cancel_all()
        cluster.stop()
        _kill_all_with(f"SLURM_CONF={cluster.folder / 'slurm.conf'}")


def _kill_all_with(variable: str) -> None:
    """Kill what still has this in its environment: descendants of the daemons, and nothing else."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int(process.name) != os.getpid() and variable.encode() in (process / "environ").read_bytes().split(
                b"\0"
            ):
                os.kill(int(process.name), signal.SIGKILL)


def wait_until(condition: Callable[[], object], complaint: str) -> None:
    """For as long as even a busy machine may need."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.2)
