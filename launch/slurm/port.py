"""Choose or check the port of the rendezvous on this node.

`port.py choose FIRST` prints FIRST if it is free, otherwise a free port from 20000 to 29999. `port.py check PORT`
exits with 1 if the port is in use, and names the process that holds it.
"""

from __future__ import annotations

import itertools
import socket
import sys

LOWEST, COUNT = 20_000, 10_000
"""First port to choose from, and number of ports: below the ephemeral ports of Linux, which start at 32768."""
STRIDE = 997
"""Distance between two ports that are tried. It is coprime to COUNT, so that every port is tried. It is not 1, because
jobs submitted next try the next ports."""


def is_free(port: int) -> bool:
    """Return True if a server can listen at this port on all addresses, as torch's store does."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Ignore leftover connections of a server that has ended.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


def holder(port: int) -> str:
    """Return a phrase that names the process that listens at a port."""
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
    """Run `command`, which is `choose` or `check`, on the port `first`. Return the exit code."""
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
    print(f"{taken}; using port {chosen} instead", file=sys.stderr)
    print(chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], int(sys.argv[2])))
