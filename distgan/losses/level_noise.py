"""Multi-level noise-perturbed guidance (Hyun et al. 2026, "Scalable GANs with Transformers"; GAT's released code).

A generator with levels has an output after each part of its blocks. The discriminator judges all of them together, the
earlier ones in more noise, so that early blocks need only coarse structure. Real samples are judged at the same noise
levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LEAST, _OFFSET = 0.125, 0.01


def noise_levels(count: int) -> list[float]:
    """Return the share of noise t of each level: 1 - 0.125^(1 - i / (count - 1)) + 0.01, falling to 0.01.

    For 4 levels 0.885, 0.76, 0.51 and 0.01.
    """
    return [1.0 - _LEAST ** (1.0 - level / (count - 1)) + _OFFSET for level in range(count)]


def add_level_noise(samples: Tensor, noise: Tensor) -> Tensor:
    """Return (1 - t) x + t e for each level, with e from N(0, 1).

    The noise n of a level is that of the next one, scaled as its sample is, and an increment of its own:
    n_i = (1 - t_i) / (1 - t_(i + 1)) n_(i + 1) + increment, such that its variance is t_i^2.

    Args:
        samples: (n, levels, C, H, W).
        noise: increments from N(0, 1), of the same shape.
    """
    shares = noise_levels(samples.shape[1])
    perturbed, carried, before = list[Tensor](), torch.zeros_like(samples[:, 0]), 0.0
    for level in reversed(range(samples.shape[1])):
        fade = (1.0 - shares[level]) / (1.0 - before)
        increment = math.sqrt(shares[level] ** 2 - (before * fade) ** 2)
        carried = carried * fade + increment * noise[:, level]
        perturbed.insert(0, (1.0 - shares[level]) * samples[:, level] + carried)
        before = shares[level]
    return torch.stack(perturbed, dim=1)
