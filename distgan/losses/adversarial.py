"""Adversarial losses, as functions of logits or of critic values.

Each is a class with two losses to minimize: the discriminator's and the generator's. Both take (real logits, fake
logits), each of shape (n,), and return the mean over the batch, shape (). Facts about them, such as whether the
generator's loss looks at reals, stand in `config.objective`.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from distgan.config import LabelSmoothingConfig
from distgan.distributed import collectives


class AdversarialLoss(Protocol):
    """What an adversarial loss offers. A class of the user's needs no base class."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the discriminator's loss, shape (), from float32 logits (n,)."""

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Return the generator's loss, shape (). Without `needs_reals`, the real logits mean nothing."""


class Minimax:
    """Goodfellow et al. 2014, eq. 1. The generator's gradient vanishes where D is certain."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E log D(x) - E log(1 - D(G(z))) with D = sigmoid(logit)."""
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """E log(1 - D(G(z)))."""
        return -F.softplus(fake_logits).mean()


class NonSaturating(Minimax):
    """Goodfellow et al. 2014, section 3."""

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E log D(G(z))."""
        return F.softplus(-fake_logits).mean()


class LeastSquares:
    """Mao et al. 2017, eq. 9, of raw outputs."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """1/2 E (D(x) - 1)^2 + 1/2 E D(G(z))^2."""
        return 0.5 * ((real_logits - 1.0).square().mean() + fake_logits.square().mean())

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """1/2 E (D(G(z)) - 1)^2."""
        return 0.5 * (fake_logits - 1.0).square().mean()


class Wasserstein:
    """Arjovsky et al. 2017, algorithm 1, negated; their released code has f of opposite sign."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """E f(G(z)) - E f(x)."""
        return fake_logits.mean() - real_logits.mean()

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E f(G(z))."""
        return -fake_logits.mean()


class Hinge:
    """Lim and Ye 2017; Miyato et al. 2018, eqs. 16 and 17."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z)))."""
        return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E D(G(z))."""
        return -fake_logits.mean()


class RelativisticPaired:
    """RSGAN of Jolicoeur-Martineau 2018: the i-th real with the i-th fake."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E log sigmoid(C(x) - C(G(z)))."""
        return F.softplus(fake_logits - real_logits).mean()

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-E log sigmoid(C(G(z)) - C(x))."""
        return F.softplus(real_logits - fake_logits).mean()


class RelativisticAverage:
    """RaSGAN of Jolicoeur-Martineau 2018. The factor 1/2, here and in the two classes below, is the released code's."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """-1/2 E log sigmoid(C(x) - mean C(G(z))) - 1/2 E log(1 - sigmoid(C(G(z)) - mean C(x)))."""
        real, fake = _relative(real_logits, fake_logits)
        return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())

    def generator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The discriminator's loss with real and fake logits exchanged."""
        return self.discriminator(fake_logits, real_logits)


class RelativisticAverageLeastSquares(RelativisticAverage):
    """RaLSGAN of Jolicoeur-Martineau 2018."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """1/2 E (C(x) - mean C(G(z)) - 1)^2 + 1/2 E (C(G(z)) - mean C(x) + 1)^2."""
        real, fake = _relative(real_logits, fake_logits)
        return 0.5 * ((real - 1.0).square().mean() + (fake + 1.0).square().mean())


class RelativisticAverageHinge(RelativisticAverage):
    """RaHingeGAN of Jolicoeur-Martineau 2018."""

    def discriminator(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """1/2 E max(0, 1 - (C(x) - mean C(G(z)))) + 1/2 E max(0, 1 + (C(G(z)) - mean C(x)))."""
        real, fake = _relative(real_logits, fake_logits)
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def _relative(real_logits: Tensor, fake_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract from each side the other side's mean over all ranks; gradients flow through the means."""
    means = collectives.all_reduce_mean(torch.stack((real_logits.mean(), fake_logits.mean())))
    return real_logits - means[1], fake_logits - means[0]


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
