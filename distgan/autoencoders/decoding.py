"""A run's decoder: from generated latents to images, for sample grids, metrics, samples and exports."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor, nn

from distgan.autoencoders.loading import Autoencoder, load_autoencoder
from distgan.config import Config, DataConfig
from distgan.config.objective.alignment import IMAGE_SIDE
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.kinds.posterior import denormalize
from distgan.data.storage import filesystem, locations
from distgan.errors import UserError, blaming
from distgan.networks.shape import SampleShape

IMAGES = "images.safetensors"
"""Index of the images in shards of latents, beside the index of these."""
_BATCH = 16
"""Images per pass, because decoders of large images need much more memory than generators of latents."""


class LatentDecoder(nn.Module):
    """Maps generated latents (n, C, H, H), shifted and scaled, to images (n, 1 or 3, R, R) toward [-1, 1]. Frozen.

    Attributes:
        hash: that of the autoencoder.
        shape: kind and sizes of the images.
    """

    def __init__(self, autoencoder: Autoencoder, shape: SampleShape) -> None:
        """Decode one latent of zeros to learn the sizes of images. Raises UserError if the decoder fails."""
        super().__init__()
        self.autoencoder, self.hash, self._latents = autoencoder, autoencoder.hash, shape
        with torch.no_grad():
            image = autoencoder.decode(torch.zeros(1, *shape.sizes))
        self.shape = SampleShape(
            "images", resolution=image.shape[2], channels=image.shape[1], num_classes=shape.num_classes
        )

    def forward(self, samples: Tensor) -> Tensor:
        latents = denormalize(samples.float(), self._latents.shift, self._latents.scale)
        if torch.compiler.is_exporting():  # where a number of passes would be a constant
            decoded: Tensor = self.autoencoder.module.decode(latents).float()
            return decoded
        return torch.cat([self.autoencoder.decode(part) for part in latents.split(_BATCH)])


class DecodedGenerator(nn.Module):
    """A generator of latents with its decoder: latents (n, latent_size) and labels (n,) or None to images."""

    def __init__(self, network: nn.Module, decoder: LatentDecoder) -> None:
        super().__init__()
        self.network, self.decoder = network, decoder

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        images: Tensor = self.decoder(self.network(latents, labels))
        return images


def load_decoder(config: Config, shape: SampleShape) -> LatentDecoder | None:
    """Load the decoder of a run on the CPU; return None if it has none.

    Args:
        shape: of the run's samples.

    Raises:
        UserError: it is missing, or does not decode latents of this shape.
    """
    if config.data.decoder is None:
        return None
    with blaming("data.decoder"):
        return LatentDecoder(load_autoencoder(config.data.decoder), shape)


def with_decoder(
    network: nn.Module, shape: SampleShape, decoder: LatentDecoder | None
) -> tuple[nn.Module, SampleShape]:
    """Return the generator as metrics and pictures see it, and the shape of what it makes."""
    return (network, shape) if decoder is None else (DecodedGenerator(network, decoder), decoder.shape)


def real_images(config: Config, index: Index) -> tuple[str | list[str], Index]:
    """Return the images that metrics compare decoded latents with: what names them, and their index.

    Args:
        index: of the latents.

    Raises:
        UserError: `evaluation.real_images` names none, and the shards of latents hold none.
    """
    path = config.evaluation.real_images
    beside = locations.join(index.folder, IMAGES)
    if path is None and filesystem.exists(beside):
        path = beside
    if path is None:
        raise UserError(
            "evaluation.real_images: is missing; metrics compare decoded latents with images, which the shards of "
            "latents do not hold; set it to the shards that were encoded, or encode them with --images"
        )
    with blaming("evaluation.real_images"):
        images = load_index(path, config.data.cache_dir)
    if images.kind != "images":
        raise UserError(f"evaluation.real_images = {path}: found {images.kind}, expected shards of images")
    return path, images


def images_of_latents(config: Config, index: Index) -> tuple[DataConfig, Index]:
    """Return how training reads the images of latents, and their index, which lists the same samples.

    Args:
        index: of the latents.

    Raises:
        UserError: the shards of latents hold no images, or images of other samples.
    """
    beside = locations.join(index.folder, IMAGES)
    fix = "encode them with --images, or set objective.alignment=null"
    if not filesystem.exists(beside):
        raise UserError(
            f"objective.alignment: looks at the images of latents, but the shards of data.path={config.data.path} hold "
            f"none, by {locations.public_name(beside)}; {fix}"
        )
    images = load_index(beside, config.data.cache_dir)
    parts = ([shard.url for shard in each.shards] for each in (images, index))
    arrays = ((getattr(images, name), getattr(index, name)) for name in ("shard_starts", "key_ends", "keys"))
    if index.sources or operator.ne(*parts) or not all(np.array_equal(*pair) for pair in arrays):
        raise UserError(
            f"{locations.public_name(beside)}: found images of other samples than the latents of data.path="
            f"{config.data.path}, expected one source, with one image for each latent in the same order; {fix}"
        )
    own = {"kind": "images", "path": beside, "resolution": IMAGE_SIDE, "channels": 3, "decoder": None}
    return config.data.model_copy(update=own), images


def image_evaluation(config: Config, index: Index, decoder: LatentDecoder | None) -> tuple[Config, Index]:
    """Return what an evaluation measures: config and index of the run, or of the images of a run with a decoder."""
    if decoder is None:
        return config, index
    path, images = real_images(config, index)
    own = {
        "kind": "images", "path": path, "resolution": decoder.shape.resolution,
        "channels": decoder.shape.channels, "decoder": None, "mirror": False,
    }  # fmt: skip
    # Copied without validation: the networks are those of latents.
    return config.model_copy(update={"data": config.data.model_copy(update=own)}), images
