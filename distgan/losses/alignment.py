"""Alignment of a discriminator's tokens with those of a frozen network (Hyun et al. 2026, "Scalable GANs with
Transformers"; GAT's released code, losses/Rp_PT_loss.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distgan.errors import UserError


def alignment(projected: Tensor, tokens: Tensor, known: Tensor | None = None) -> Tensor:
    """Return the mean over samples of 1 - cos of the class tokens, plus the mean over patches of 1 - cos, shape ().

    Args:
        projected: (n, 1 + s^2, d), of the discriminator, the class token first.
        tokens: (n, 1 + t^2, d), of the frozen network; they are interpolated to s^2 patches.
        known: (n,) bool, False for samples that count 0, whose tokens are of another image; None if there are none.

    Raises:
        UserError: `projected` has another shape.
    """
    side = round((projected.shape[1] - 1) ** 0.5) if projected.ndim == 3 else 0
    if not side or projected.shape != (len(tokens), 1 + side**2, tokens.shape[2]):
        raise UserError(
            f"objective.alignment: the discriminator's layer projector has outputs of shape {tuple(projected.shape)}, "
            f"expected (n, 1 + side^2, {tokens.shape[2]}), the class token first",
            everywhere=True,
        )
    tokens = tokens.to(projected.dtype)
    patches = tokens[:, 1:]
    if patches.shape[1] != side**2:
        grid = patches.mT.unflatten(2, (round(patches.shape[1] ** 0.5), -1))
        patches = F.interpolate(grid, (side, side), mode="bicubic").flatten(2).mT
    losses = 1.0 - F.cosine_similarity(projected[:, 0], tokens[:, 0], dim=-1)
    losses = losses + (1.0 - F.cosine_similarity(projected[:, 1:], patches, dim=-1)).mean(1)
    return losses.mean() if known is None else torch.where(known, losses, 0.0).mean()
