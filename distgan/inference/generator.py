"""Trained generator as a self-contained module that draws its own latents and labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.autoencoders.decoding import LatentDecoder, with_decoder
from distgan.config import GeneratorConfig
from distgan.data.kinds.latents import LatentSpace
from distgan.data.kinds.text import decode_lines
from distgan.errors import UserError
from distgan.inference.generation import from_network
from distgan.inference.latents import LatentSource
from distgan.networks import build_generator
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.progressive import set_growth
from distgan.networks.shape import SampleShape

_STYLE_TRUNCATION = "style_truncation"
"""Attribute of a network that truncates its styles."""


class Generator(nn.Module):
    """EMA generator ready for use: `generator(generator.latents(16, seed=0))`.

    Attributes:
        latent_size: dimension of a latent vector.
        shape: kind and sizes of the samples, which are images if there is a decoder of latents.
        network_shape: kind and sizes of the network's outputs, which may be latents.
        decoder: decodes latents of the network into images, or None.
        resolution, channels: sizes of images and latents; 0 for other kinds.
        vocabulary: characters by index for text; None for other kinds.
        num_classes: number of classes; 0 for an unconditional generator.
        class_names: names of the classes, or None.
        step, images: training length in steps and in real images seen.
        truncation: truncation that it was loaded for, or None; see `load_generator`.
    """

    def __init__(self, description: dict[str, Any], config: GeneratorConfig) -> None:
        super().__init__()
        self.description = description
        self.latent_size = config.latent_size
        self.vocabulary: list[str] | None = description.get("vocabulary")
        self.num_classes = len(description["class_counts"] or ())
        self.class_names: list[str] | None = description["class_names"]
        self.step: int = description["step"]
        self.images: int = description["images"]
        self.config = config
        space = description.get("latent_space")
        self.latent_space = LatentSpace.model_validate(space) if space else None
        sizes = ("kind", "resolution", "channels", "length", "dimensions")
        self.network_shape = SampleShape(
            **{name: description[name] for name in sizes if name in description},
            vocabulary=len(self.vocabulary or ()),
            num_classes=self.num_classes,
            dequantized=description.get("dequantized", False),
            shift=self.latent_space.shift if self.latent_space else (),
            scale=self.latent_space.scale if self.latent_space else (),
        )
        self.network = build_generator(config, self.network_shape)
        self.decoder: LatentDecoder | None = None
        self.truncation = None
        if description.get("growth"):
            set_growth([self.network], schedule.Growth(**description["growth"]))
        self.eval().requires_grad_(False)

    @property
    def sampler(self) -> tuple[nn.Module, SampleShape]:
        """The network, with its decoder if there is one, and the shape of what it makes."""
        return with_decoder(self.network, self.network_shape, self.decoder)

    @property
    def shape(self) -> SampleShape:
        return self.sampler[1]

    @property
    def resolution(self) -> int:
        return self.shape.resolution

    @property
    def channels(self) -> int:
        return self.shape.channels

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Generate samples from latents (n, latent_size), float, and labels (n,), int64, if there are classes.

        Images are (n, C, R, R) in [-1, 1]. Text is (n, vocabulary, length), character probabilities at each position
        (see `decode`). Points are (n, dimensions). Latents are (n, C, R, R), shifted and scaled (see `to_latents`); a
        decoder makes images of them. An autoencoder takes images (n, C, R, R) in [-1, 1] in place of latents, and
        returns their reconstructions.

        Raises:
            UserError: labels are missing.
        """
        if self.num_classes and labels is None:
            raise UserError(
                f"labels: missing for a class-conditional generator; pass int64 labels in [0, {self.num_classes}), for "
                f"example generator.labels({len(latents)}, seed=0)"
            )
        with reference_moments(self.network):
            samples: Tensor = self.network(latents, labels)
        return samples if self.decoder is None else self.decoder(samples)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Return generated images (n, C, R, R) as uint8 in [0, 255]: the nearest levels of pixels.

        After training on dequantized images (`data.dequantize`), a level is the whole bin that its noise filled.

        Raises:
            UserError: this generator does not make images.
        """
        if self.shape.kind != "images":
            raise UserError(f"to_uint8: needs a generator of images, found one of {self.shape.kind}")
        return from_network(self.shape, images)

    def to_latents(self, samples: Tensor) -> Tensor:
        """Return outputs of `network`, latents (n, C, R, R), as a decoder takes them: samples / scale + shift.

        Raises:
            UserError: this generator does not make latents.
        """
        if self.network_shape.kind != "latents":
            raise UserError(f"to_latents: needs a generator of latents, found one of {self.shape.kind}")
        return from_network(self.network_shape, samples)

    def decode(self, samples: Tensor) -> list[str]:
        """Return the most probable lines of text samples (n, vocabulary, length), without trailing padding.

        Raises:
            UserError: this generator does not make text.
        """
        if self.vocabulary is None:
            raise UserError(
                f"decode: needs a generator of text, found one of {self.shape.kind}; use its samples directly"
            )
        return decode_lines(from_network(self.shape, samples).cpu().numpy(), self.vocabulary)

    def latents(self, number: int, *, seed: int = 0, truncation: float | None = None) -> Tensor:
        """Draw `number` latent vectors, a function of the seed.

        Args:
            truncation: draw from N(0, 1) truncated to [-truncation, truncation]; None uses the generator's own. Batch
                norm keeps its statistics; `load_generator(..., truncation=...)` computes those of truncated latents.

        Raises:
            UserError: the truncation is not above 0 and finite, or the latents are not normal.
        """
        return self.inputs(number, seed=seed, truncation=truncation)[0]

    def labels(self, number: int, *, seed: int = 0) -> Tensor | None:
        """Draw `number` labels with the class frequencies of the training data; None for an unconditional generator."""
        return self.inputs(number, seed=seed)[1]

    def inputs(
        self, number: int, *, seed: int = 0, first: int = 0, truncation: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Draw the latents and labels numbered from `first`, on the generator's device."""
        source = self.source(seed, self.truncation if truncation is None else truncation)
        return source.draw("samples", torch.arange(first, first + number))

    @property
    def truncation(self) -> float | None:
        return self._truncation

    @truncation.setter
    def truncation(self, value: float | None) -> None:
        self._truncation = value
        if self._truncates_styles:
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"truncation = {value}: expected a number from 0 on, such as 0.7, or none at all")
            setattr(self.network, _STYLE_TRUNCATION, 1.0 if value is None else value)

    @property
    def _truncates_styles(self) -> bool:
        """Whether the network truncates by itself, toward its average, and latents are never truncated."""
        return hasattr(self.network, _STYLE_TRUNCATION)

    @property
    def reconstructs(self) -> bool:
        """Whether it is an autoencoder, which maps images to reconstructions."""
        return bool(getattr(self.network, "reconstructs", False))

    def check_draws(self) -> None:
        """Raise UserError if it is an autoencoder, which draws no samples."""
        if self.reconstructs:
            raise UserError(
                f"generator.architecture = {self.config.architecture}: an autoencoder reconstructs images and draws "
                "none; encode images with `distgan encode --encoder`, and train a generator on their latents"
            )

    def source(self, seed: int, truncation: float | None) -> LatentSource:
        """Return the source of latents and labels of a seed, on the generator's device.

        Raises:
            UserError: it is an autoencoder, or the truncation does not fit.
        """
        self.check_draws()
        if self._truncates_styles:
            if truncation != self.truncation:
                raise UserError(
                    f"truncation = {truncation}: a generator of architecture {self.config.architecture} truncates its "
                    "styles in place of its latents; pass it to load_generator"
                )
            truncation = None
        device = next(self.network.parameters()).device
        counts = self.description["class_counts"]
        return LatentSource(self.config, seed, class_counts=counts, device=device, truncation=truncation)
