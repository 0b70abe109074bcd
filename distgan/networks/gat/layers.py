"""Layers of both GAT networks: positions of patches, attention with rotated queries and keys, gated dense layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.networks.shape import SampleShape

LEVELS = 4
"""Outputs of the generator, each after as many blocks."""
_BASE = 10_000.0
_EPS = 1e-6


def patches_per_side(role: str, shape: SampleShape, patch_size: int, width: int, heads: int, depth: int) -> int:
    """Return the number of patches along a side.

    Raises:
        UserError: sizes do not divide each other.
    """
    if shape.resolution % patch_size:
        raise UserError(
            f"{role}.patch_size = {patch_size}: does not divide data.resolution = {shape.resolution}; change one of "
            "them"
        )
    if width % (4 * heads):
        raise UserError(
            f"{role}.heads = {heads}: found {role}.width = {width}, expected a multiple of 4 x {heads} = {4 * heads}; "
            "change one of them"
        )
    if depth % LEVELS:
        raise UserError(f"{role}.depth = {depth}: expected a multiple of {LEVELS}, one part for each output level")
    return shape.resolution // patch_size


def fixed_positions(width: int, side: int) -> Tensor:
    """Return vectors (side^2, width) of the cells of a grid, row by row: sines and cosines of the column, then the row.

    Each coordinate has width/4 frequencies from 1 down to nearly 1/10,000 (Vaswani et al. 2017, section 3.5, in two
    dimensions as in MAE's released code).
    """
    places = torch.arange(side, dtype=torch.float64)
    rates = _BASE ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = places[:, None] * rates
    along = torch.cat((angles.sin(), angles.cos()), dim=1)
    columns, rows = along.repeat(side, 1), along.repeat_interleave(side, dim=0)
    return torch.cat((columns, rows), dim=1).float()


class Rotation(nn.Module):
    """Rotary embedding of queries or keys (n, heads, tokens, size) by the rows and columns of a grid (Su et al. 2021).

    The first half of the channels turns with the row, the second with the column, in pairs of neighbors. Tokens before
    the last side^2, such as a class token, are not turned.
    """

    def __init__(self, size: int, side: int) -> None:
        super().__init__()
        rates = _BASE ** -(torch.arange(0, size // 2, 2).double() / (size // 2))
        angles = (torch.arange(side).double()[:, None] * rates).repeat_interleave(2, dim=1)
        rows, columns = angles.repeat_interleave(side, dim=0), angles.repeat(side, 1)
        turned = torch.cat((rows, columns), dim=1)
        self.register_buffer("cosines", turned.cos().float(), persistent=False)
        self.register_buffer("sines", turned.sin().float(), persistent=False)
        self.cosines: Tensor
        self.sines: Tensor

    def forward(self, vectors: Tensor) -> Tensor:
        before, cells = vectors.split((vectors.shape[2] - len(self.sines), len(self.sines)), dim=2)
        first, second = cells.unflatten(3, (-1, 2)).unbind(4)
        across = torch.stack((-second, first), dim=4).flatten(3)
        turned = cells * self.cosines.to(cells.dtype) + across * self.sines.to(cells.dtype)
        return torch.cat((before, turned), dim=2)


class Attention(nn.Module):
    """Self-attention over tokens (n, tokens, width), with normalized and rotated queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = dense(width, 3 * width)
        self.query_norm, self.key_norm = RootMeanSquareNorm(width // heads), RootMeanSquareNorm(width // heads)
        self.output = dense(width, width)

    def forward(self, tokens: Tensor, rotation: Rotation) -> Tensor:
        split = self.inputs(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        queries, keys, values = split.unbind(0)
        queries, keys = rotation(self.query_norm(queries)), rotation(self.key_norm(keys))
        found = F.scaled_dot_product_attention(queries.to(values.dtype), keys.to(values.dtype), values)
        mixed: Tensor = self.output(found.transpose(1, 2).flatten(2))
        return mixed


class GatedDense(nn.Module):
    """W3 (silu(W1 x) * W2 x) with 8/3 of the width inside (SwiGLU; Shazeer 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inside = int(2 / 3 * 4 * width)
        self.inputs, self.output = dense(width, 2 * inside), dense(inside, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, values = self.inputs(tokens).chunk(2, dim=-1)
        found: Tensor = self.output(F.silu(gate) * values)
        return found


class SlowDense(nn.Module):
    """Dense layer (n, inputs) to (n, outputs) with a hundredth of the learning rate.

    Weights and biases are stored multiplied by 100 and divided by it in each forward pass.
    """

    rate = 0.01

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.xavier_uniform_(self.weight, gain=1 / self.rate)

    def forward(self, vectors: Tensor) -> Tensor:
        return F.linear(vectors, self.weight * self.rate, self.bias * self.rate)


def dense(inputs: int, outputs: int, *, gain: float = 1.0) -> nn.Linear:
    """Return a dense layer of Glorot's uniform weights (Glorot and Bengio 2010), with biases of 0."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, gain=gain)
    nn.init.zeros_(layer.bias)
    return layer


class RootMeanSquareNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` whose scales have the precision of its input: torch has no fused kernel for mixed ones."""

    def forward(self, vectors: Tensor) -> Tensor:
        scales = None if self.weight is None else self.weight.to(vectors.dtype)
        return F.rms_norm(vectors, self.normalized_shape, scales, self.eps)


def root_mean_square_norm(width: int, *, scaled: bool) -> RootMeanSquareNorm:
    """Return x / sqrt(mean x^2 + 1e-6), times learned scales if `scaled` (Zhang and Sennrich 2019)."""
    return RootMeanSquareNorm(width, eps=_EPS, elementwise_affine=scaled)
