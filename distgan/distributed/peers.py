"""Lost-rank diagnosis: after a failed collective, each rank asks all others for their step and names the missing ones.

The error of a collective does not name the missing rank. So a thread of every rank answers each connection with the
rank's current step, even while the rank waits. An ended process refuses the connection. A stopped process accepts it
but does not answer. If the network is down, the connection times out.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import NamedTuple

from distgan.distributed.runtime import Runtime

_PATIENCE_SECONDS = 2.0
_AT_ONCE = 64
_LONGEST_ANSWER = 32


class PeerAddress(NamedTuple):
    """Address at which a rank answers."""

    host: str
    address: str
    port: int


class PeerProbe:
    """Thread that answers each connection with this rank's step until `close`. Collective: create it on every rank."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._addresses: list[PeerAddress] = []
        self._door: socket.socket | None = None
        if runtime.world_size == 1:
            return
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._door = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=_AT_ONCE)
        here = PeerAddress(socket.gethostname(), _address(), self._door.getsockname()[1])
        self._addresses = runtime.gather_objects(here)
        self._thread = threading.Thread(target=self._answer, args=(self._door,), name="distgan-peers", daemon=True)
        self._thread.start()

    def missing(self) -> str:
        """Query all other ranks, and return a phrase that names the ranks that this rank waited for."""
        others = [rank for rank in range(len(self._addresses)) if rank != self._runtime.rank]
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            answers = dict(zip(others, pool.map(ask, [self._addresses[rank] for rank in others]), strict=True))
        return describe(self._runtime.step, self._addresses, answers)

    def close(self) -> None:
        """Stop answering."""
        if self._door is not None:
            # close() alone does not wake the thread.
            with suppress(OSError):
                self._door.shutdown(socket.SHUT_RDWR)
            self._door.close()
            # The thread references the process groups, so it must end before the interpreter does.
            self._thread.join(_PATIENCE_SECONDS)

    def _answer(self, door: socket.socket) -> None:
        while True:
            try:
                caller, _ = door.accept()
            except OSError:
                return
            with closing(caller), suppress(OSError):
                caller.sendall(f"{self._runtime.step}\n".encode())


def ask(address: PeerAddress) -> int | str:
    """Return the step of a rank, or the reason why it does not answer. Waits at most a few seconds."""
    try:
        line = socket.create_connection((address.address, address.port), timeout=_PATIENCE_SECONDS)
    except ConnectionError:
        return "its process has ended"
    except OSError as error:
        return f"its host is not reachable: {error.strerror or error}"
    with line:
        try:
            text = line.makefile("rb").readline(_LONGEST_ANSWER)
        except TimeoutError:
            # The kernel accepted the connection for a stopped process.
            return "its process is stopped or too busy to answer"
        except OSError:
            text = b""
    return int(text) if text.strip().isdigit() else "its process has ended"


def describe(step: int, addresses: Sequence[PeerAddress], answers: dict[int, int | str]) -> str:
    """Return a phrase that names the ranks that a rank at step `step` waited for.

    Args:
        addresses: address of each rank.
        answers: other ranks -> their step, or the reason why they do not answer.
    """
    silent = [rank for rank, answer in answers.items() if isinstance(answer, str)]
    behind = [rank for rank, answer in answers.items() if isinstance(answer, int) and answer < step]
    if silent:
        named = ", ".join(f"rank {rank} on {addresses[rank].host} ({answers[rank]})" for rank in silent[:4])
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        return f"waited at step {step} for {named}{more}"
    if behind:
        named = ", ".join(f"rank {rank} on {addresses[rank].host} (at step {answers[rank]})" for rank in behind[:4])
        return f"waited at step {step} for {named}"
    return f"waited at step {step}, and so did all other ranks: the network failed or is slow"


def _address() -> str:
    """Return the address of this host on the network of the rendezvous."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing, but chooses the interface
            address = str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
    # On the host of rank 0 the address may be loopback, which other hosts cannot use.
    return master if address.startswith("127.") or address == "::1" else address
