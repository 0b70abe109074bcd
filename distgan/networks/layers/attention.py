"""Self-attention over the positions of a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Non-local block of SAGAN and BigGAN: activations (n, C, H, W), C >= 8 and H, W even, to the same shape.

    x + gamma o(sum_j softmax_j(theta(x)_i . phi(x)_j) g(x)_j): each position i looks at positions j of half the
    resolution, the maxima over 2x2. The products are not scaled. gamma starts at 0, so that the layer starts as the
    identity.

    Zhang et al., "Self-Attention Generative Adversarial Networks", ICML 2019, as its released code and that of BigGAN
    have it: in the paper, positions are not pooled and g has C/8 channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=False)
        # Of one dimension, because FSDP2 cannot shard a scalar.
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, activations: Tensor) -> Tensor:
        height, width = activations.shape[2:]
        queries = self.theta(activations).flatten(2)
        keys = F.max_pool2d(self.phi(activations), 2).flatten(2)
        values = F.max_pool2d(self.g(activations), 2).flatten(2)
        # Not `scaled_dot_product_attention`, whose fast kernels lack the second derivative of gradient penalties.
        weights = torch.bmm(queries.transpose(1, 2), keys).softmax(-1)
        looked_at = torch.bmm(values, weights.to(values.dtype).transpose(1, 2)).unflatten(2, (height, width))
        out: Tensor = activations + self.gamma.to(activations.dtype) * self.o(looked_at)
        return out
