"""Load an autoencoder, frozen, with checked outputs and a hash that identifies it."""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from distgan.autoencoders.diffusers_folder import AutoencoderKL, build_autoencoder_kl
from distgan.autoencoders.trained import TrainedAutoencoder, build_trained
from distgan.config import AutoencoderConfig
from distgan.errors import UserError, blaming


class Autoencoder(nn.Module):
    """A frozen autoencoder in evaluation mode.

    Attributes:
        name: name of the technique, for messages.
        moments: `encode` returns moments (n, 2c, h, h), and not latents (n, c, h, h).
        hash: SHA-256 of the name, of a built-in one's architecture, and of the parameters and the buffers.
    """

    def __init__(self, section: AutoencoderConfig, module: nn.Module) -> None:
        super().__init__()
        self.section, self.name = section, section.technique
        self.module: Any = module
        self.moments = bool(getattr(module, "moments", True))
        self.eval().requires_grad_(False)
        self.hash = _hash(self.name, module)

    def encode(self, images: Tensor) -> Tensor:
        """Return moments (n, 2c, h, h) or latents (n, c, h, h), float32, of images (n, C, H, H) in [-1, 1].

        Raises:
            UserError: the module failed, or returned something else.
        """
        if not callable(getattr(self.module, "encode", None)):
            raise UserError(f"{self.name}: has no method `encode`; add one, from images in [-1, 1] to moments")
        with self.section.blaming("encode failed"):
            found: Any = self.module.encode(images)
        is_square = isinstance(found, Tensor) and found.ndim == 4 and found.shape[2] == found.shape[3]
        if not is_square or len(found) != len(images) or not found.is_floating_point():
            raise UserError(f"{self.name}: encode returned {_described(found)}, expected floats (n, channels, h, h)")
        if self.moments and found.shape[1] % 2:
            raise UserError(
                f"{self.name}: encode returned {found.shape[1]} channels, expected means and as many logarithms of "
                "variances; set its attribute `moments` to False if they are latents"
            )
        if not found.isfinite().all():
            raise UserError(f"{self.name}: encode returned numbers that are not finite")
        moments: Tensor = found.float()
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Return images (n, C, H, H), float32, toward [-1, 1], of latents (n, c, h, h).

        Raises:
            UserError: the module failed, or returned something else.
        """
        with self.section.blaming(f"decode failed on latents of shape {tuple(latents.shape)}"):
            found: Any = self.module.decode(latents)
        is_image = isinstance(found, Tensor) and found.ndim == 4 and found.shape[2] == found.shape[3]
        if not is_image or len(found) != len(latents) or found.shape[1] not in (1, 3) or not found.is_floating_point():
            raise UserError(f"{self.name}: decode returned {_described(found)}, expected floats (n, 1 or 3, H, H)")
        images: Tensor = found.float()
        return images


def load_autoencoder(section: AutoencoderConfig) -> Autoencoder:
    """Load an autoencoder on the CPU.

    Raises:
        UserError: it is missing, its code is not allowed or fails, or it is no `torch.nn.Module` with `decode`.
    """
    module = section.build()
    if not isinstance(module, nn.Module) or not callable(getattr(module, "decode", None)):
        raise UserError(
            f"{section.technique}: made {type(module).__name__}, expected a torch.nn.Module with the methods `encode` "
            "and `decode`"
        )
    return Autoencoder(section, module)


def restore_autoencoder(
    section: AutoencoderConfig, architecture: dict[str, Any] | None, tensors: dict[str, Tensor], name: object
) -> Autoencoder:
    """Return the autoencoder of an export from its section, the options of a built-in one, and its weights.

    Raises:
        UserError: its code is not allowed, or the weights do not fit; the message begins with `name`.
    """
    if section.is_built_in:
        build = build_trained if section.technique == "distgan" else build_autoencoder_kl
        module: nn.Module = build(architecture or {}, name)
    else:
        with blaming(name):
            module = load_autoencoder(section).module
    try:
        module.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name}: not the weights of its decoder: {' '.join(str(error).split())[:200]}") from None
    return Autoencoder(section, module)


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _hash(name: str, module: nn.Module) -> str:
    # The weights do not tell all options apart, such as the groups of a normalization.
    architecture = module.architecture if isinstance(module, (AutoencoderKL, TrainedAutoencoder)) else None
    digest = hashlib.sha256(f"{name}\0{json.dumps(architecture, sort_keys=True)}".encode())
    for key, tensor in sorted(chain(module.named_parameters(), module.named_buffers())):
        digest.update(f"\0{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
