"""A trained generator on its own: `config.json` and `model.safetensors`, and a module made of them in one call."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from distgan.config import Config, GeneratorConfig, parse_config, parse_section
from distgan.errors import UserError
from distgan.files import read_bounded, sync_folder, write_atomically
from distgan.generation import statistics_batches
from distgan.latents import LatentSource
from distgan.networks import build_generator
from distgan.networks.layers.normalisation import recompute_statistics
from distgan.training import checkpoint
from distgan.training.restore import find_checkpoint

_FORMAT = "distgan generator"


class Generator(nn.Module):
    """An averaged generator ready for use: `generator(generator.latents(16, seed=0))`.

    Attributes:
        latent_size: numbers in a latent vector.
        resolution, channels: shape of the images.
        num_classes: 0 for an unconditional generator.
        class_names: names of the classes, or None.
        step, images: how long it was trained, in steps and in real images seen.
    """

    def __init__(self, description: dict[str, Any], config: GeneratorConfig) -> None:
        super().__init__()
        self.description = description
        self.latent_size = config.latent_size
        self.resolution: int = description["resolution"]
        self.channels: int = description["channels"]
        counts = description["class_counts"]
        self.num_classes = len(counts) if counts else 0
        self.class_names: list[str] | None = description["class_names"]
        self.step: int = description["step"]
        self.images: int = description["images"]
        self.config = config
        self.network = build_generator(
            config, resolution=self.resolution, channels=self.channels, num_classes=self.num_classes
        )
        self.eval().requires_grad_(False)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents (n, latent_size) float, and labels (n,) int64 if it has classes, to images (n, C, R, R) in [-1, 1].

        Raises:
            UserError: labels are missing.
        """
        if self.num_classes and labels is None:
            raise UserError(f"this generator is conditional: give labels, integers in [0, {self.num_classes})")
        images: Tensor = self.network(latents, labels)
        return images

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


def load_generator(path: str | os.PathLike[str], *, best: bool = False) -> Generator:
    """The averaged generator of an export, a checkpoint, or a run (its newest checkpoint, or its best).

    From a checkpoint or a run, batch-norm statistics are recomputed from addressed latents on the way.

    Raises:
        UserError: naming the file that is missing, damaged or of another kind.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        return _load_export(folder)
    return _load_checkpoint(find_checkpoint(folder, best=best))


def export(source: str | os.PathLike[str], destination: str | os.PathLike[str], *, best: bool = False) -> Path:
    """Write the averaged generator of a run or checkpoint as `config.json` and `model.safetensors`.

    An earlier export at `destination` is replaced; anything else there is refused.
    """
    target = Path(destination)
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if target.exists() and not (target.is_dir() and names <= {"config.json", "model.safetensors"}):
        raise UserError(f"{target}: exists and is not an export; choose an empty or new folder")
    generator = load_generator(source, best=best)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        tensors = {name: value.contiguous() for name, value in generator.network.state_dict().items()}
        safetensors.torch.save_file(tensors, temporary / "model.safetensors")
        write_atomically(temporary / "config.json", json.dumps(generator.description, indent=1).encode())
        sync_folder(temporary)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot write the export: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _load_export(folder: Path) -> Generator:
    file = folder / "config.json"
    try:
        description = json.loads(read_bounded(file, 16 << 20))
        if description["format"] != _FORMAT or description["version"] != 1:
            raise KeyError("format")
        config = parse_section(GeneratorConfig, description["generator"], source=str(file))
        generator = Generator(description, config)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not the description of an exported generator; make one with distgan export") from None
    weights = folder / "model.safetensors"
    try:
        tensors = safetensors.torch.load_file(weights)
        generator.network.load_state_dict(tensors)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{weights}: does not hold this generator's weights: {reason}; export it again") from None
    return generator


def _load_checkpoint(path: Path) -> Generator:
    state = checkpoint.load_state(path)
    config: Config = parse_config(state["config"], source=f"{path}/state.json")
    classes = state["classes"]
    description = {
        "format": _FORMAT,
        "version": 1,
        "generator": config.generator.model_dump(mode="json"),
        "resolution": config.data.resolution,
        "channels": config.data.channels,
        "class_names": classes["names"] if classes else None,
        "class_counts": classes["counts"] if classes else None,
        "step": state["step"],
        "images": state["images"],
        "data_fingerprint": state["data"]["fingerprint"],
        "versions": state["versions"],
    }
    generator = Generator(description, config.generator)
    tensors = checkpoint.load_files(path, ["generator_ema"])["generator_ema"]
    try:
        generator.network.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}/generator_ema.safetensors: does not fit the config in state.json: {reason}") from None
    source = LatentSource(config.generator, config.seed, class_counts=description["class_counts"])
    recompute_statistics(generator.network, statistics_batches(source, config))
    return generator
