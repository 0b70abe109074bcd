"""Draws from the posterior of an autoencoder, by address, and the scale in which networks see them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distgan import randomness
from distgan.data.kinds.latents import LOG_VARIANCES


def draw_posterior(values: Tensor, channels: int, seed: int, places: Tensor | None) -> Tensor:
    """Return a draw from the posterior of n moments, or n latents as they are: float32 (n, channels, H, H).

    Args:
        values: (n, 2 channels, H, H) or (n, channels, H, H), on any device; see `latents`.
        places: (n,) int64 addresses of the noise, such as stream positions; needed for moments.
    """
    values = values.float()
    if values.shape[1] == channels:
        return values
    assert places is not None, "posteriors have noise of their own"
    mean, log_variance = values.chunk(2, dim=1)
    noise = randomness.normal(seed, "data/posterior", places.to(values.device, non_blocking=True), mean.shape[1:])
    return mean + (0.5 * log_variance.clamp(*LOG_VARIANCES)).exp() * noise


def normalize(latents: Tensor, shift: Sequence[float], scale: Sequence[float]) -> Tensor:
    """Return latents (n, C, H, H) as networks see them: (latent - shift) scale, for each channel."""
    return (latents - _per_channel(shift, latents)) * _per_channel(scale, latents)


def denormalize(samples: Tensor, shift: Sequence[float], scale: Sequence[float]) -> Tensor:
    """Return the inverse of `normalize`: latents as the autoencoder makes them."""
    return samples / _per_channel(scale, samples) + _per_channel(shift, samples)


def _per_channel(numbers: Sequence[float], like: Tensor) -> Tensor:
    # Filled on the device, because the host would wait for a copy to it.
    return torch.cat([like.new_full((1, 1, 1), number) for number in numbers])
