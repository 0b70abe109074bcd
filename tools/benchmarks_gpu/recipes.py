"""Recipes and generated data of the GPU benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tools.commands import ROOT, distgan

if TYPE_CHECKING:
    from distgan.config import Config

REHEARSAL_RESOLUTION = 32
IMAGES, REHEARSAL_IMAGES = 4096, 64


@dataclass(frozen=True)
class Recipe:
    """Recipe file with the overrides that give it the published widths."""

    file: str
    """Name in configs/."""
    resolution: int
    """Pixels per side."""
    interval: int
    """Number of steps between two readings of the clock."""
    changes: tuple[str, ...]
    """Overrides of the file."""
    source: str
    """Paper and settings, for the page."""

    def config(self, data: Path, run: Path, *, rehearsal: bool) -> Config:
        """Return the config of an endless run without evaluations, sample grids and checkpoints.

        Args:
            data: folder with one packed data set per resolution, from `make_data`.
            run: run folder.
            rehearsal: use tiny sizes.
        """
        from distgan.config import load_config

        resolution, interval = self.sizes(rehearsal=rehearsal)
        changes = [
            *self.changes, f"data.resolution={resolution}", "data.channels=3", f"data.path={data / str(resolution)}",
            f"run_dir={run}", "training.steps=1000000", f"monitoring.every={interval}",
            "monitoring.samples_every=1000000", "monitoring.num_samples=1", "monitoring.tensorboard=false",
            "checkpoint.every=1000000", "evaluation.every=0",
        ]  # fmt: skip
        if rehearsal:
            for role in ("generator", "discriminator"):
                changes += [f"{role}.width=8", f"{role}.max_width=16"]
            changes += ["training.batch_size=4", "ema.statistics_samples=4"]
            # One recipe of a dry run has a data loader worker, to test that workers start from this tool's module.
            changes += [f"data.num_workers={int(self is RECIPES['DCGAN-64'])}"]
            changes += ["training.critic_steps=2"] if self is RECIPES["SNGAN-32"] else []
        return load_config(ROOT / "configs" / self.file, changes)

    def sizes(self, *, rehearsal: bool) -> tuple[int, int]:
        """Return the pixels per side, and the steps between two readings of the clock."""
        return (REHEARSAL_RESOLUTION, 1) if rehearsal else (self.resolution, self.interval)


RECIPES = {
    "DCGAN-64": Recipe(
        "cifar10-dcgan.yaml", 64, 25,
        ("generator.width=128", "generator.max_width=1024", "discriminator.width=64", "discriminator.max_width=512",
         "training.batch_size=128", "data.num_workers=8"),
        "Radford et al. 2016: 1024 to 128 channels, batch 128",
    ),
    "SNGAN-32": Recipe(
        "cifar10-sngan.yaml", 32, 10, ("data.num_workers=8", "training.generator_batch_size=null"),
        "Miyato et al. 2018: 256 and 128 channels, batch 64, 5 critic steps",
    ),
    "R3GAN-32": Recipe(
        "digits-r3gan.yaml", 32, 2,
        (*(f"{role}.{change}" for role in ("generator", "discriminator")
           for change in ("width=768", "max_width=768", "depth=2", "optimizer.betas=[0.0,0.9]")),
         "objective.r1={gamma: 0.05}", "objective.r2={gamma: 0.05}", "training.batch_size=64", "data.num_workers=4"),
        "Huang et al. 2024: 768 channels, R1 and R2 in every update; 64 images, one of 8 GPUs' share of 512",
    ),
}  # fmt: skip


def make_data(folder: Path, *, rehearsal: bool) -> Iterator[str]:
    """Generate images and pack them at every resolution of `RECIPES`. Yields one line per data set."""
    import numpy as np
    from PIL import Image

    count = REHEARSAL_IMAGES if rehearsal else IMAGES
    random = np.random.default_rng(0)
    for resolution in sorted({recipe.sizes(rehearsal=rehearsal)[0] for recipe in RECIPES.values()}):
        source = folder / f"images-{resolution}"
        source.mkdir(parents=True)
        for number in range(count):
            # Smooth colors with a little noise compress like photographs.
            colors = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            smooth = Image.fromarray(colors).resize((resolution, resolution))
            noise = random.integers(0, 12, (resolution, resolution, 3), dtype=np.uint8)
            Image.fromarray(np.asarray(smooth) // 2 + noise + 50).save(source / f"{number:05d}.png", compress_level=1)
        yield distgan("pack", str(source), str(folder / str(resolution))).strip()
