"""Which autoencoder stands between images and latents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError, model_validator

from distgan.config.error_messages import explain
from distgan.config.fields import Section, plain_value
from distgan.config.named import BuiltIn, NamedSection
from distgan.errors import UserError
from distgan.extensions import is_import_path


class _DiffusersOptions(Section):
    path: str
    """Folder with config.json and diffusion_pytorch_model.safetensors, as `AutoencoderKL.save_pretrained` writes it."""


class _TrainedOptions(Section):
    path: str
    """Run, checkpoint or export of an autoencoder (`generator.architecture: autoencoder`), or its URL."""


class AutoencoderConfig(NamedSection):
    """A fixed autoencoder of images. A path alone stands for `{autoencoder: diffusers, path: PATH}`, or, if there is a
    run, checkpoint or export of distgan, or for a URL, for `{autoencoder: distgan, path: PATH}`."""

    naming_key: ClassVar = "autoencoder"
    built_in: ClassVar = {
        "diffusers": BuiltIn("distgan.autoencoders.diffusers_folder:load_autoencoder_kl", _DiffusersOptions),
        "distgan": BuiltIn("distgan.inference.autoencoder:load_trained", _TrainedOptions),
    }

    autoencoder: str
    """`diffusers`: an `AutoencoderKL` of the package diffusers. `distgan`: one that distgan trained, of the newest
    checkpoint of a run. Or the import path of a module of your own, with `encode` and `decode`."""

    @model_validator(mode="before")
    @classmethod
    def _accept_a_folder(cls, values: Any) -> Any:
        if isinstance(values, str) and values not in cls.built_in and not is_import_path(values):
            return _folder(values)
        return values


def _folder(path: str) -> dict[str, Any]:
    """Return the section of a folder."""
    place = Path(path)
    made_here = "://" in path or any(
        (place / name).exists() for name in ("checkpoints", "state.json", "model.safetensors")
    )
    return {"autoencoder": "distgan" if made_here else "diffusers", "path": path}


def parse_autoencoder(encoder: str, options: Iterable[str]) -> AutoencoderConfig:
    """Return the section of an autoencoder that the user names, with options such as `weights=vae.safetensors`.

    Raises:
        UserError: it is not known, or has no such option.
    """
    section = {"autoencoder": encoder} if is_import_path(encoder) else _folder(encoder)
    given = {key: plain_value(value) for key, _, value in (option.partition("=") for option in options)}
    try:
        return AutoencoderConfig.model_validate({**section, **given})
    except ValidationError as error:
        raise UserError(f"--encoder {encoder}: {explain(error, AutoencoderConfig)[1]}") from None
