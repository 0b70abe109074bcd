"""Layers with which a discriminator compares the samples of a batch over all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distgan.config import MinibatchDiscriminationConfig
from distgan.distributed import collectives


class MinibatchDiscrimination(nn.Module):
    """Minibatch discrimination (Salimans et al. 2016, section 3.2): features (n, A) to (n, A + B).

    With M_i = f(x_i) T, a B x C matrix, c_b(x_i, x_j) = exp(-|M_ib - M_jb|_1), and o(x_i)_b is the sum of these over
    the other samples x_j. As in the released code, j = i is left out, which in the paper's sum is a constant 1. The
    next layer has the bias.

    Each column of T starts from N(0, 1/A), so its length is about 1, as in the released code, which fixes it at 1.
    Distances then have the scale of the features for any A. From N(0, 0.05), with the 8192 features of a DCGAN, the
    columns would be so long that every exp(-distance) and its gradient would start at 0.

    Args:
        features: A.
        kernels: B.
        dimensions: C.
        synchronized: compare with the samples of all ranks; False compares with those of this rank only.
    """

    def __init__(self, features: int, kernels: int, dimensions: int, *, synchronized: bool = True) -> None:
        super().__init__()
        self.kernels = kernels
        self.synchronized = synchronized
        self.projection = nn.Linear(features, kernels * dimensions, bias=False)
        nn.init.normal_(self.projection.weight, 0.0, features**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        own = collectives.at_least_float32(self.projection(features)).unflatten(1, (self.kernels, -1))
        everyone = collectives.all_gather(own) if self.synchronized else own
        first = collectives.rank() * len(own) if self.synchronized else 0
        places = torch.arange(len(everyone), device=own.device)
        itself = places == places[first : first + len(own), None]
        distances = (own[:, None] - everyone).abs().sum(3)
        similarities = (-distances).exp().masked_fill(itself[..., None], 0.0).sum(1)
        return torch.cat((features, similarities.to(features.dtype)), dim=1)

    def extra_repr(self) -> str:
        return f"kernels={self.kernels}, synchronized={self.synchronized}"


def build_minibatch_discrimination(
    config: MinibatchDiscriminationConfig | None, features: int
) -> tuple[nn.Module, int]:
    """Return the configured layer, or an identity for None, and its number of output features."""
    if config is None:
        return nn.Identity(), features
    synchronized = config.over == "global"
    layer = MinibatchDiscrimination(features, config.kernels, config.dimensions, synchronized=synchronized)
    return layer, features + config.kernels


class MinibatchStddev(nn.Module):
    """Minibatch standard deviation (Karras et al. 2018, section 3): (n, C, H, W) to (n, C + 1, H, W).

    In the micro-batch of all ranks, N samples, those with equal indices modulo N / group_size form a group. The new
    channel of a group is the mean over channels and positions of the standard deviation over its samples,
    sqrt(variance + 1e-8) with the biased variance (released code).

    Args:
        group_size: a divisor of N, or more than N for one group of all N.
    """

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.group_size = group_size

    def forward(self, activations: Tensor) -> Tensor:
        count = len(activations)
        total = count * collectives.world_size()
        size = min(self.group_size, total)
        assert total % size == 0, "the config says that it divides"
        groups = total // size
        group = (
            torch.arange(collectives.rank() * count, (collectives.rank() + 1) * count, device=activations.device)
            % groups
        )

        def group_means(values: Tensor) -> Tensor:
            sums = values.new_zeros(groups, *values.shape[1:]).index_add(0, group, values)
            return collectives.all_reduce_sum(sums) / size

        wide = collectives.at_least_float32(activations)
        variances = group_means((wide - group_means(wide)[group]).square())
        stddev = (variances + 1e-8).sqrt().mean((1, 2, 3))[group]
        channel = stddev.view(-1, 1, 1, 1).expand(-1, 1, *activations.shape[2:])
        return torch.cat((activations, channel.to(activations.dtype)), dim=1)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"
