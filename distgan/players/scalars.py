"""What is read off a micro-batch beside its losses: what the discriminator says, and how varied samples are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distgan.config.objective import LossFamily
from distgan.losses.adversarial import discriminator_cross_entropy


@torch.no_grad()
def discriminator_scalars(family: LossFamily, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    """What the discriminator says of both kinds, and its estimate of the divergence that the family stands for.

    Only with a cross-entropy is sigmoid(logit) the probability of being real; elsewhere the output is a mere value.
    The Jensen-Shannon divergence is (V + 2 log 2) / 2 of the minimax value V, in nats (Goodfellow et al. 2014,
    theorem 1); the Wasserstein distance, up to the critic's Lipschitz constant, is E f(x) - E f(G(z)).
    """
    found = {"discriminator/real_logit": real_logits.mean(), "discriminator/fake_logit": fake_logits.mean()}
    if family.estimates_wasserstein:
        return found | {"divergence/wasserstein": real_logits.mean() - fake_logits.mean()}
    if family.log_odds:
        found["discriminator/real_probability"] = real_logits.sigmoid().mean()
        found["discriminator/fake_probability"] = fake_logits.sigmoid().mean()
        value = -discriminator_cross_entropy(real_logits, fake_logits)
        found["divergence/jensen_shannon"] = 0.5 * value + math.log(2.0)
    return found


@torch.no_grad()
def diversity(name: str, samples: Tensor) -> dict[str, Tensor]:
    """Mean absolute difference between neighbors in the batch, 0 when all are alike; of pairs, so that even shares of
    any number of ranks compare the same. Nothing for a single sample."""
    pairs = len(samples) // 2
    if not pairs:
        return {}
    return {name: (samples[0 : 2 * pairs : 2] - samples[1 : 2 * pairs : 2]).abs().float().mean()}
