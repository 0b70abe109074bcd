"""Modulated convolutions (Karras et al. 2020, section 2.2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.distributed.collectives import at_least_float32
from distgan.networks.layers.equalized import EqualizedLinear, ScaledLeakyReLU
from distgan.networks.layers.resampling import blur

_EPS = 1e-8


class ModulatedConv2d(nn.Module):
    """Convolution whose input channels each sample scales by its style, with outputs scaled back to unit variance.

    With the scales s = A(style), the weights of a sample are w'_oik = s_i w_oik / sqrt(sum_ik (s_i w_oik)^2 + 1e-8)
    (eqs. 1 and 3). The scales depend on neither o nor k, and the divisor depends only on o. So the activations are
    scaled before and after one convolution that all samples share, which is the same function. The paper's code offers
    this beside a grouped convolution with one group per sample. Here it is the only form, because
    - the grouped form holds weights for each sample: 0.6 GB for 64 samples of 512 by 512 channels in float32, and as
      much for their gradient, while the divisors take one product of (n, inputs) by (inputs, outputs);
    - a batch in the channels of one sample is a copy in channels_last, and grouped convolutions have slow gradients;
    - an ordinary convolution and elementwise products have derivatives of every order, which path length needs.

    Scales and divisors are float32 under autocast. Outputs before the division have a standard deviation of
    sqrt(fan_in), but bfloat16 has the range of float32, so the paper's code's limits for float16 are not needed.

    Args:
        style_size: length of a style.
        upsample: insert zeros between the pixels first, and apply the filter [1, 3, 3, 1] afterward.
        demodulate: divide; otherwise scale the weights by 1 / sqrt(fan_in).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel_size: int,
        style_size: int,
        *,
        upsample: bool = False,
        demodulate: bool = True,
    ) -> None:
        super().__init__()
        self.affine = EqualizedLinear(style_size, inputs, gain=1.0, bias=1.0)
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel_size, kernel_size))
        self.upsample = upsample
        self.demodulate = demodulate

    def forward(self, activations: Tensor, style: Tensor) -> Tensor:
        with torch.autocast(style.device.type, enabled=False):
            scales = self.affine(at_least_float32(style))
            if self.demodulate:
                squares = self.weight.square().sum((2, 3))
                factors = (scales.square() @ squares.t() + _EPS).rsqrt()
            else:
                scales = scales / math.sqrt(self.weight[0].numel())
        out = self._convolve(activations * _per_channel(scales, activations))
        return out * _per_channel(factors, out) if self.demodulate else out

    def _convolve(self, activations: Tensor) -> Tensor:
        if self.upsample:
            return blur(F.conv_transpose2d(activations, self.weight.transpose(0, 1), stride=2), padding=1, gain=4.0)
        return F.conv2d(activations, self.weight, padding=self.weight.shape[-1] // 2)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, upsample={self.upsample}, demodulate={self.demodulate}"


class StyledLayer(nn.Module):
    """Modulated 3x3 convolution, strength times noise, bias, LeakyReLU: (n, inputs, r, r) to (n, outputs, R, R).

    R is 2r with `upsample`, else r. Noise is (n, 1, R, R), or (1, 1, R, R) for all samples.
    """

    def __init__(self, inputs: int, outputs: int, style_size: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.convolution = ModulatedConv2d(inputs, outputs, 3, style_size, upsample=upsample)
        # Not a scalar, because FSDP2 cannot shard scalars.
        self.noise_strength = nn.Parameter(torch.zeros(1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.activation = ScaledLeakyReLU()

    def forward(self, activations: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        out = self.convolution(activations, style)
        noise = noise.to(self.noise_strength.dtype) * self.noise_strength
        out = out + noise.to(out.dtype) + self.bias[:, None, None].to(out.dtype)
        activated: Tensor = self.activation(out)
        return activated


class ToImage(nn.Module):
    """Modulated 1x1 convolution to image channels and a bias, at least float32: images are summed over resolutions."""

    def __init__(self, inputs: int, channels: int, style_size: int) -> None:
        super().__init__()
        self.convolution = ModulatedConv2d(inputs, channels, 1, style_size, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, activations: Tensor, style: Tensor) -> Tensor:
        images: Tensor = at_least_float32(self.convolution(activations, style)) + self.bias[:, None, None]
        return images


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values[:, :, None, None].to(like.dtype)
