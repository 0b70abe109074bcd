"""A pool of real processes that tests run functions in, as the ranks of a gloo job.

Importing torch costs seconds, so one pool of four serves the whole suite; each task is a process group of its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RankPool:
    """`run(world_size, function, *arguments)` calls a module-level function on each rank and lists what they return."""

    def __init__(self, size: int = 4) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "accelerate", "distgan.training.player"])
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there,), daemon=True)
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
        os.environ.update(
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world_size), RANK=str(rank),
            LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size),
        )  # fmt: skip
        try:
            pipe.send((True, task()))
        except BaseException:
            pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))
        finally:
            torch.use_deterministic_algorithms(False)
            if dist.is_initialized():
                dist.destroy_process_group()
            AcceleratorState._reset_state(True)
