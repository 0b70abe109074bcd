"""Input and states of metrics, on one rank and over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat, dim_zero_sum

from distgan.config import MetricConfig
from distgan.errors import UserError

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime


def feed(metric: Metric, taken: Sequence[Any], section: MetricConfig, what: str) -> None:
    """Update a metric. Raises UserError if a user's `update` fails, or changes its input, which others get too."""
    before = [_version(tensor) for tensor in taken]
    with section.blaming(f"{what} failed"):
        metric.update(*taken)
    if before != [_version(tensor) for tensor in taken]:
        raise UserError(f"{section.metric}: {what} changes its input in place, which other metrics get too; clone it")


def _version(taken: Any) -> int:
    return 0 if not isinstance(taken, Tensor) or taken.is_inference() else taken._version


def leave_synchronization(metric: Metric) -> None:
    """Keep a metric, and those that it is made of, from synchronizing when they compute. See `reduced_states`."""
    for part in _parts(metric):
        part.sync_on_compute = part._to_sync = False


def computes_on_all_ranks(metric: Metric) -> bool:
    """Return the fact of this name, see `SuiteMetric`, also of a metric that leaves it out."""
    return bool(getattr(metric, "computes_on_all_ranks", False))


@contextmanager
def reduced_states(metrics: Iterable[Metric], runtime: Runtime) -> Iterator[None]:
    """Context manager in which metrics have the states of all ranks, on rank 0. Collective: call on every rank.

    Unlike torchmetrics' own synchronization it all-reduces sums, holds gathered rows on rank 0 only, and accepts ranks
    without samples, whose lists are empty. Every rank gets the rows of a metric that `computes_on_all_ranks`.
    """
    parts: list[tuple[Metric, bool]] = []
    if runtime.world_size > 1:
        parts = [(part, computes_on_all_ranks(metric)) for metric in metrics for part in _parts(metric)]
    before = [(part, name, getattr(part, name)) for part, _ in parts for name in part._reductions]
    everywhere = [of_all for part, of_all in parts for _ in part._reductions]
    with runtime.raise_on_all_ranks():  # before the collectives, which all ranks must reach
        local = [_local(part, name, state) for part, name, state in before]
    described = [_described(part, name, state) for part, name, state in before]
    everyones = runtime.gather_objects(described) if before else [described]
    for mine, theirs in ((one, other) for other in everyones for one, other in zip(everyones[0], other, strict=True)):
        if mine != theirs:
            raise UserError(
                f"{mine}: on another rank {theirs}; a state keeps the shape and dtype that add_state gives it, so add "
                "to it in place, as in self.total += x",
                everywhere=True,
            )
    try:
        for (part, name, _), state, of_all in zip(before, local, everywhere, strict=True):
            setattr(part, name, _reduced(state, part._reductions[name], runtime, of_all))
        yield
    finally:
        for part, name, state in before:
            setattr(part, name, state)


def joined(rows: list[Tensor] | Tensor) -> Tensor:
    """Concatenate a torchmetrics list state, which is a single tensor after synchronization."""
    return torch.cat(rows or [torch.empty(0)]) if isinstance(rows, list) else rows


def _described(metric: Metric, name: str, state: Tensor | list[Tensor]) -> str:
    """Describe a tensor that the collectives reduce; rows may differ between ranks."""
    if not isinstance(state, Tensor) or metric._reductions[name] is dim_zero_cat:
        return ""
    return f"{type(metric).__name__}: its state {name} is {state.dtype} of shape {tuple(state.shape)}"


def _parts(metric: Metric) -> list[Metric]:
    return [module for module in metric.modules() if isinstance(module, Metric)]


def _local(metric: Metric, name: str, state: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """Return this rank's state, its rows as one tensor. Raises UserError if they do not fit each other."""
    if not isinstance(state, list) or metric._reductions[name] is not dim_zero_cat:
        return state
    try:
        return dim_zero_cat(state) if state else torch.empty(0)
    except (RuntimeError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(
            f"{type(metric).__name__}: its state {name} cannot be concatenated: {said}; append tensors of one shape "
            "(n, ...)"
        ) from None


def _reduced(state: Tensor | list[Tensor], reduction: Any, runtime: Runtime, everywhere: bool) -> Tensor | list[Tensor]:
    if isinstance(state, list):
        ranks = runtime.gather_objects([row.cpu() for row in state])
        return [row for rows in ranks for row in rows]
    if reduction is dim_zero_cat:
        return runtime.gather_rows(state, everywhere)
    if reduction is dim_zero_sum:
        return runtime.all_reduce_sum(state)
    stacked = torch.stack([other.to(state.device) for other in runtime.gather_objects(state.cpu())])
    reduced: Tensor = stacked if reduction is None else reduction(stacked)
    return reduced
