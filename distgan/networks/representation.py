"""Features of a network's convolutions as a representation of images.

Radford, Metz, Chintala, "Unsupervised Representation Learning with Deep Convolutional GANs", ICLR 2016, section 5.1:
the features of all convolutional layers of the discriminator, each max-pooled to 4x4, flattened and concatenated.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.layers.equalized import EqualizedConv2d
from distgan.networks.layers.virtual_batch_norm import reference_moments

_SIDE = 4
Convolution = (nn.Conv2d, EqualizedConv2d)


@torch.no_grad()
def convolution_features(network: nn.Module, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Compute the features of all convolutions with kernels larger than 1x1.

    Features are taken after the normalization and activation that follow a convolution. Those smaller than 4x4 are
    left out.

    Args:
        network: a discriminator of any architecture; its training mode is not changed.
        images, labels: its inputs.

    Returns:
        Shape (n, 16 * channels of all convolutions), float32.

    Raises:
        UserError: the network has no such convolution.
    """
    recorder = _Recorder()
    handles = [
        module.register_forward_hook(recorder)
        for name, module in network.named_modules()
        if isinstance(module, Convolution) or (not any(module.children()) and "parametrizations" not in name.split("."))
    ]
    try:
        with reference_moments(network):
            # The pass of virtual batch norm's reference batch was also recorded.
            recorder.forget()
            network(images, labels)
    finally:
        for handle in handles:
            handle.remove()
    return recorder.features()


class _Recorder:
    """Forward hook: keeps the last output of a convolution's shape before a layer of another shape follows."""

    def __init__(self) -> None:
        self._pooled: list[Tensor] = []
        self._last: Tensor | None = None

    def __call__(self, module: nn.Module, _inputs: object, output: Tensor) -> None:
        if isinstance(module, Convolution):
            if _kernel_size(module) > 1:
                self._pool()
                self._last = output
        elif self._last is not None and output.shape == self._last.shape:
            self._last = output

    def forget(self) -> None:
        self._pooled, self._last = [], None

    def features(self) -> Tensor:
        self._pool()
        if not self._pooled:
            raise UserError(
                "probe: the discriminator has no convolution with features of at least 4x4; probe a convolutional one"
            )
        return torch.cat(self._pooled, dim=1)

    def _pool(self) -> None:
        if self._last is not None and min(self._last.shape[2:]) >= _SIDE:
            self._pooled.append(F.adaptive_max_pool2d(self._last.float(), _SIDE).flatten(1))
        self._last = None


def _kernel_size(module: nn.Module) -> int:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size[0]
    assert isinstance(module, EqualizedConv2d)
    return module.weight.shape[2]
