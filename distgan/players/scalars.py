"""Scalars of a micro-batch besides its losses: discriminator outputs, divergences and sample diversity."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from distgan.config.objective import LossOptions
from distgan.losses.adversarial import Minimax


@torch.no_grad()
def discriminator_scalars(loss: LossOptions, real_logits: Tensor, fake_logits: Tensor) -> dict[str, Tensor]:
    """Return the mean discriminator outputs, and the divergence that the loss estimates.

    sigmoid(logit) is the probability of being real only with a cross-entropy; with other losses it is not reported.
    The Jensen-Shannon divergence is (V + 2 log 2) / 2 of the minimax value V, in nats (Goodfellow et al. 2014,
    theorem 1); the Wasserstein distance, up to the critic's Lipschitz constant, is E f(x) - E f(G(z)).
    """
    found = {"discriminator/real_logit": real_logits.mean(), "discriminator/fake_logit": fake_logits.mean()}
    if loss.estimates_wasserstein:
        return found | {"divergence/wasserstein": real_logits.mean() - fake_logits.mean()}
    if loss.log_odds:
        found["discriminator/real_probability"] = real_logits.sigmoid().mean()
        found["discriminator/fake_probability"] = fake_logits.sigmoid().mean()
        value = -Minimax().discriminator(real_logits, fake_logits)
        found["divergence/jensen_shannon"] = 0.5 * value + math.log(2.0)
    return found


@torch.no_grad()
def augmentation_scalars(loss: LossOptions, real_logits: Tensor, probability: float | Tensor) -> dict[str, Tensor]:
    """Return the probability of the augmentation, and the mean sign of the logits of reals if it means anything.

    The sign statistic, r_t of Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data", section
    3, is 1 if the discriminator is certain of all reals that it was trained on.
    """
    zero = torch.zeros((), dtype=torch.float64, device=real_logits.device)
    found = {"augmentation/probability": zero + probability}
    if loss.zero_is_boundary:
        found["augmentation/sign"] = real_logits.sign().mean()
    return found


@torch.no_grad()
def diversity(name: str, samples: Tensor) -> dict[str, Tensor]:
    """Return the mean absolute difference between the samples of each pair (0, 1), (2, 3), ...; 0 if all are equal.

    Disjoint pairs give the same result for any number of ranks with an even local batch. Empty for a single sample.
    """
    pairs = len(samples) // 2
    if not pairs:
        return {}
    return {name: (samples[0 : 2 * pairs : 2] - samples[1 : 2 * pairs : 2]).abs().float().mean()}
