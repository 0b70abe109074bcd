"""The decoder of a run or an export of a generator of latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import BaseModel, ConfigDict

from distgan.autoencoders.decoding import LatentDecoder, load_decoder
from distgan.autoencoders.loading import restore_autoencoder
from distgan.config import AutoencoderConfig, Config
from distgan.errors import UserError
from distgan.networks.shape import SampleShape

DECODER_FILE = "decoder.safetensors"
"""Weights of the decoder in an export."""


class ExportedDecoder(BaseModel):
    """Decoder in the description of an export, which is untrusted input. Its weights are in decoder.safetensors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    autoencoder: AutoencoderConfig
    architecture: dict[str, Any] | None
    """Options of a built-in autoencoder's model; None for one of the user's, which has options in its section."""
    hash: str


def describe_decoder(decoder: LatentDecoder) -> dict[str, Any]:
    """Return an `ExportedDecoder` as plain values."""
    autoencoder = decoder.autoencoder
    section, architecture = autoencoder.section, None
    if section.is_built_in:  # without the path of this machine
        section = AutoencoderConfig.model_validate({"autoencoder": section.technique, "path": DECODER_FILE})
        architecture = autoencoder.module.architecture
    return {"autoencoder": section.model_dump(mode="json"), "architecture": architecture, "hash": autoencoder.hash}


def decoder_weights(decoder: LatentDecoder) -> bytes:
    """Return the file with a decoder's weights."""
    tensors = decoder.autoencoder.module.state_dict()
    content: bytes = safetensors.torch.save({name: value.contiguous().clone() for name, value in tensors.items()})
    return content


def load_exported_decoder(file: Path, described: ExportedDecoder, shape: SampleShape) -> LatentDecoder:
    """Load the decoder of an export.

    Args:
        file: with its weights.
        shape: of the latents.

    Raises:
        UserError: the file is missing or damaged, or names code that is not allowed.
    """
    try:
        # Copied, because the loaded tensors map the file, which may be replaced while the decoder is in use.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(file).items()}
    except (OSError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: not the weights of a decoder: {reason}; export it again") from None
    autoencoder = restore_autoencoder(described.autoencoder, described.architecture, tensors, file)
    if autoencoder.hash != described.hash:
        raise UserError(f"{file}: has another hash than config.json says; export it again")
    return LatentDecoder(autoencoder, shape)


def load_run_decoder(
    path: Path, config: Config, shape: SampleShape, trained: str | None, decoder: AutoencoderConfig | None
) -> LatentDecoder | None:
    """Load the decoder of a checkpoint's run, or the one given in its place.

    Args:
        path: of the checkpoint, for messages.
        shape: of the latents.
        trained: hash of the decoder in training; None if there was none.

    Raises:
        UserError: it is missing, or another than in training.
    """
    section = decoder or config.data.decoder
    data = config.data.model_copy(update={"decoder": section})
    loaded = load_decoder(config.model_copy(update={"data": data}), shape)
    if loaded is not None and trained not in (None, loaded.hash):
        raise UserError(
            f"{path}: trained with a decoder of hash {str(trained)[:12]}, but that of data.decoder is "
            f"{loaded.hash[:12]}; restore it"
        )
    return loaded
