"""Resampling of images with the filter [1, 3, 3, 1] (Karras et al. 2020, appendix B; Huang et al. 2024).

All are depthwise convolutions with a constant weight: cuDNN has kernels for both memory formats, autograd
differentiates them any number of times, and the filter's multiples of 1/64 are exact in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upsample(nn.Module):
    """Double the size: insert zeros between the pixels, then apply the filter [1, 3, 3, 1] / 4 along each axis."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv_transpose2d(images, _binomial(images, 4.0), stride=2, padding=1, groups=images.shape[1])


class Downsample(nn.Module):
    """Half the size: the filter [1, 3, 3, 1] / 8 along each axis, with a zero beyond each border."""

    def forward(self, images: Tensor) -> Tensor:
        return F.conv2d(images, _binomial(images, 1.0), stride=2, padding=1, groups=images.shape[1])


def blur(images: Tensor, *, padding: int, gain: float = 1.0) -> Tensor:
    """Apply the filter [1, 3, 3, 1] / 8 along each axis, times `gain`: (n, C, H, W) to (n, C, H + 2 padding - 3, ...).

    Args:
        padding: zeros beyond each border.
    """
    return F.conv2d(images, _binomial(images, gain), padding=padding, groups=images.shape[1])


def _binomial(images: Tensor, total: float) -> Tensor:
    # [1, 3, 3, 1] / 8, computed on the device, because a copy from a list would synchronize with the host.
    line = 0.5 - 0.25 * (torch.arange(4, device=images.device, dtype=images.dtype) - 1.5).abs()
    return (total * torch.outer(line, line)).expand(images.shape[1], 1, 4, 4)
