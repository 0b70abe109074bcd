"""Control of the augmentation's probability by the discriminator's overfitting (Karras et al. 2020, "Training
Generative Adversarial Networks with Limited Data", section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distgan.config import ControllerConfig
from distgan.distributed import collectives


class AugmentationController:
    """Probability that rises while the mean sign of the logits of augmented reals is above its target.

    All state is on the device and equal on all ranks, and the host never waits for it. Unlike in the released code, the
    probability ends at 1: beyond, nothing more is augmented, and it would only take longer to come back.
    """

    def __init__(self, config: ControllerConfig, device: torch.device) -> None:
        self._config = config
        self.probability = torch.zeros((), dtype=torch.float64, device=device)
        self._signs = torch.zeros_like(self.probability)
        self._images = torch.zeros_like(self.probability)

    @torch.no_grad()
    def update(self, signs: Sequence[Tensor], applied: Tensor, *, index: int, images: int) -> None:
        """Count one discriminator update, and change the probability after every k-th. Collective: call on every rank.

        Args:
            signs: mean sign of the logits of reals, 0-d, of each of this rank's micro-batches.
            applied: 0-d, 1, or 0 if the update was skipped; it is then ignored.
            index: number of discriminator updates before this one.
            images: reals of all ranks in this update.
        """
        mean = collectives.all_reduce_mean(torch.stack(list(signs)).double().mean())
        self._signs += torch.where(applied > 0, mean * images, 0.0)
        self._images += applied * images
        if (index + 1) % self._config.every:
            return
        # Rounded, so that a mean that equals the target does so whatever the order of summation.
        excess = (self._signs / self._images.clamp_min(1.0) - self._config.target).round(decimals=6)
        self.probability += excess.sign() * self._images / (1000.0 * self._config.kimg)
        self.probability.clamp_(0.0, 1.0)
        self._signs.zero_()
        self._images.zero_()

    def state(self) -> dict[str, Tensor]:
        """Return the probability, and the sums since it last changed. Copy into these tensors to load a state."""
        return {"probability": self.probability, "signs": self._signs, "images": self._images}
