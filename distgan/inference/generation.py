"""Conversion between samples of the data and of the networks, and the batches for batch-norm statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan import interpolation, randomness
from distgan.config import Config
from distgan.data.index.table import Index
from distgan.data.kinds import posterior
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.inference.latents import Source
from distgan.monitoring import pictures
from distgan.monitoring.scatter import scatter
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape
from distgan.networks.stylegan2.noise import constant_noise


def to_network(shape: SampleShape, values: Tensor, seed: int = 0, places: Tensor | None = None) -> Tensor:
    """Convert a batch of the stream (see `reader.Batch`) to network inputs, float32 (n, *shape.sizes).

    Images are scaled to [-1, 1], characters become one-hot vectors, points stay as they are. Latents are drawn from
    their posteriors, shifted and scaled.

    Args:
        seed: the run's.
        places: (n,) int64 addresses of the noise of dequantized images and posteriors, such as stream positions.
    """
    if shape.kind == "images":
        if not shape.dequantized:
            return from_bytes(values)
        assert places is not None, "dequantized images have noise of their own"
        places = places.to(values.device, non_blocking=True)
        return dequantize(values, randomness.uniform(seed, "data/dequantize", places, values.shape[1:]))
    if shape.kind == "text":
        return F.one_hot(values.long(), shape.vocabulary).float().transpose(1, 2)
    if shape.kind == "latents":
        drawn = posterior.draw_posterior(values, shape.channels, seed, places)
        return posterior.normalize(drawn, shape.shift, shape.scale)
    return values.float()


def from_network(shape: SampleShape, samples: Tensor) -> Tensor:
    """Convert generator outputs, float (n, *shape.sizes), to samples for metrics and files.

    Images become uint8 (n, C, R, R), text the most probable characters, int64 (n, length), points float32 (n, d).
    Latents become those of the autoencoder, float32 (n, C, R, R), without shift and scale.
    """
    if shape.kind == "images":
        return to_bytes(samples, dequantized=shape.dequantized)
    if shape.kind == "text":
        return samples.argmax(1)
    if shape.kind == "latents":
        return posterior.denormalize(samples.float(), shape.shift, shape.scale)
    return samples.float()


def picture_of(shape: SampleShape, samples: Tensor, *, pairs: bool = False) -> Tensor:
    """Return a picture of images, points or latents in the format of `from_network`: uint8, (channels, height, width).

    Of latents it shows the first three channels as red, green and blue, or the first in gray if there are fewer: 128 is
    the mean, and 0 and 255 are three standard deviations away.

    Args:
        pairs: keep samples 2 i and 2 i + 1 in one row.
    """
    if shape.kind == "points":
        return scatter(samples)
    if shape.kind == "latents":
        channels = 3 if shape.channels >= 3 else 1
        deviations = posterior.normalize(samples, shape.shift, shape.scale)[:, :channels]
        samples = (deviations * (127.5 / 3.0) + 127.5).round().clamp(0, 255).to(torch.uint8)
    return pictures.grid(samples, columns=2 * math.ceil(math.sqrt(len(samples)) / 2) if pairs else None)


def to_bytes(images: Tensor, *, dequantized: bool = False) -> Tensor:
    """Convert images in [-1, 1], of any float dtype, to uint8: the nearest level, or the inverse of `dequantize`."""
    images = images.float()
    levels = (images * 128.0).floor() + 128.0 if dequantized else ((images + 1.0) * 127.5).round()
    return levels.clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def dequantize(images: Tensor, noise: Tensor) -> Tensor:
    """Dequantize uint8 images to 2 (x/256 - 1/2) + u, where noise in [0, 1) gives u from U[0, 1/128).

    As in the released code of WGAN-GP's CIFAR-10 ResNet and of SNGAN. The noise is rounded down to 16 bits, so that
    float32 has all bits of the sum, and no sum is rounded up into the next level.
    """
    noise = (noise * 65536.0).floor() / 65536.0
    return (images.float() + noise) / 128.0 - 1.0


def statistics_batches(
    source: Source, config: Config, *, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield this rank's part of the addressed batches for recomputing batch-norm statistics.

    The batches do not depend on the number of ranks: each has `config.statistics_batch` samples and goes to one rank.
    """
    batch_size = config.statistics_batch
    for batch in range(rank, max(1, config.ema.statistics_samples // batch_size), world_size):
        yield source.draw("batch statistics", torch.arange(batch * batch_size, (batch + 1) * batch_size))


class ImageSource:
    """Images as a pure function of (seed, position), in place of latents: a `Source`.

    They are in the shuffled order of training, each once before any comes again, and not mirrored. All purposes have
    the same images.
    """

    def __init__(self, config: Config, index: Index, device: torch.device | str) -> None:
        self._data, self._index = config.data, index
        self._order = make_order(config.data, config.seed, index)
        self.device = torch.device(device)

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return images (n, C, R, R) in [-1, 1] for int64 positions (n,), and None: means of latents are decoded.

        Raises:
            UserError: almost no sample can be read.
        """
        batch = read_samples(self._data, self._index, self._order.samples(positions.cpu().numpy()))
        return from_bytes(batch.data.to(self.device)), None


@dataclass(frozen=True)
class SampleGenerator:
    """Maps positions to samples, in the format of `from_network`: an `evaluation.contract.EvaluatedGenerator`."""

    network: nn.Module
    """In evaluation mode."""
    shape: SampleShape
    source: Source
    purpose: str
    """That of the samples' latents and labels."""

    def __call__(self, positions: Tensor) -> Tensor:
        return from_network(self.shape, self.network(*self.draw(self.purpose, positions)))

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents and labels; see `LatentSource.draw`."""
        return self.source.draw(purpose, positions)

    def beside_reconstructions(self, images: Tensor) -> Tensor:
        """Return each image (n, C, R, R) in [-1, 1], followed by its reconstruction: (2 n, C, R, R), uint8."""
        pairs = torch.stack([from_network(self.shape, of) for of in (images, self.network(images))], dim=1)
        return pairs.flatten(0, 1)


@contextmanager
def generating(network: nn.Module, shape: SampleShape, source: Source, purpose: str) -> Iterator[SampleGenerator]:
    """Yield the generator of a purpose's samples, by a network in evaluation mode.

    Do not change the network inside: virtual batch norm's reference batch passes through it once for all calls.
    """
    with torch.no_grad(), reference_moments(network):
        yield SampleGenerator(network, shape, source, purpose)


@torch.no_grad()
def generate_paths(
    network: nn.Module, shape: SampleShape, source: Source, purpose: str, paths: int, steps: int
) -> Tensor:
    """Generate samples (paths * steps, ...) along arcs between neighboring latents, path by path."""
    latents, labels = interpolation.latent_paths(*source.draw(purpose, torch.arange(2 * paths)), steps)
    # With noise of each latent's own, details would jump from image to image.
    with reference_moments(network), constant_noise(network):
        return from_network(shape, network(latents, labels))
