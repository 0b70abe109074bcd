"""Layers over several ranks against one process with the whole batch: values, first and second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgan.distributed import collectives
from distgan.distributed.runtime import Runtime
from distgan.networks.layers.minibatch import MinibatchDiscrimination, MinibatchStddev
from distgan.networks.layers.normalization import build_normalization
from distgan.networks.layers.spectral_norm import add_spectral_norm, power_iteration_vectors
from distgan.networks.layers.virtual_batch_norm import add_reference, reference_moments, set_reference
from tests.ranks import RankPool

BATCH = 8


class Conditional(nn.Module):
    """A normalization with classes between two convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 1, 2)
        self.norm = build_normalization(kind, 3, num_classes=3)
        nn.init.normal_(self.norm.gain.weight)
        nn.init.normal_(self.norm.offset.weight)
        add_reference(self, 6, (2, 6, 6), labeled=True)  # six, so that two of four ranks pass the same half
        if kind == "virtual":
            set_reference(self, torch.randn(6, 2, 6, 6), torch.arange(6) % 3)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x), labels).tanh())


class Unconditional(nn.Sequential):
    """Layers that pay no heed to labels."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return super().forward(x)


def spectral() -> nn.Module:
    network = Unconditional(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.ConvTranspose2d(3, 2, 3))
    add_spectral_norm(network)
    return network


def discrimination() -> nn.Module:
    return Unconditional(
        nn.Flatten(), nn.Linear(72, 5), MinibatchDiscrimination(5, kernels=4, dimensions=3), nn.Linear(9, 2)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conditional batch norm": lambda: Conditional("synchronized"),
    "conditional virtual batch norm": lambda: Conditional("virtual"),
    "conditional layer norm": lambda: Conditional("layer"),
    "spectral norm": spectral,
    "minibatch discrimination": discrimination,
    "minibatch stddev, groups across ranks": lambda: Unconditional(
        nn.Conv2d(2, 2, 3), MinibatchStddev(4), nn.Conv2d(3, 1, 2)
    ),
    "minibatch stddev, one group": lambda: Unconditional(nn.Conv2d(2, 2, 3), MinibatchStddev(16), nn.Conv2d(3, 1, 2)),
}


def derivatives(name: str, rank: int, world_size: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Two passes over this rank's share: outputs, input gradients, and an R1-like loss's gradient by the parameters."""
    torch.manual_seed(0)
    network = NETWORKS[name]().double().to(device)
    everything = torch.randn(2, BATCH, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
    labels = (torch.arange(BATCH) % 3)[share].to(device)
    outputs, by_input, losses = [], [], []
    with reference_moments(network):
        for images in everything[:, share]:
            images = images.to(device, copy=True).requires_grad_(True)
            out = network(images, labels).flatten(1).square().sum(1)
            (gradient,) = torch.autograd.grad(out.sum(), images, create_graph=True)
            losses.append(out.square().mean() + gradient.square().flatten(1).sum(1).mean())
            outputs.append(out.detach())
            by_input.append(gradient.detach())
    by_parameters = torch.autograd.grad(torch.stack(losses).sum(), list(network.parameters()))
    return {
        "outputs": torch.stack(outputs, 1).cpu(),
        "by_input": torch.stack(by_input, 1).cpu(),
        "by_parameters": [collectives.all_reduce_mean(gradient).cpu() for gradient in by_parameters],
        "vectors": [vector.cpu() for vector in power_iteration_vectors(network)],
    }


def distributed_derivatives(name: str) -> dict[str, Any]:
    runtime = Runtime()
    return derivatives(name, runtime.rank, runtime.world_size, runtime.device)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_layers_equal_one_process(ranks: RankPool, name: str, world_size: int) -> None:
    expected = derivatives(name, 0, 1)
    found = ranks.run(world_size, distributed_derivatives, name)
    for key in ("outputs", "by_input"):
        torch.testing.assert_close(torch.cat([f[key] for f in found]), expected[key], rtol=1e-10, atol=1e-11)
    for one in found:
        torch.testing.assert_close(one["by_parameters"], expected["by_parameters"], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(one["vectors"], expected["vectors"], rtol=0, atol=0)


def reference_share(training: bool) -> int:
    """Samples of the reference batch that this rank passes."""
    Runtime()
    network = Conditional("virtual").train(training)
    seen: list[int] = []
    network.before.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    with reference_moments(network):
        return seen[0]


@pytest.mark.parametrize(("world_size", "share"), [(2, 3), (3, 2), (4, 3)])
def test_ranks_share_a_reference_batch_that_they_do_not_divide(ranks: RankPool, world_size: int, share: int) -> None:
    assert ranks.run(world_size, reference_share, True) == [share] * world_size
    assert ranks.run(world_size, reference_share, False) == [6] * world_size


def gathered() -> list[Tensor]:
    """Rows, and the first two derivatives of a function of them all that differs between ranks."""
    runtime = Runtime()
    rows = torch.arange(4.0, dtype=torch.float64).view(2, 2) + 10 * runtime.rank
    rows.requires_grad_(True)
    everyone = collectives.all_gather(rows)
    loss = (runtime.rank + 1) * everyone.pow(3).sum()
    (first,) = torch.autograd.grad(loss, rows, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), rows)
    return [everyone.detach(), first.detach(), second]


def test_gathered_rows_and_their_derivatives(ranks: RankPool) -> None:
    """d/dx of (1 + 2 + ... + W) times the sum of x^3; and of the sum over ranks of that, once more."""
    for world_size in (1, 2, 4):
        rows = torch.cat([torch.arange(4.0, dtype=torch.float64).view(2, 2) + 10 * rank for rank in range(world_size)])
        factor = world_size * (world_size + 1) / 2
        for rank, (everyone, first, second) in enumerate(ranks.run(world_size, gathered)):
            own = rows[2 * rank : 2 * rank + 2]
            assert torch.equal(everyone, rows)
            torch.testing.assert_close(first, 3 * factor * own**2)
            torch.testing.assert_close(second, 6 * factor * own)


def of_one_rank() -> Tensor:
    runtime = Runtime()
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(3, kernels=2, dimensions=2, synchronized=False)
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(runtime.rank))
    alone = MinibatchDiscrimination(3, kernels=2, dimensions=2)
    alone.load_state_dict(layer.state_dict())
    return torch.stack((layer(features).detach(), alone(features).detach()))


def test_a_rank_can_be_compared_with_itself_only(ranks: RankPool) -> None:
    torch.manual_seed(0)
    layer = MinibatchDiscrimination(3, kernels=2, dimensions=2)
    for rank, (apart, together) in enumerate(ranks.run(2, of_one_rank)):
        features = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(apart, layer(features).detach())
        assert (together[:, 3:] > apart[:, 3:]).all(), "there are more others"
