"""Two simulated hosts on one machine: bridged network namespaces, each with a host name and an address."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
SUBNET = "10.77.0"


def missing() -> str | None:
    """Return the reason why this machine cannot simulate hosts, or None."""
    if shutil.which("ip") is None:
        return "no ip: apt-get install iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    made = subprocess.run(["ip", "link", "add", "distgan-try", "type", "bridge"], capture_output=True, text=True)
    _ip("link", "delete", "distgan-try", check=False)
    return f"no bridges: {made.stderr.strip()}" if made.returncode else None


class Hosts:
    """Simulated hosts 1 and 2, at 10.77.0.1 and 10.77.0.2. Create it with `hosts`."""

    def __init__(self) -> None:
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, host: int, command: list[str], log: Path, *, root: Path = ROOT, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process on host 1 or 2. Its output is appended to `log`."""
        name = f"distgan{host}"
        inside = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh"]
        inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*inside, *command], cwd=root, stdout=output, stderr=output, start_new_session=True,
                env=inherited | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"} | environment,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def launch(
        self, log: Path, *arguments: str, roots: Sequence[Path] = (ROOT, ROOT), **environment: str
    ) -> list[subprocess.Popen[bytes]]:
        """Start a distgan command on both hosts with the launcher for Slurm nodes, by default one rank on each."""
        shared = {
            "VENV": str(Path(sys.executable).parents[1]), "SLURM_NNODES": "2", "MASTER_ADDR": f"{SUBNET}.1",
            "MASTER_PORT": "29400", "PROCESSES_PER_NODE": "1", **environment,
        }  # fmt: skip
        return [
            self.start(
                host, ["launch/slurm/node.sh", *arguments], log, root=root, SLURM_NODEID=str(host - 1),
                NODE_ADDR=f"{SUBNET}.{host}", **shared,
            )
            for host, root in zip((1, 2), roots, strict=True)
        ]  # fmt: skip

    def cut(self, host: int) -> None:
        """Disconnect the hosts from each other."""
        _ip("link", "set", f"distgan-v{host}", "down")

    def mend(self, host: int) -> None:
        _ip("link", "set", f"distgan-v{host}", "up")


@contextmanager
def hosts() -> Iterator[Hosts]:
    """Yield two hosts; afterward remove them and kill their processes."""
    made = Hosts()
    try:
        _ip("link", "add", "distgan-br", "type", "bridge")
        _ip("addr", "add", f"{SUBNET}.254/24", "dev", "distgan-br")
        _ip("link", "set", "distgan-br", "up")
        for host in (1, 2):
            name, outside = f"distgan{host}", f"distgan-v{host}"
            _ip("netns", "add", name)
            _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", outside, "master", "distgan-br", "up")
            _ip("-n", name, "addr", "add", f"{SUBNET}.{host}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for host in (1, 2):
            inside = subprocess.run(["ip", "netns", "pids", f"distgan{host}"], capture_output=True, text=True)
            for pid in inside.stdout.split():
                with contextlib.suppress(OSError):
                    os.kill(int(pid), 9)
        for process in made.processes:
            process.wait()
        for host in (1, 2):
            _ip("netns", "delete", f"distgan{host}", check=False)
            _ip("link", "delete", f"distgan-v{host}", check=False)
        _ip("link", "delete", "distgan-br", check=False)


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)
