"""An adversarial loss, and extra terms of both players' losses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distgan.distributed import all_reduce_mean
from distgan.players.terms import TermView


class Margin:
    """Hinge loss with a margin."""

    def __init__(self, margin: float = 1.0) -> None:
        self.margin = margin

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.relu(self.margin - real).mean() + F.relu(self.margin + fake).mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -fake.mean()


class ModeSeeking:
    """Distance of two latents over the distance of their images (Mao et al. 2019), in the generator's loss."""

    def __call__(self, view: TermView) -> Tensor:
        (one, other), (first, second) = view.fakes.chunk(2), view.latents.chunk(2)
        images, latents = (one - other).abs().mean(), (first - second).abs().mean()
        return latents / (images + 1e-5)


class FeatureNorm:
    """Mean square of the features of noisy reals, in the discriminator's loss."""

    needs_features = True

    def __init__(self, *, sigma: float = 0.1) -> None:
        self.sigma = sigma

    def __call__(self, view: TermView) -> Tensor:
        noisy = view.reals + self.sigma * view.normal("feature norm", *view.reals.shape[1:])
        return view.judge(noisy, view.real_labels).square().mean() + 1e-3 * view.real_features.square().mean()


class MeanMatching:
    """Squared distance of the mean generated image from the mean real one, over the batch of all ranks."""

    needs_reals = True
    compares_batch = True

    def __call__(self, view: TermView) -> Tensor:
        return all_reduce_mean(view.fakes.mean(0) - view.reals.mean(0)).square().sum()
