"""Layers with an equalized learning rate, and pixel norm (Karras et al., "Progressive Growing of GANs", ICLR 2018)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RELU_GAIN = math.sqrt(2.0)
"""He's gain (He et al. 2015) for a layer before a rectifier."""


class EqualizedConv2d(nn.Module):
    """Convolution with weights stored as N(0, 1) and scaled by gain / sqrt(fan_in) in each forward pass.

    Optimizers that normalize their steps then train all layers at equal speed, for any range of weights (section 4.1).
    Biases start at 0 and are not scaled.

    Args:
        gain: sqrt(2) before a rectifier, 1 for a linear output.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        gain: float = RELU_GAIN,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride = stride
        self.padding = padding
        self.scale = gain / math.sqrt(inputs * kernel_size**2)

    def forward(self, activations: Tensor) -> Tensor:
        return F.conv2d(activations, self.weight * self.scale, self.bias, stride=self.stride, padding=self.padding)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}, scale={self.scale:.4g}"


class EqualizedLinear(nn.Module):
    """Dense layer with equalized learning rate, as in `EqualizedConv2d`: (n, inputs) to (n, outputs).

    Args:
        rate: multiplier of the learning rate. Weights and biases are stored divided by it, and multiplied by it in each
            forward pass (Karras et al. 2019, appendix C).
        bias: initial bias.
    """

    def __init__(
        self, inputs: int, outputs: int, *, gain: float = RELU_GAIN, rate: float = 1.0, bias: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale = gain * rate / math.sqrt(inputs)
        self.rate = rate

    def forward(self, activations: Tensor) -> Tensor:
        return F.linear(activations, self.weight * self.scale, self.bias * self.rate)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, scale={self.scale:.4g}, rate={self.rate:.4g}"


class ScaledLeakyReLU(nn.Module):
    """sqrt(2) LeakyReLU(0.2), which keeps the scale of activations (Karras et al. 2020, released code).

    `RELU_GAIN` in the layer before would scale its outputs alike, but not its bias.
    """

    def forward(self, activations: Tensor) -> Tensor:
        return F.leaky_relu(activations, 0.2) * RELU_GAIN


def pixel_norm(activations: Tensor, eps: float = 1e-8) -> Tensor:
    """x / sqrt(mean over channels of x^2 + eps) at each pixel of (n, C, ...) activations (section 4.2)."""
    return activations * (activations.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class PixelNorm(nn.Module):
    """`pixel_norm` as a layer."""

    def forward(self, activations: Tensor) -> Tensor:
        return pixel_norm(activations)
