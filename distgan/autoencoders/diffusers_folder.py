"""The `AutoencoderKL` of a local folder in the format of diffusers (extra `latents`), such as Stable Diffusion's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
    if not is_installed("diffusers"):
        raise UserError(f"{path}: the package diffusers is not installed; pip install 'distgan[latents]'")
    from diffusers import AutoencoderKL as Model  # late, because it is optional and its import takes seconds

    with blaming_code(f"{path}: cannot be loaded as an {_CLASS}"):
        made: Any = Model
        return AutoencoderKL(made.from_pretrained(folder, local_files_only=True, use_safetensors=True))
