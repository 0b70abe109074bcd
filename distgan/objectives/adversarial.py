"""Adversarial losses, as functions of logits. Every loss is a mean over the batch, float32, shape ().

A family is a pair: the discriminator's loss of (real logits, fake logits), and the generator's of fake logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Adversarial(NamedTuple):
    """The two losses of a family, both to be minimised."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]


def discriminator_cross_entropy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) with D = sigmoid(logit) (Goodfellow et al. 2014, eq. 1, negated)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_minimax(fake_logits: Tensor) -> Tensor:
    """E log(1 - D(G(z))) (Goodfellow et al. 2014, eq. 1); its gradient vanishes where D is sure."""
    return -F.softplus(fake_logits).mean()


def generator_non_saturating(fake_logits: Tensor) -> Tensor:
    """-E log D(G(z)) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


ADVERSARIAL = {
    "minimax": Adversarial(discriminator_cross_entropy, generator_minimax),
    "non_saturating": Adversarial(discriminator_cross_entropy, generator_non_saturating),
}
