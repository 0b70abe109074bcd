"""Straggler detection: the step time of each rank without its waits for other ranks.

All ranks need the same time per step, because they wait for the slowest rank. So one step per logging interval is
timed. Two parts of it count as waiting: reductions of batch statistics, and the time from a player's last gradient to
its optimizer step. The rest, including the wait for data, is the rank's own time. Timing does not wait for the device.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distgan.distributed import collectives
from distgan.distributed.runtime import Runtime

logger = logging.getLogger("distgan")

_SLOW, _IN_A_ROW = 1.5, 3
"""Warn if a rank's own step time exceeds this multiple of the median, this many intervals in a row."""

Span = tuple[Any, Any]


class StragglerMonitor:
    """Times single steps. With one rank it does nothing. Collective: call on every rank."""

    def __init__(self, runtime: Runtime, players: Sequence[nn.Module]) -> None:
        self._runtime, self._players = runtime, players
        self._cuda = runtime.device.type == "cuda"
        self._watching = ExitStack()
        self._began: Any = None
        self._whole: Span | None = None
        self._waits: list[Span] = []
        self._suspect: int | None = None
        self._suspicions = 0

    def begin(self) -> None:
        """Start timing the next step."""
        if self._runtime.world_size == 1:
            return
        self._watching.close()
        self._waits = []
        last_gradient: list[Any] = []

        def ready(_: Any) -> None:
            last_gradient[:] = [self._now()]

        def stepping(*_: Any) -> None:
            if last_gradient:
                self._waits.append((last_gradient.pop(), self._now()))

        # The last of these hooks counts. One hook of all parameters would fail in `autograd.grad` of a parameter.
        for parameter in chain.from_iterable(player.parameters() for player in self._players):
            if parameter.requires_grad:
                self._watching.callback(parameter.register_post_accumulate_grad_hook(ready).remove)
        self._watching.callback(register_optimizer_step_pre_hook(stepping).remove)
        self._watching.callback(collectives.watch(self._waiting))
        self._began = self._now()

    def end(self) -> None:
        """Stop timing the step."""
        if self._began is not None:
            self._whole, self._began = (self._began, self._now()), None
        self._watching.close()

    def measure(self) -> dict[str, float]:
        """Return the own seconds of the slowest and fastest rank in the last timed step, and the slowest rank.

        Call it after the device has finished that step. It logs a warning that names a rank which stays slow.
        Collective: call on every rank.
        """
        if self._whole is None:
            return {}
        own = self._seconds(self._whole) - sum(map(self._seconds, self._waits))
        self._whole = None
        reports = self._runtime.gather_objects((own, socket.gethostname()))
        seconds = [each for each, _ in reports]
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        self._consider(slowest, seconds[slowest], statistics.median_low(seconds), reports[slowest][1])
        return {
            "ranks/own_step_seconds_max": max(seconds),
            "ranks/own_step_seconds_min": min(seconds),
            "ranks/slowest": float(slowest),
        }

    def _consider(self, rank: int, seconds: float, median: float, host: str) -> None:
        if seconds <= _SLOW * median:
            self._suspect = None
            return
        self._suspicions = self._suspicions + 1 if rank == self._suspect else 1
        self._suspect = rank
        if self._suspicions == _IN_A_ROW and self._runtime.is_main:
            logger.warning(
                "rank %d on %s is slow: its own step time is %.3g s, %.1f times the median, and all other ranks wait "
                "for it; check that node, or exclude it",
                rank, host, seconds, seconds / median,
            )  # fmt: skip

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        began = self._now()
        yield
        self._waits.append((began, self._now()))

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, span: Span) -> float:
        began, ended = span
        return float(began.elapsed_time(ended) / 1e3 if self._cuda else ended - began)
