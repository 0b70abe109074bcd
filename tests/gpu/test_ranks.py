"""Ranks on GPUs: NCCL with one rank, two ranks that share a GPU over gloo, and which of them is slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distgan.distributed import collectives
from distgan.distributed.runtime import Runtime
from tests.distributed.test_layers import derivatives, distributed_derivatives
from tests.distributed.test_stragglers import train_with_a_slow_rank
from tests.ranks import RankPool
from tests.runs import recipe, rows

pytestmark = pytest.mark.gpu


class Penalized(nn.Module):
    """A player's objective in small: a loss with the square of an input gradient in it, inside one forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(392, 1)).double()

    def forward(self, images: Tensor) -> Tensor:
        images = images.detach().requires_grad_(True)
        logits = self.network(images)
        (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        loss: Tensor = logits.square().mean() + gradient.square().flatten(1).sum(1).mean()
        return loss


def gradients(objective: nn.Module, device: torch.device) -> list[Tensor]:
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    objective(images.to(device)).backward()
    return [parameter.grad.cpu() for parameter in objective.parameters() if parameter.grad is not None]


def alone() -> dict[str, Any]:
    """What one rank with a process group of its own finds: the third derivative of a sum, and DDP's gradients."""
    runtime = Runtime()
    x = torch.arange(3.0, dtype=torch.float64, device=runtime.device).requires_grad_(True)
    values = [collectives._apply_all_reduce_sum(x).pow(4)]
    for _ in range(3):
        (derivative,) = torch.autograd.grad(values[-1].sum(), x, create_graph=True)
        values.append(collectives._apply_all_reduce_sum(derivative))
    objective = Penalized().to(runtime.device)
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    found = {
        "backend": dist.get_backend(),
        "world_size": runtime.world_size,
        "device": runtime.device.type,
        "values": [value.detach().cpu() for value in values],
        "gradients": gradients(wrapped, runtime.device),
        "summed": runtime.all_reduce_sum(torch.ones(2, device=runtime.device)).cpu(),
    }
    return found


def test_one_rank_with_a_process_group(ranks: RankPool, device: torch.device) -> None:
    (found,) = ranks.run(1, alone)
    assert found["backend"] == ("nccl" if device.type == "cuda" else "gloo")
    assert (found["world_size"], found["device"]) == (1, device.type)
    x = torch.arange(3.0, dtype=torch.float64)
    for value, expected in zip(found["values"], (x**4, 4 * x**3, 12 * x**2, 24 * x), strict=True):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found["gradients"], gradients(Penalized(), torch.device("cpu")))
    assert torch.equal(found["summed"], torch.ones(2))


def shared() -> tuple[tuple[str, str], int, Tensor, list[Tensor]]:
    """Over what and where a rank works, of how many GPUs, with a sum over ranks and the gradients of the engine."""
    runtime = Runtime()
    total = collectives.all_reduce_sum(torch.full((3,), runtime.rank + 1.0, device=runtime.device))
    objective = Penalized()
    engine = runtime.engine(objective, objective.network, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    assert engine.module is not objective
    found = gradients(engine.module, runtime.device)
    return (dist.get_backend(), str(runtime.device)), torch.cuda.device_count(), total.cpu(), found


def test_two_ranks_share_a_device(ranks: RankPool, device: torch.device) -> None:
    expected = gradients(Penalized(), torch.device("cpu"))
    for rank, (place, devices, total, found) in enumerate(ranks.run(2, shared)):
        # A suite that began before this folder hid all GPUs but one has a GPU for each rank.
        assert place == (("nccl", f"cuda:{rank}") if devices > 1 else ("gloo", f"{device.type}:0"))
        assert torch.equal(total, torch.full((3,), 3.0))
        torch.testing.assert_close(found, expected)


LAYERS = ("conditional batch norm", "conditional virtual batch norm", "minibatch discrimination")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_over_ranks_equal_the_cpu_with_the_whole_batch(ranks: RankPool, name: str) -> None:
    """Outputs, input gradients, and the gradient by the parameters of a loss with a squared input gradient in it."""
    expected = derivatives(name, 0, 1)
    for world_size in (1, 2):
        found = ranks.run(world_size, distributed_derivatives, name)
        for key in ("outputs", "by_input"):
            torch.testing.assert_close(torch.cat([f[key] for f in found], 0), expected[key], rtol=1e-9, atol=1e-10)
        for one in found:
            torch.testing.assert_close(one["by_parameters"], expected["by_parameters"], rtol=1e-8, atol=1e-9)


def test_the_slow_rank_is_named(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    """Its convolutions wait, and a step takes the other rank as long; events on the device tell them apart."""
    config = recipe(tmp_path, digits, training={"steps": 4, "batch_size": 16}, monitoring={"every": 1})
    said = ranks.run(2, train_with_a_slow_rank, str(config), 1, "network")[0]
    for row in rows(tmp_path / "run")[1:]:
        assert row["ranks/slowest"] == 1
        assert row["ranks/own_step_seconds_max"] >= row["ranks/own_step_seconds_min"] + 0.1
        assert row["ranks/own_step_seconds_min"] < row["speed/step_seconds"] - 0.05
    assert len([line for line in said if line.startswith("rank 1 on ")]) == 1
