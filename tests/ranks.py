"""A pool of real processes that tests run functions in, as the ranks of a gloo job.

Importing torch costs seconds, so one pool of four serves the whole suite; each task is a process group of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import multiprocessing.context
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from distgan.data.loader_processes import STOP_SIGNALS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "accelerate", "distgan.training.loop", "distgan.inference.evaluate"])
    # As distgan starts it for its loaders, because this process has one fork server for everything.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


class Processes:
    """Fresh processes, one a rank, that call a module-level function and can be killed."""

    def __init__(self, world_size: int, function: Callable[..., object], *arguments: object) -> None:
        context = _context()
        port = free_port()
        self.processes = [
            context.Process(target=_as_rank, args=(rank, world_size, port, function, arguments))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to one rank, or to all; then wait for all to be gone, which they must be by themselves."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()
        self.wait()

    def signal(self, number: int) -> None:
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, number)

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit codes of all ranks. Fails, and leaves none behind, when one outlasts the timeout."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        stuck = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not stuck, f"ranks {stuck} did not end"
        return [process.exitcode for process in self.processes]

    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)


def _as_rank(
    rank: int, world_size: int, port: int, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    _set_rank(rank, world_size, port)
    function(*arguments)


class Job(Processes):
    """Fresh processes, one a rank, that run one of distgan's commands and can be killed.

    Args:
        environment: what a launcher would add to that of all ranks.
        before: a function of a module that each rank calls first, such as to set a clock.
    """

    def __init__(
        self,
        world_size: int,
        arguments: list[str],
        *,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] | None = None,
    ) -> None:
        context = _context()
        port = free_port()
        self.processes = [
            context.Process(target=_command, args=(arguments, rank, world_size, port, log, environment or {}, before))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()


def _command(
    arguments: list[str],
    rank: int,
    world_size: int,
    port: int,
    log: Path | None,
    environment: Mapping[str, str],
    before: Callable[[], object] | None,
) -> None:
    import torch

    from distgan.cli import main

    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if world_size > 1:
        _set_rank(rank, world_size, port)
    os.environ.update(environment)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    if before is not None:
        before()
    main(arguments)


def _set_rank(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size), RANK=str(rank),
        LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
    )  # fmt: skip


class RankPool:
    """`run(world_size, function, *arguments)` calls a module-level function on each rank and lists what they return."""

    def __init__(self, size: int = 4) -> None:
        context = _context()
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,))
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        port = free_port()
        pipes = self.pipes[:world_size]
        for rank, pipe in enumerate(pipes):
            pipe.send((rank, world_size, port, functools.partial(function, *arguments, **named)))
        answers: dict[Connection, Any] = {}
        while len(answers) < world_size:
            for pipe in wait([pipe for pipe in pipes if pipe not in answers], timeout=240) or [None]:
                assert pipe is not None, "the ranks did not answer in time"
                answers[pipe] = pipe.recv()  # type: ignore[attr-defined]
        failed = [answers[pipe][1] for pipe in pipes if not answers[pipe][0]]
        assert not failed, "\n".join(failed)
        return [answers[pipe][1] for pipe in pipes]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    while True:
        rank, world_size, port, task = pipe.recv()
        _set_rank(rank, world_size, port)
        try:
            pipe.send((True, task()))
        except BaseException:
            pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))
        finally:
            torch.use_deterministic_algorithms(False)
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(True)
