"""Augmentation of the discriminator's inputs, as an objective applies it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distgan import schedule
from distgan.config import AugmentationConfig
from distgan.distributed.collectives import at_least_float32
from distgan.errors import UserError, blaming_code
from distgan.losses.augmentation import AugmentationDraws
from distgan.losses.augmentation.controller import AugmentationController
from distgan.players.terms import check_stateless


class InputAugmentation:
    """The augmentation of a run, and its probability.

    Raises:
        UserError: its code is not allowed or cannot be loaded, or it is no stateless callable.
    """

    def __init__(self, config: AugmentationConfig, controller: AugmentationController | None, length: int) -> None:
        """Build the augmentation.

        Args:
            controller: holds the probability if that is adaptive; both players share it.
            length: images of the whole run, over which a scheduled probability changes.
        """
        self.name = f"objective.augmentation: {config.augmentation}"
        self._transform = config.build()
        if not callable(self._transform):
            raise UserError(f"{self.name} returned no callable; give it a __call__(samples, draws)")
        check_stateless(self.name, self._transform)
        self._chosen = config.chosen_probability
        self._controller, self._length = controller, length
        self.before_penalties = config.penalties == "augmented"
        """True if gradient penalties are taken at augmented samples."""
        self.is_followed = callable(getattr(self._transform, "follow", None))
        """True if images can be moved as the latents that they belong to."""

    def probability(self, images: int) -> float | Tensor:
        """Return the probability after `images` images: a number, or a 0-d tensor if it is adaptive."""
        if self._chosen != "adaptive":
            return schedule.value(self._chosen, images, self._length)
        assert self._controller is not None, "an adaptive probability needs a controller"
        return self._controller.probability

    def __call__(
        self,
        samples: Tensor,
        images: int,
        uniform: Callable[..., Tensor],
        normal: Callable[..., Tensor],
        reference: Tensor | None = None,
    ) -> Tensor:
        """Augment samples (n, *sizes) in full precision.

        Args:
            images: images before this step.
            uniform: draws U[0, 1) of shape (n, *shape), as for `AugmentationDraws`.
            normal: draws N(0, 1).
            reference: (n, *sizes), see `AugmentationDraws`.

        Raises:
            UserError: a user's augmentation failed, returned another shape or dtype, or no gradient where the samples
                have one.
        """
        samples = at_least_float32(samples)
        reference = None if reference is None else reference.to(samples.dtype)
        with torch.autocast(samples.device.type, enabled=False), blaming_code(f"{self.name} failed", everywhere=True):
            draws = AugmentationDraws(uniform, normal, self.probability(images), reference)
            augmented = self._transform(samples, draws)
        if not isinstance(augmented, Tensor) or (augmented.shape, augmented.dtype) != (samples.shape, samples.dtype):
            is_tensor = isinstance(augmented, Tensor)
            found = f"{augmented.dtype} {tuple(augmented.shape)}" if is_tensor else type(augmented).__name__
            raise UserError(
                f"{self.name} returned {found}, expected {samples.dtype} {tuple(samples.shape)}, as it was given",
                everywhere=True,
            )
        if samples.requires_grad and torch.is_grad_enabled() and not augmented.requires_grad:
            raise UserError(
                f"{self.name} returned samples without a gradient; compute them from those it gets, and do not detach "
                "them",
                everywhere=True,
            )
        return augmented

    def follow(
        self,
        images: Tensor,
        size: torch.Size,
        before: int,
        uniform: Callable[..., Tensor],
        normal: Callable[..., Tensor],
    ) -> Tensor:
        """Move images (n, C, H, W) as `__call__` moves the samples (n, ..., *size) that they belong to.

        Args:
            before: images before this step.
            uniform, normal: as for the samples.
        """
        draws = AugmentationDraws(uniform, normal, self.probability(before))
        with torch.autocast(images.device.type, enabled=False), blaming_code(f"{self.name} failed", everywhere=True):
            moved = self._transform.follow(images, draws, size)
        if not isinstance(moved, Tensor) or moved.shape != images.shape:
            raise UserError(
                f"{self.name}: follow returned another shape than {tuple(images.shape)}, which it was given",
                everywhere=True,
            )
        return moved
