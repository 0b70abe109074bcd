"""Who is missing: when contact is lost, each rank asks all others where they are, and can say whom it waited for.

A collective that fails says no more than that it waited. So every rank answers a connection with the step that it is
at, from a thread that goes on while the rank waits; a process that has ended refuses the connection, one that is
stopped accepts it and stays silent, and behind a cut link there is nothing at all.
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
    """Where a rank can be asked."""

    host: str
    address: str
    port: int


class PeerProbe:
    """Answers for this rank from a thread, until it is closed. Every rank makes one at the same time."""

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
        self._thread = threading.Thread(target=self._answer, args=(self._door,), name="roll call", daemon=True)
        self._thread.start()

    def missing(self) -> str:
        """Whom this rank waited for, as far as the others answer now."""
        others = [rank for rank in range(len(self._addresses)) if rank != self._runtime.rank]
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            answers = dict(zip(others, pool.map(ask, [self._addresses[rank] for rank in others]), strict=True))
        return describe(self._runtime.step, self._addresses, answers)

    def close(self) -> None:
        """Answer no more."""
        if self._door is not None:
            # Closing alone would not wake the thread.
            with suppress(OSError):
                self._door.shutdown(socket.SHUT_RDWR)
            self._door.close()
            # It holds the process groups, which must not be left to a thread that outlives the interpreter.
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
    """The step that a rank is at, or what is wrong with it."""
    try:
        line = socket.create_connection((address.address, address.port), timeout=_PATIENCE_SECONDS)
    except ConnectionError:
        return "its process has ended"
    except OSError as error:
        return f"its host is not reached: {error.strerror or error}"
    with line:
        try:
            text = line.makefile("rb").readline(_LONGEST_ANSWER)
        except TimeoutError:
            # The kernel has accepted the connection, for a process that does not run.
            return "it is stopped, or busy beyond answering"
        except OSError:
            text = b""
    return int(text) if text.strip().isdigit() else "its process has ended"


def describe(step: int, addresses: Sequence[PeerAddress], answers: dict[int, int | str]) -> str:
    """One phrase of what the others answered to a rank that waited at `step`."""
    silent = [rank for rank, answer in answers.items() if isinstance(answer, str)]
    behind = [rank for rank, answer in answers.items() if isinstance(answer, int) and answer < step]
    if silent:
        named = ", ".join(f"rank {rank} on {addresses[rank].host} ({answers[rank]})" for rank in silent[:4])
        more = f" and {len(silent) - 4} more" if len(silent) > 4 else ""
        return f"waited at step {step} for {named}{more}"
    if behind:
        named = ", ".join(f"rank {rank} on {addresses[rank].host} (at step {answers[rank]})" for rank in behind[:4])
        return f"waited at step {step} for {named}"
    return f"waited at step {step}, where all other ranks are too; the network between them failed, or is slow"


def _address() -> str:
    """The address of this host on the network that the ranks meet on."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # sends nothing, but chooses the interface
            address = str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
    # The host of rank 0 may know its own name by a loopback address, which would mean the others to themselves.
    return master if address.startswith("127.") or address == "::1" else address
