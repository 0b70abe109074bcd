"""What a program that trains a run gets: calls while it trains, and the result at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from distgan.inference.generator import Generator


@dataclass(frozen=True)
class Callbacks:
    """Functions of a program that are called between two steps. After a rollback, steps come again.

    An exception in one ends the run, and its message names the callback and the step.
    """

    on_step: Callable[[int], object] | None = None
    """`on_step(step)` after each step, on every rank."""
    on_evaluation: Callable[[int, Mapping[str, float]], object] | None = None
    """`on_evaluation(step, metrics)` after each evaluation, on every rank."""
    on_checkpoint: Callable[[int], object] | None = None
    """`on_checkpoint(step)` on rank 0, once the checkpoint of a step is being written."""

    def call(self, name: Literal["on_step", "on_evaluation", "on_checkpoint"], step: int, *arguments: object) -> None:
        """Call one of them, if it is there. Raises RuntimeError that names it if it fails."""
        callback: Callable[..., object] | None = getattr(self, name)
        if callback is not None:
            with _named(name, step):
                callback(step, *arguments)


@contextmanager
def _named(name: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{name} failed at step {step}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class RunResult:
    """How a run ended, and what it left."""

    outcome: Literal["finished", "preempted", "diverged"]
    step: int
    """Last step."""
    reason: str | None
    """Reason of an early end, in one line."""
    best: dict[str, Any] | None
    """Step, metric and value of the best evaluation; None without evaluations."""
    run_dir: Path
    """Run folder; for a run in an object store, its copy on this node."""
    url: str | None = None
    """URL of a run in an object store."""

    @property
    def curves(self) -> list[dict[str, float]]:
        """Rows of metrics.jsonl: scalars by name, with `step`, `images` and `time`."""
        file = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def generator(self, *, best: bool = False, device: torch.device | str = "cpu") -> Generator:
        """Load the EMA generator of the last checkpoint, or of the best one. Raises UserError if there is none."""
        from distgan.inference.export import load_generator

        return load_generator(self.url or self.run_dir, best=best, device=device)
