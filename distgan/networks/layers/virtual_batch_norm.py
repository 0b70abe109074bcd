"""Virtual batch normalization (Salimans et al. 2016, section 3.5).

Each sample is normalized by the moments of a fixed reference batch, mixed with a small share of its own moments. The
output for a sample therefore does not depend on the other samples of its batch. The reference batch is a buffer of the
network (`add_reference`), and part of checkpoints and exports. `reference_moments` computes its moments from the
current weights for all forward passes inside; no module stores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distgan.distributed import collectives


class _Moments(NamedTuple):
    mean: Tensor
    variance: Tensor
    samples: int


class _Collect(NamedTuple):
    samples: int
    synchronized: bool


_REFERENCE: dict[nn.Module, _Moments | _Collect] = {}


class VirtualBatchNorm(nn.Module):
    """Virtual batch normalization of (n, C) or (n, C, H, W) activations.

    With n samples in the reference batch and c = 1/(n + 1), the mean is c m_x + (1 - c) m_ref and the mean square
    c E[x^2] + (1 - c) E_ref[x^2]. To avoid cancellation, their variance is computed as
    c v_x + (1 - c) v_ref + c (1 - c) (m_x - m_ref)^2. The moments m_x, v_x of a sample are over its positions. The
    reference batch itself is normalized by its own moments only. Gradients flow through both. Scales start at
    N(1, 0.02), offsets at 0 (released code, imagenet/model.py). Without `affine` there are none.
    """

    def __init__(self, channels: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, activations: Tensor) -> Tensor:
        reference = _REFERENCE.get(self)
        assert reference is not None, "a network with virtual batch norm runs inside `reference_moments`"
        positions = tuple(range(2, activations.dim()))
        if isinstance(reference, _Collect):
            mean, variance = collectives.batch_moments(
                activations, (0, *positions), synchronized=reference.synchronized
            )
            _REFERENCE[self] = _Moments(mean, variance, reference.samples)
            mean, variance = mean[None], variance[None]
        else:
            own = 1.0 / (reference.samples + 1)
            mean, variance = _own_moments(activations, positions)
            gap = mean - reference.mean
            mean = own * mean + (1.0 - own) * reference.mean
            variance = own * variance + (1.0 - own) * reference.variance + own * (1.0 - own) * gap.square()
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = self.weight * scale
        offset = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (*scale.shape, *(1,) * len(positions))
        return torch.addcmul(offset.view(shape), activations, scale.view(shape)).to(activations.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


def add_reference(network: nn.Module, count: int | None, sizes: tuple[int, ...], *, labeled: bool) -> None:
    """Add buffers for the reference batch to a network: `reference` (count, *sizes), and `reference_labels` (count,).

    A network without virtual batch norm is left as it is.

    Args:
        count: number of samples; None only without virtual batch norm, since a full config fills it in.
        sizes: (latent_size,) for a generator, the sizes of a sample for a discriminator.
    """
    if uses_reference(network):
        assert count is not None, "reference_size: filled in by the full config"
        network.register_buffer("reference", torch.zeros(count, *sizes))
        network.register_buffer("reference_labels", torch.zeros(count, dtype=torch.int64) if labeled else None)


def set_reference(network: nn.Module, samples: Tensor, labels: Tensor | None) -> None:
    """Set the reference batch; its shape is that passed to `add_reference`."""
    with torch.no_grad():
        network.get_buffer("reference").copy_(samples)
        if labels is not None:
            network.get_buffer("reference_labels").copy_(labels)


def uses_reference(network: nn.Module) -> bool:
    """Return True if a network has virtual batch norm, and so a reference batch."""
    return any(isinstance(module, VirtualBatchNorm) for module in network.modules())


@contextmanager
def reference_moments(network: nn.Module) -> Iterator[None]:
    """Compute the moments of the reference batch from the current weights, for all forward passes inside.

    In training mode the ranks share the work, so this is collective: call on every rank. The batch is split into as
    many equal parts as divide both it and the number of ranks; equally many ranks process each part. Inside another
    such block for the same network the outer moments are used.
    """
    layers = [module for module in network.modules() if isinstance(module, VirtualBatchNorm)]
    if not layers or layers[0] in _REFERENCE:
        yield
        return
    samples = network.get_buffer("reference")
    labels = network.get_buffer("reference_labels") if network.reference_labels is not None else None
    parts = math.gcd(len(samples), collectives.world_size()) if network.training else 1
    collect = _Collect(len(samples), synchronized=parts > 1)
    if parts > 1:
        part = collectives.rank() % parts
        samples = samples.chunk(parts)[part]
        labels = labels.chunk(parts)[part] if labels is not None else None
    try:
        _REFERENCE.update(dict.fromkeys(layers, collect))
        network.forward(samples, labels)
        yield
    finally:
        for layer in layers:
            _REFERENCE.pop(layer, None)


def _own_moments(activations: Tensor, positions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute mean and variance of each sample and channel over positions, (n, C) each, at least float32."""
    wide = collectives.at_least_float32(activations)
    if not positions:
        return wide, torch.zeros_like(wide)
    variance, mean = torch.var_mean(wide, positions, correction=0)
    return mean, variance
