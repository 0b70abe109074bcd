"""An autoencoder that distgan trained, as encode and decoders use it."""

from __future__ import annotations

import json
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from distgan import extensions
from distgan.config import GeneratorConfig
from distgan.config.error_messages import explain
from distgan.config.fields import Size
from distgan.errors import UserError, blaming
from distgan.networks import build_generator
from distgan.networks.shape import SampleShape


class _Architecture(BaseModel):
    """Options of the network, which in an export are untrusted input."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    generator: GeneratorConfig
    resolution: Size
    channels: Size


class TrainedAutoencoder(nn.Module):
    """Images (n, C, H, H) in [-1, 1] to moments (n, 2c, h, h), and latents (n, c, h, h) to images."""

    def __init__(self, network: nn.Module, config: GeneratorConfig, shape: SampleShape) -> None:
        super().__init__()
        self.network: Any = network
        self._config, self._shape = config, shape
        self.network.eval()
        with torch.no_grad(), torch.device(next(network.parameters()).device):
            self._latent: tuple[int, ...] = tuple(self.encode(torch.zeros(1, *shape.sizes)).shape[1:])

    @property
    def architecture(self) -> dict[str, Any]:
        """Options of the network without its weights, for `build_trained`."""
        described = _Architecture(
            generator=self._config, resolution=self._shape.resolution, channels=self._shape.channels
        )
        return described.model_dump(mode="json")

    def encode(self, images: Tensor) -> Tensor:
        """Return means and logarithms of variances. Raises UserError if the images are of other sizes."""
        if tuple(images.shape[1:]) != self._shape.sizes:
            channels, height, width = images.shape[1:]
            raise UserError(
                f"images of {channels} x {height} x {width}: the autoencoder was trained on "
                f"{' x '.join(map(str, self._shape.sizes))}; pass --resolution {self._shape.resolution} "
                f"--channels {self._shape.channels}"
            )
        moments: Tensor = self.network.encode(images)
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Return images. Raises UserError if the latents are of other sizes."""
        sizes = (self._latent[0] // 2, *self._latent[1:])
        if not torch.compiler.is_exporting() and tuple(latents.shape[1:]) != sizes:
            raise UserError(
                f"latents of {' x '.join(map(str, latents.shape[1:]))}: the decoder was trained on "
                f"{' x '.join(map(str, sizes))}; set data.channels and data.resolution to these"
            )
        images: Tensor = self.network.decode(latents)
        return images


def build_trained(architecture: dict[str, Any], name: object) -> TrainedAutoencoder:
    """Build an autoencoder without its weights, on the meta device, so that false sizes take no memory.

    Args:
        architecture: that of an export, which anyone may have written.
        name: begins the messages.

    Raises:
        UserError: the architecture is invalid, or names code that is not allowed.
    """
    try:
        with extensions.distrusting():
            described = _Architecture.model_validate_json(json.dumps(architecture))
    except ValidationError as error:
        raise UserError(f"{name}: its decoder cannot be built: {explain(error, _Architecture)[1]}") from None
    if described.generator.is_allowed and not described.generator.facts.reconstructs:
        raise UserError(f"{name}: its decoder cannot be built: {described.generator.architecture} is no autoencoder")
    shape = SampleShape("images", resolution=described.resolution, channels=described.channels)
    try:
        with torch.device("meta"), blaming(name):
            return TrainedAutoencoder(build_generator(described.generator, shape), described.generator, shape)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: its decoder cannot be built: {reason}; export it again") from None
