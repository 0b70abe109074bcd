"""A trained generator as a module by itself, which knows its latents and labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.config import GeneratorConfig
from distgan.data.kinds.text import decode_lines
from distgan.errors import UserError
from distgan.inference.generation import from_network
from distgan.inference.latents import LatentSource
from distgan.networks import build_generator
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.progressive import set_growth
from distgan.networks.shape import SampleShape


class Generator(nn.Module):
    """An averaged generator ready for use: `generator(generator.latents(16, seed=0))`.

    Attributes:
        latent_size: numbers in a latent vector.
        shape: the kind and sizes of its samples.
        resolution, channels: those of images; 0 for other kinds.
        vocabulary: the characters of a generator of text, by their numbers; else None.
        num_classes: 0 for an unconditional generator.
        class_names: names of the classes, or None.
        step, images: how long it was trained, in steps and in real images seen.
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
        sizes = ("kind", "resolution", "channels", "length", "dimensions")
        self.shape = SampleShape(
            **{name: description[name] for name in sizes if name in description},
            vocabulary=len(self.vocabulary or ()),
            num_classes=self.num_classes,
        )
        self.resolution, self.channels = self.shape.resolution, self.shape.channels
        self.network = build_generator(config, self.shape)
        if description.get("growth"):
            set_growth([self.network], schedule.Growth(**description["growth"]))
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (n, latent_size) float, and labels (n,) int64 if it has classes, to samples.

        Images are (n, C, R, R) in [-1, 1]; text is (n, vocabulary, length), at each place the probabilities of the
        characters (see `decode`); points are (n, dimensions).

        Raises:
            UserError: labels are missing.
        """
        if self.num_classes and labels is None:
            raise UserError(f"this generator is conditional: give labels, integers in [0, {self.num_classes})")
        with reference_moments(self.network):
            samples: Tensor = self.network(latents, labels)
        return samples

    def decode(self, samples: Tensor) -> list[str]:
        """The most probable lines of samples of text, (n, vocabulary, length), without the padding at their ends.

        Raises:
            UserError: this generator makes no text.
        """
        if self.vocabulary is None:
            raise UserError(f"this generator makes {self.shape.kind}; only those of text have lines to decode")
        return decode_lines(from_network(self.shape, samples).cpu().numpy(), self.vocabulary)

    def latents(self, number: int, *, seed: int = 0) -> Tensor:
        """`number` latent vectors, a function of the seed alone."""
        return self.inputs(number, seed=seed)[0]

    def labels(self, number: int, *, seed: int = 0) -> Tensor | None:
        """`number` labels in the proportions of the training data, or None for an unconditional generator."""
        return self.inputs(number, seed=seed)[1]

    def inputs(self, number: int, *, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor | None]:
        """Latents and labels numbered from `first`, on the generator's device."""
        device = next(self.network.parameters()).device
        source = LatentSource(self.config, seed, class_counts=self.description["class_counts"], device=device)
        return source.draw("samples", torch.arange(first, first + number))
