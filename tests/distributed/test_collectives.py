"""Synchronized statistics against one process that has the whole batch: values, first and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distgan.distributed import collectives
from distgan.distributed.runtime import Runtime
from distgan.networks.layers.normalization import BatchNorm, recompute_statistics
from tests.ranks import RankPool


class NativeBatchNorm(nn.Module):
    """torch's own batch norm in training mode, with derivatives of its own."""

    def __init__(self, layer: BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def network(native: bool) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(2, 3, 3), BatchNorm(3, synchronized=True), nn.Tanh(), nn.Conv2d(3, 1, 2)]
    if native:
        layers[1] = NativeBatchNorm(layers[1])  # type: ignore[arg-type]
    return nn.Sequential(*layers).double()


def derivatives(native: bool, rank: int, world_size: int) -> dict[str, Any]:
    """Outputs, gradient of the summed outputs by the input, and gradient of an R1-like loss by the parameters."""
    images = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = len(images) // world_size
    images = images[rank * share : (rank + 1) * share].requires_grad_(True)
    module = network(native)
    outputs = module(images).flatten(1).sum(1)
    (by_input,) = torch.autograd.grad(outputs.sum(), images, create_graph=True)
    loss = outputs.square().mean() + by_input.square().flatten(1).sum(1).mean()
    by_parameters = torch.autograd.grad(loss, list(module.parameters()))
    mean_over_ranks = [collectives.all_reduce_mean(gradient) for gradient in by_parameters]
    return {
        "outputs": outputs.detach(),
        "by_input": by_input.detach(),
        "by_parameters": mean_over_ranks,
        "loss": collectives.all_reduce_mean(loss).item(),
    }


def distributed_derivatives() -> dict[str, Any]:
    runtime = Runtime()
    return derivatives(False, runtime.rank, runtime.world_size)


@pytest.mark.parametrize("world_size", [2, 4])
def test_synchronized_batch_norm_equals_one_process(ranks: RankPool, world_size: int) -> None:
    expected = derivatives(True, 0, 1)
    found = ranks.run(world_size, distributed_derivatives)
    torch.testing.assert_close(torch.cat([f["outputs"] for f in found]), expected["outputs"], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([f["by_input"] for f in found]), expected["by_input"], rtol=1e-11, atol=1e-12)
    for one in found:
        assert one["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        for gradient, wanted in zip(one["by_parameters"], expected["by_parameters"], strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-11)


def gradcheck_sum() -> bool:
    runtime = Runtime()
    x = torch.randn(3, generator=torch.Generator().manual_seed(runtime.rank), dtype=torch.float64, requires_grad=True)
    total = collectives.all_reduce_sum(x.square())
    (first,) = torch.autograd.grad(total.pow(2).sum(), x, create_graph=True)
    # Summed over both ranks' losses, sum_k T_k^2 each: d/dx = 2 * (2 T) * 2x; its own sum's gradient follows by hand.
    expected_first = runtime.world_size * 4 * total * x
    (second,) = torch.autograd.grad(first.sum(), x)
    others = collectives.all_reduce_sum(x.detach())
    expected_second = runtime.world_size * (4 * total + 8 * x * others)
    torch.testing.assert_close(first, expected_first)
    torch.testing.assert_close(second, expected_second)
    return True


def test_backward_of_the_sum_is_the_sum(ranks: RankPool) -> None:
    assert ranks.run(2, gradcheck_sum) == [True, True]


def standing_statistics() -> list[torch.Tensor]:
    runtime = Runtime()
    module = network(False)
    batches = torch.randn(5, 4, 2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    share = range(runtime.rank, 5, runtime.world_size)
    recompute_statistics(module, [(batches[i],) for i in share], across_ranks=True)
    return [module[1].running_mean, module[1].running_var]


def test_recomputed_statistics_do_not_depend_on_the_ranks(ranks: RankPool) -> None:
    module = network(False)
    batches = torch.randn(5, 4, 2, 6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    hidden = module[0](batches.flatten(0, 1)).detach()
    # All batches are equally large, so the average of their E[x] and E[x^2] is that of all samples.
    mean, square = hidden.mean((0, 2, 3)), hidden.square().mean((0, 2, 3))
    for world_size in (1, 2, 4):
        for found in ranks.run(world_size, standing_statistics):
            torch.testing.assert_close(found[0], mean, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(found[1], square - mean**2, rtol=1e-12, atol=1e-13)


def disagreeing(rank_with_error: int) -> str:
    from distgan.errors import UserError

    runtime = Runtime()
    try:
        with runtime.raise_on_all_ranks():
            if runtime.rank == rank_with_error:
                raise UserError("no such folder")
    except UserError as error:
        return str(error)
    return "nothing"


def test_one_ranks_mistake_is_everyones(ranks: RankPool) -> None:
    assert ranks.run(2, disagreeing, 1) == ["rank 1: no such folder"] * 2


def flags_over_steps() -> list[list[bool]]:
    runtime = Runtime()
    seen = []
    exchange = runtime.exchange([False, False])
    for step in range(4):
        seen.append(exchange.result())
        exchange = runtime.exchange([runtime.rank == 1 and step == 1, False])
    exchange.result()
    return seen


def test_flags_reach_all_ranks_one_step_later(ranks: RankPool) -> None:
    expected = [[False, False], [False, False], [True, False], [False, False]]
    assert ranks.run(2, flags_over_steps) == [expected, expected]
