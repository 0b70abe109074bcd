"""Penalties on the discriminator's input gradient or its values, and the points where gradients are taken.

Each penalty is a mean over the batch of per-sample values. Norms are over all dimensions of a sample.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distgan.distributed import collectives


def input_gradients(logits: Tensor, samples: Tensor) -> Tensor:
    """d logit_i / d sample_i, flattened to (n, dimensions) and differentiable.

    With batch norm a logit also depends on the other samples. The gradient is that of the sum of the logits of all
    ranks, as in one process with the whole batch.
    """
    (gradients,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    return gradients.flatten(1)


def zero_centered(logits: Tensor, samples: Tensor, gamma: float) -> Tensor:
    """gamma/2 E |grad D(x)|^2: R1 on real samples, R2 on generated ones (Mescheder et al. 2018, eq. 9 and 10).

    The released code's coefficient of 10 on the mean squared norm equals gamma = 20.
    """
    return 0.5 * gamma * input_gradients(logits, samples).square().sum(1).mean()


def finite_difference(ahead: Tensor, behind: Tensor, distance: float, gamma: float) -> Tensor:
    """gamma/2 E ((D(x + s n) - D(x')) / distance)^2 with n from N(0, I): R1 or R2 without a second derivative.

    It estimates gamma/2 E |g|^2, g the gradient of D, because E (g.n)^2 = |g|^2. With x' = x and distance s the mean
    square exceeds |g|^2 by s^2 ((2 |H|^2 + (tr H)^2) / 4 + g.grad(tr H)), H the Hessian, up to terms of s^4. With
    x' = x - s n and distance 2 s only s^2 g.grad(tr H) is left. One direction has the variance 2 |g|^4.

    Args:
        ahead, behind: logits at both ends of each difference, shape (k,).
        distance: distance between the ends, in units of n.
    """
    penalty: Tensor = 0.5 * gamma * ((ahead - behind) / distance).square().mean()
    return penalty


def gradient_penalty(
    logits: Tensor, points: Tensor, weight: float, target: float = 1.0, *, one_sided: bool = False
) -> Tensor:
    """weight E (|grad D(x^)| - target)^2 (Gulrajani et al. 2017, eq. 3), or of its positive part only (section 4).

    Divided by target^2 unless that is 0, as in the released code of Karras et al. 2018 (loss.py, D_wgangp_acgan),
    whose target is 750 for CIFAR-10.

    A gradient of exactly 0 has no direction. It contributes the weight to the penalty and nothing to the penalty's
    gradient, where the root of a sum of squares would contribute NaN.
    """
    norms = torch.linalg.vector_norm(input_gradients(logits, points), dim=1)
    excess = norms - target
    if one_sided:
        excess = F.relu(excess)
    penalty: Tensor = weight / (target or 1.0) ** 2 * excess.square().mean()
    return penalty


def drift(real_logits: Tensor) -> Tensor:
    """E D(x)^2 over real samples (Karras et al. 2018, appendix A.1, without its factor)."""
    return real_logits.square().mean()


def interpolate_samples(reals: Tensor, fakes: Tensor, fractions: Tensor) -> Tensor:
    """r + alpha (f - r) with one alpha in [0, 1) per sample, shape (n,) (Gulrajani et al. 2017, algorithm 1)."""
    between: Tensor = reals + _each(fractions, reals) * (fakes - reals)
    return between


def perturb_gaussian(reals: Tensor, noise: Tensor, variance: float) -> Tensor:
    """x + delta with delta from N(0, variance), given noise from N(0, 1) (DRAGAN: Kodali et al. 2017, section 2.3)."""
    return reals + math.sqrt(variance) * noise


def perturb_uniform(reals: Tensor, noise: Tensor, fractions: Tensor) -> Tensor:
    """x + alpha (x_p - x) with x_p = x + 1/2 std(batch) U[0, 1), as DRAGAN's released code perturbs.

    The standard deviation is one number, over all elements of the batch of all ranks. Noise has the shape of the
    real samples. Fractions are the alphas, one per sample.
    """
    with torch.no_grad():
        _, variance = collectives.batch_moments(reals, tuple(range(reals.dim())))
    perturbed: Tensor = reals + _each(fractions, reals) * 0.5 * variance.sqrt() * noise
    return perturbed


def _each(values: Tensor, samples: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (samples.dim() - 1))
