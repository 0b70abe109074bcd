"""Normalization layers. Batch norm uses statistics over all ranks, or over one, and has no state in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.distributed import collectives
from distgan.networks.layers.labels import ClassTable
from distgan.networks.layers.virtual_batch_norm import VirtualBatchNorm


class BatchNorm(nn.Module):
    """Batch normalization (Ioffe and Szegedy 2015, algorithm 1) of (n, C) or (n, C, H, W) activations.

    In training mode it normalizes by the moments of the current micro-batch: over all ranks if `synchronized` (first
    and second derivatives included), over this rank otherwise. It tracks no running averages, so a skipped update has
    nothing to undo. `recompute_statistics` computes the statistics of evaluation mode from the weights when needed.

    Scales start at N(1, 0.02), offsets at 0 (Radford et al. 2016, released code). Without `affine` there are none.
    """

    def __init__(self, channels: int, *, synchronized: bool, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.synchronized = synchronized
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(channels).normal_(1.0, 0.02)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, activations: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(activations, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if self.synchronized and collectives.world_size() > 1:
            return self._normalize_synchronized(activations)
        return F.batch_norm(activations, None, None, self.weight, self.bias, training=True, eps=self.eps)

    def _normalize_synchronized(self, activations: Tensor) -> Tensor:
        mean, variance = collectives.batch_moments(activations, (0, *range(2, activations.dim())))
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = self.weight * scale
        offset = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = (1, -1, *(1,) * (activations.dim() - 2))
        return torch.addcmul(offset.view(shape), activations, scale.view(shape)).to(activations.dtype)

    def extra_repr(self) -> str:
        return f"{self.running_mean.numel()}, synchronized={self.synchronized}, eps={self.eps}"


class ConditionalNormalization(nn.Module):
    """Normalization with a scale 1 + gain(condition) and an offset(condition) per sample (Dumoulin et al. 2017).

    Activations (n, C) or (n, C, H, W). The modules `gain` and `offset` map the condition, whose rows are the samples,
    to (n, C). Activations may be of lower precision; scales and offsets are at least float32.
    """

    def __init__(self, kind: str, channels: int, gain: nn.Module, offset: nn.Module, *, eps: float) -> None:
        super().__init__()
        self.normalization = _build(kind, channels, affine=False, eps=eps)
        self.gain = gain
        self.offset = offset

    def forward(self, activations: Tensor, condition: Tensor) -> Tensor:
        shape = (*activations.shape[:2], *(1,) * (activations.dim() - 2))
        gain, offset = (collectives.at_least_float32(of(condition)).view(shape) for of in (self.gain, self.offset))
        return torch.addcmul(offset, self.normalization(activations), 1.0 + gain).to(activations.dtype)


@torch.no_grad()
def recompute_statistics(network: nn.Module, batches: Iterable[tuple[Any, ...]], *, across_ranks: bool = False) -> None:
    """Set the evaluation statistics of all batch-norm layers, torch's too, from forward passes over `batches`.

    Standing statistics (Brock et al. 2019, section 4.1): each layer's moments are averaged over the batches, and each
    batch is normalized by its own moments.

    Args:
        batches: positional arguments of `network`, one tuple per forward pass, all of the same batch size.
        across_ranks: average over the batches of all ranks; each rank passes any number of them, even none. Then it is
            collective: call on every rank, with the network on the device of the collectives. False averages over
            this process's batches without communication.
    """
    layers: list[Any] = [module for module in network.modules() if tracks_statistics(module)]
    if not layers:
        return
    channels = [layer.running_mean.numel() for layer in layers]
    device = layers[0].running_mean.device
    with ExitStack() as held:
        collected = [held.enter_context(_collecting(layer)) for layer in layers]
        total = torch.zeros(2 * sum(channels) + 1, dtype=torch.float64, device=device)
        for batch in batches:
            network(*batch)
            moments = [found[-1] for found in collected]
            for found in collected:
                found.clear()
            total += torch.cat((*(moment.flatten() for moment in moments), total.new_ones(1)))
    if across_ranks:
        total = collectives.all_reduce_sum(total)
    averages = (total[:-1] / total[-1]).split([2 * count for count in channels])
    for layer, average in zip(layers, averages, strict=True):
        mean, square = average.view(2, -1)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((square - mean.square()).clamp(min=0))  # rounding may make it negative


def tracks_statistics(module: nn.Module) -> bool:
    """Return True for batch norm of ours or torch's that has statistics for evaluation."""
    torchs = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    return torchs or isinstance(module, BatchNorm)


@contextmanager
def _collecting(layer: Any) -> Iterator[list[Tensor]]:
    """Make a batch-norm layer normalize by the moments of its input, and collect them: (2, C), E[x] and E[x^2]."""
    collected: list[Tensor] = []

    def forward(activations: Tensor) -> Tensor:
        mean, variance = collectives.batch_moments(
            activations.detach(), (0, *range(2, activations.dim())), synchronized=False
        )
        collected.append(torch.stack((mean.double(), variance.double() + mean.double().square())))
        return F.batch_norm(activations, None, None, layer.weight, layer.bias, training=True, eps=layer.eps)

    # In place of the method: a layer of torch's would synchronize, or change its buffers.
    layer.forward = forward
    try:
        yield collected
    finally:
        del layer.forward


def build_normalization(kind: str, channels: int, *, num_classes: int = 0) -> nn.Module:
    """Build the layer for a config's `normalization`; with classes, its forward pass also takes int64 labels (n,).

    Then scales of all classes start at 1, offsets at 0, and eps is 2e-5 (Miyato and Koyama 2018, released code).

    `layer` follows Gulrajani et al. 2017: moments over all channels and positions of a sample, and a scale and an
    offset per channel. `torch.nn.LayerNorm` has these per channel and position.
    """
    if num_classes:
        tables = [ClassTable(num_classes, channels) for _ in range(2)]
        return ConditionalNormalization(kind, channels, *tables, eps=2e-5)
    return _build(kind, channels, affine=True, eps=1e-5)


def _build(kind: str, channels: int, *, affine: bool, eps: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "layer":
        return nn.GroupNorm(1, channels, affine=affine, eps=eps)
    if kind == "virtual":
        return VirtualBatchNorm(channels, affine=affine, eps=eps)
    return BatchNorm(channels, synchronized=kind == "synchronized", affine=affine, eps=eps)


def centers_channels(kind: str) -> bool:
    """Return True if the normalization removes each channel's mean, so that a bias before it has no effect."""
    return kind in ("synchronized", "batch", "virtual")


def normalization_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the scales and offsets of all normalization layers."""
    kinds = (BatchNorm, VirtualBatchNorm, nn.GroupNorm, ConditionalNormalization)
    return [parameter for layer in network.modules() if isinstance(layer, kinds) for parameter in layer.parameters()]
