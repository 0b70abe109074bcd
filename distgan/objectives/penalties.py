"""Penalties on the discriminator's gradient with respect to its input."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_gradient_norms(logits: Tensor, images: Tensor) -> Tensor:
    """Squared norm of d logit_i / d image_i over all of a sample's dimensions: shape (n,), differentiable.

    With batch norm a logit also depends on the other images; as in one process with the whole batch, the gradient
    taken is that of the sum of all logits of all ranks.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients.square().flatten(1).sum(1)


def r1(real_logits: Tensor, reals: Tensor, gamma: float) -> Tensor:
    """gamma/2 E |grad D(x)|^2 on real images, of the logit (Mescheder, Geiger, Nowozin 2018, eq. 9).

    Their released code's coefficient of 10 on the mean squared norm is gamma = 20 here.
    """
    return 0.5 * gamma * squared_gradient_norms(real_logits, reals).mean()
