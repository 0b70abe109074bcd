"""The port where the ranks of a job meet, on the node that runs this.

`port.py choose FIRST` prints FIRST if it is free, or another port from 20000 to 29999. `port.py check PORT` exits with
1 and says which process holds it if it is not free.
"""

from __future__ import annotations

import itertools
import socket
import sys

LOWEST, COUNT = 20_000, 10_000
"""Outside of the range that systems give away by themselves."""
STRIDE = 997
"""Prime to COUNT, so that all are tried; the neighbors are those of the jobs submitted before and after."""


def is_free(port: int) -> bool:
    """Return True if a server can listen there, as torch's store does: on all addresses."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Connections of a server that has ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """The process that listens at a port, in words."""
    import psutil  # comes with accelerate

    for connection in psutil.net_connections("tcp"):
        if connection.laddr and connection.laddr.port == port and connection.status == psutil.CONN_LISTEN:
            try:
                command = " ".join(" ".join(psutil.Process(connection.pid).cmdline()).split())
                return f"process {connection.pid} ({command[:80]})"
            except (psutil.Error, TypeError, ValueError):
                break
    return "a process of another user"


def main(command: str, first: int) -> int:
    """Do what the arguments say. Returns the exit code."""
    if is_free(first):
        if command == "choose":
            print(first)
        return 0
    taken = f"port {first} of {socket.gethostname()} is in use by {holder(first)}"
    if command == "check":
        print(f"{taken}; end that process, or set MASTER_PORT to a free port", file=sys.stderr)
        return 1
    others = (LOWEST + (first - LOWEST + STRIDE * n) % COUNT for n in itertools.count(1))
    chosen = next((port for port in itertools.islice(others, COUNT - 1) if is_free(port)), None)
    if chosen is None:
        print(f"{taken}, and no port from {LOWEST} to {LOWEST + COUNT - 1} is free", file=sys.stderr)
        return 1
    print(f"{taken}; the ranks meet at port {chosen}", file=sys.stderr)
    print(chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
