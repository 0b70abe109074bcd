"""Run R3GAN's released networks and training step (github.com/brownvc/R3GAN) on distgan's data and batches."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import torch
from packaging import version
from torch import nn
from torch.utils import cpp_extension

from distgan import schedule
from distgan.config import Config
from distgan.networks.shape import sample_shape
from tools.bench.training import Bare


def load(checkout: Path) -> str:
    """Make a checkout importable. Return a phrase for the implementation of its activations and resampling.

    It compiles R3GAN's CUDA kernels if nvcc and ninja exist, which takes about a minute.

    Raises:
        SystemExit: the folder is not a checkout of R3GAN.
    """
    if not (checkout / "R3GAN" / "Networks.py").is_file():
        raise SystemExit(f"--r3gan {checkout}: found no R3GAN/Networks.py; pass a checkout of github.com/brownvc/R3GAN")
    sys.path.insert(0, str(checkout))
    if importlib.util.find_spec("pkg_resources") is None:  # newer setuptools versions removed it
        stand_in: Any = types.ModuleType("pkg_resources")
        stand_in.parse_version = version.parse
        sys.modules["pkg_resources"] = stand_in
    if torch.cuda.is_available() and _builds_kernels():
        return "its CUDA kernels"
    activations, resamplers = (importlib.import_module(f"R3GAN.{name}") for name in ("FusedOperators", "Resamplers"))
    activations.BiasedActivation = activations.BiasedActivationReference  # type: ignore[attr-defined]
    for name in ("InterpolativeUpsampler", "InterpolativeDownsampler"):
        setattr(resamplers, name, getattr(resamplers, f"{name}Reference"))
    return "its reference operators"


def _builds_kernels() -> bool:
    """Compile R3GAN's CUDA kernels. Return False if that fails for any reason."""
    if cpp_extension.CUDA_HOME is None or shutil.which("ninja") is None:
        return False
    try:
        return all(importlib.import_module(f"torch_utils.ops.{name}")._init() for name in ("bias_act", "upfirdn2d"))
    except Exception as error:  # R3GAN's build scripts raise exceptions of any type
        print(f"R3GAN's CUDA kernels cannot be built: {' '.join(str(error).split())[:200]}", file=sys.stderr)
        return False


class Published(Bare):
    """R3GAN's training step. Call `load` first.

    Args:
        config: an R3GAN recipe.
        half: run all stages except those at 4x4 in bfloat16, as R3GAN's CIFAR-10 preset does.
    """

    def __init__(self, config: Config, *, half: bool) -> None:
        self._half = half
        super().__init__(config)
        trainer = importlib.import_module("R3GAN.Trainer")
        self._trainer: Any = trainer.AdversarialTraining(self.generator, self.discriminator)

    def _build(self) -> tuple[nn.Module, nn.Module]:
        networks: Any = importlib.import_module("R3GAN.Networks")
        self._format = torch.contiguous_format  # R3GAN's code uses no other memory format
        settings, latent_size = self.config.generator.options, self.config.generator.latent_size
        stages = sample_shape(self.config.data).resolution.bit_length() - 2
        widths = [min(settings.width << stage, settings.max_width) for stage in range(stages)]
        shared = {"BlocksPerStage": [settings.depth] * stages, "ExpansionFactor": 2}
        groups = [width * 2 // settings.group_width for width in widths]
        generator = networks.Generator(
            NoiseDimension=latent_size, WidthPerStage=widths[::-1], CardinalityPerStage=groups[::-1], **shared
        )
        discriminator = networks.Discriminator(WidthPerStage=widths, CardinalityPerStage=groups, **shared)
        if self._half:
            for stage in (*generator.MainLayers[1:], *discriminator.MainLayers[:-1]):
                stage.DataType = torch.bfloat16
        return generator.to(self.device), discriminator.to(self.device)

    def step(self) -> None:
        """Update both players, without R3GAN's EMA, augmentation and logging."""
        gamma = schedule.value(self.config.objective.r1.gamma, 0, 1) if self.config.objective.r1 else 0.0
        for player, optimizer in zip((self.discriminator, self.generator), self._optimizers[::-1], strict=True):
            optimizer.zero_grad(set_to_none=True)
            player.requires_grad_(True)
            if player is self.discriminator:
                self._trainer.AccumulateDiscriminatorGradients(self._latents(), self._reals(), None, gamma)
            else:
                self._trainer.AccumulateGeneratorGradients(self._latents(), self._reals(), None)
            player.requires_grad_(False)
            optimizer.step()
