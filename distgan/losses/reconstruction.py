"""Losses of an autoencoder that is trained adversarially, and the weight of its adversarial term.

Esser, Rombach, Ommer, "Taming Transformers for High-Resolution Image Synthesis", CVPR 2021, section 3.1; Rombach et
al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, appendix G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distgan.distributed import collectives

_SMALLEST = 1e-4
_LARGEST = 1e4


def kl_divergence(moments: Tensor) -> Tensor:
    """KL(N(m, v) || N(0, 1)) = 1/2 sum (m^2 + v - 1 - log v) over the elements of a latent; the mean over n, shape ().

    Kingma and Welling 2014, appendix B.

    Args:
        moments: (n, 2c, h, h): means m, then logarithms of variances v.
    """
    means, logarithms = moments.chunk(2, dim=1)
    divergences: Tensor = 0.5 * (means.square() + logarithms.exp() - 1.0 - logarithms).flatten(1).sum(1)
    return divergences.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last: Tensor) -> Tensor:
    """min(|d reconstruction / d w| / (|d adversarial / d w| + 1e-4), 1e4), w the weight of the last layer: shape ().

    Esser et al. 2021, eq. 7, with the constants of the released code. It makes both terms pull equally on that layer.
    The gradients are those of the mean losses over all ranks, so that it does not depend on their number. It has no
    gradient. Collective: call on every rank.

    Args:
        reconstruction, adversarial: losses of this rank's micro-batch, shape ().
        last: w, a parameter that both depend on.
    """
    gradients = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
    whole = collectives.all_reduce_mean(torch.stack(gradients).detach())
    norms = torch.linalg.vector_norm(whole.flatten(1), dim=1)
    weight: Tensor = (norms[0] / (norms[1] + _SMALLEST)).clamp(0.0, _LARGEST)
    return weight
