"""Adversarial losses, as functions of logits or of critic values.

A family is a pair of losses to minimize: the discriminator's and the generator's. Both take (real logits, fake logits),
each of shape (n,), and return the mean over the batch, shape (). Relativistic averages use means over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from distgan.config import LabelSmoothingConfig
from distgan.distributed import collectives


class Adversarial(NamedTuple):
    """The two losses of a family."""

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]
    """Generator loss. Losses that are not relativistic ignore the real logits, which may be None."""


def discriminator_cross_entropy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))) with D = sigmoid(logit) (Goodfellow et al. 2014, eq. 1, negated)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_minimax(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E log(1 - D(G(z))) (Goodfellow et al. 2014, eq. 1); its gradient vanishes where D is certain."""
    return -F.softplus(fake_logits).mean()


def generator_non_saturating(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log D(G(z)) (Goodfellow et al. 2014, section 3)."""
    return F.softplus(-fake_logits).mean()


def discriminator_least_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2 (Mao et al. 2017, eq. 9), of raw outputs."""
    return 0.5 * ((real_logits - 1.0).square().mean() + fake_logits.square().mean())


def generator_least_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 E (D(G(z)) - 1)^2 (Mao et al. 2017, eq. 9)."""
    return 0.5 * (fake_logits - 1.0).square().mean()


def discriminator_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (Lim and Ye 2017; Miyato et al. 2018, eq. 16)."""
    return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()


def discriminator_wasserstein(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E f(G(z)) - E f(x) (Arjovsky et al. 2017, algorithm 1, negated; their released code has f of opposite sign)."""
    return fake_logits.mean() - real_logits.mean()


def generator_wasserstein(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E f(G(z)) (Arjovsky et al. 2017, algorithm 1), also of the hinge family (Miyato et al. 2018, eq. 17)."""
    return -fake_logits.mean()


def discriminator_relativistic_paired(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log sigmoid(C(x) - C(G(z))), the i-th real with the i-th fake (Jolicoeur-Martineau 2018, RSGAN)."""
    return F.softplus(fake_logits - real_logits).mean()


def generator_relativistic_paired(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E log sigmoid(C(G(z)) - C(x)) (Jolicoeur-Martineau 2018, RSGAN)."""
    return F.softplus(real_logits - fake_logits).mean()


def discriminator_relativistic_average(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-1/2 E log sigmoid(C(x) - mean C(G(z))) - 1/2 E log(1 - sigmoid(C(G(z)) - mean C(x))) (RaSGAN).

    Jolicoeur-Martineau 2018. The factor 1/2 here and in the two families below is from the released code.
    """
    real, fake = _relative(real_logits, fake_logits)
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_relativistic_average(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss with real and fake logits exchanged (RaSGAN)."""
    return discriminator_relativistic_average(fake_logits, real_logits)


def discriminator_relativistic_average_least_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 E (C(x) - mean C(G(z)) - 1)^2 + 1/2 E (C(G(z)) - mean C(x) + 1)^2 (RaLSGAN)."""
    real, fake = _relative(real_logits, fake_logits)
    return 0.5 * ((real - 1.0).square().mean() + (fake + 1.0).square().mean())


def generator_relativistic_average_least_squares(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss with real and fake logits exchanged (RaLSGAN)."""
    return discriminator_relativistic_average_least_squares(fake_logits, real_logits)


def discriminator_relativistic_average_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """1/2 E max(0, 1 - (C(x) - mean C(G(z)))) + 1/2 E max(0, 1 + (C(G(z)) - mean C(x))) (RaHingeGAN)."""
    real, fake = _relative(real_logits, fake_logits)
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def generator_relativistic_average_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss with real and fake logits exchanged (RaHingeGAN)."""
    return discriminator_relativistic_average_hinge(fake_logits, real_logits)


def _relative(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract from each side the other side's mean over all ranks; gradients flow through the means."""
    means = collectives.all_reduce_mean(torch.stack((real_logits.mean(), fake_logits.mean())))
    return real_logits - means[1], fake_logits - means[0]


ADVERSARIAL = {
    "minimax": Adversarial(discriminator_cross_entropy, generator_minimax),
    "non_saturating": Adversarial(discriminator_cross_entropy, generator_non_saturating),
    "least_squares": Adversarial(discriminator_least_squares, generator_least_squares),
    "hinge": Adversarial(discriminator_hinge, generator_wasserstein),
    "wasserstein": Adversarial(discriminator_wasserstein, generator_wasserstein),
    "relativistic_paired": Adversarial(discriminator_relativistic_paired, generator_relativistic_paired),
    "relativistic_average": Adversarial(discriminator_relativistic_average, generator_relativistic_average),
    "relativistic_average_least_squares": Adversarial(
        discriminator_relativistic_average_least_squares, generator_relativistic_average_least_squares
    ),
    "relativistic_average_hinge": Adversarial(
        discriminator_relativistic_average_hinge, generator_relativistic_average_hinge
    ),
}


def targeted_cross_entropy(
    real_logits: Tensor, fake_logits: Tensor, real_targets: Tensor, fake_targets: Tensor
) -> Tensor:
    """The discriminator's cross-entropy with a target in [0, 1] per sample; all arguments have shape (n,).

    With targets alpha and beta the optimal D is (alpha p + beta q) / (p + q): with beta = 0, one-sided label
    smoothing, it still vanishes off the data (Salimans et al. 2016, section 3.4).
    """
    return _cross_entropy(real_logits, real_targets).mean() + _cross_entropy(fake_logits, fake_targets).mean()


def draw_targets(config: LabelSmoothingConfig, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Compute targets of n real and n generated samples, (n,) each, from uniforms in [0, 1), shape (n, 4)."""
    real, fake = _from_range(config.real, uniforms[:, 0]), _from_range(config.fake, uniforms[:, 1])
    flip_real, flip_fake = (uniforms[:, 2:] < config.flip).unbind(1)
    return torch.where(flip_real, fake, real), torch.where(flip_fake, real, fake)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return targets * F.softplus(-logits) + (1.0 - targets) * F.softplus(logits)


def _from_range(target: float | tuple[float, float], uniforms: Tensor) -> Tensor:
    low, high = target if isinstance(target, tuple) else (target, target)
    return low + (high - low) * uniforms
