"""The `AutoencoderKL` of a local folder in the format of diffusers (extra `latents`), such as Stable Diffusion's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgan.errors import UserError, blaming_code
from distgan.files import read_bounded
from distgan.packages import is_installed

_CLASS = "AutoencoderKL"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_MAX_CONFIG = 1 << 20


class AutoencoderKL(nn.Module):
    """Images (n, 3, H, W) in [-1, 1] to moments (n, 2c, h, w), and latents (n, c, h, w) to images.

    Latents are those of the posterior, without the scaling factor of diffusers' config.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    @property
    def architecture(self) -> dict[str, Any]:
        """Options of the model without its weights, for `build_autoencoder_kl`."""
        return {key: value for key, value in dict(self.model.config).items() if not key.startswith("_")}

    def encode(self, images: Tensor) -> Tensor:
        """Return means and logarithms of variances."""
        moments: Tensor = self.model.encode(images).latent_dist.parameters
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Return images."""
        images: Tensor = self.model.decode(latents).sample
        return images


def load_autoencoder_kl(path: str) -> AutoencoderKL:
    """Load a folder from its safetensors. Nothing is downloaded or unpickled.

    Raises:
        UserError: the folder has other files than an `AutoencoderKL`, or diffusers is not installed.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or not (folder / _WEIGHTS).is_file():
        raise UserError(
            f"{path}: not a folder of an autoencoder: expected config.json and {_WEIGHTS}, as "
            f"{_CLASS}.save_pretrained writes them; download it first, such as the folder vae of a model"
        )
    try:
        described = json.loads(read_bounded(folder / "config.json", _MAX_CONFIG))
        name = described.get("_class_name") if isinstance(described, dict) else None
    except (ValueError, RecursionError):
        name = None
    if name != _CLASS:
        raise UserError(f"{folder / 'config.json'}: found _class_name {str(name)[:80]!r}, expected {_CLASS!r}")
    model = _model_class(path)
    with blaming_code(f"{path}: cannot be loaded as an {_CLASS}"):
        return AutoencoderKL(model.from_pretrained(folder, local_files_only=True, use_safetensors=True))


def build_autoencoder_kl(architecture: dict[str, Any], name: object) -> AutoencoderKL:
    """Build a model without its weights, on the meta device, so that false sizes take no memory.

    Args:
        architecture: that of an export, which anyone may have written.
        name: begins the messages.

    Raises:
        UserError: the architecture is invalid, or diffusers is not installed.
    """
    model = _model_class(name)
    with blaming_code(f"{name}: its decoder cannot be built"), torch.device("meta"):
        return AutoencoderKL(model.from_config(architecture))


def _model_class(name: object) -> Any:
    if not is_installed("diffusers"):
        raise UserError(f"{name}: the package diffusers is not installed; pip install 'distgan[latents]'")
    from diffusers import AutoencoderKL as Model  # late, because it is optional and its import takes seconds

    return Model
