"""Sliced Wasserstein distance of image patches at each scale, as in ProGAN.

Karras, Aila, Laine, Lehtinen, "Progressive Growing of GANs for Improved Quality, Stability, and Variation", ICLR 2018,
section 5: 16,384 images of each side, their Laplacian pyramids down to 16 pixels, and of each image and level 128
descriptors: neighborhoods of 7 x 7 pixels and all channels. The descriptors of a side and level are normalized by the
mean and standard deviation of each channel. The distance of a level is the mean over 512 random directions of the
Wasserstein-1 distance of the projected descriptors, which is the mean difference of the sorted projections. As in the
paper's tables, values are multiplied by 1,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.numerics.laplacian_pyramid import SMALLEST, laplacian_pyramid, level_sizes
from distgan.evaluation.numerics.subsets import choose_reals
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.states import joined
from distgan.randomness import integers, normal

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

PER_IMAGE = 128
SIDE = 7
DIRECTIONS = 512
_AT_A_TIME = 16
"""Directions along which both sides are projected at a time: 128 bytes per descriptor and side."""
_IMAGES = 256
_PIXELS = 2**24
"""Most numbers of the images whose pyramid is made at a time."""


class Descriptors(Metric):
    """Descriptors of images, on the host: 128 C 49 numbers of 4 bytes per image and level.

    Update with images and their numbers, which address the places of the descriptors. Compute tensors by the size of
    their level, float32, shape (n, 128, C, 49), in order of the numbers.
    """

    is_differentiable = False
    full_state_update = False
    numbers: list[Tensor] | Tensor

    def __init__(self, resolution: int) -> None:
        super().__init__()
        self.sizes = level_sizes(resolution)
        for size in self.sizes:
            self.add_state(f"level{size}", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, images: Tensor, numbers: Tensor) -> None:
        """Add images, uint8, shape (n, C, R, R), and their numbers, int64, shape (n,)."""
        assert isinstance(self.numbers, list)
        self.numbers.append(numbers.cpu())
        few = max(1, _PIXELS // images[0].numel())
        for some, own in zip(images.split(few), numbers.to(images.device).split(few), strict=True):
            for size, level in zip(self.sizes, laplacian_pyramid(some, len(self.sizes)), strict=True):
                getattr(self, f"level{size}").append(descriptors(level, own).cpu())

    def compute(self) -> dict[str, Tensor]:
        """Return the descriptors, by `level16` and so on."""
        order = joined(self.numbers).long().argsort()
        return {f"level{size}": joined(getattr(self, f"level{size}"))[order] for size in self.sizes}


class RealDescriptors(Descriptors):
    """Descriptors of as many real images as generated ones, but at most `max_images`."""

    takes = ("samples", "numbers")

    def __init__(self, context: EvaluationContext, max_images: int) -> None:
        super().__init__(context.config.data.resolution)
        most = min(max_images, context.num_samples)
        self.chosen = choose_reals(len(context.index), most)
        self.cache_name = f"real-descriptors-{most}"


class SlicedWasserstein(Descriptors):
    """Sliced Wasserstein distances of an evaluation: `SuiteMetric`."""

    kinds = ("images",)
    takes = ("samples", "numbers")
    higher_is_better = False
    real_statistic = RealDescriptors

    def __init__(self, context: EvaluationContext, reals: Mapping[str, Tensor], *, max_images: int = 16_384) -> None:
        """Prepare the descriptors.

        Args:
            max_images: number of images of each side above which they are left out.

        Raises:
            UserError: the images are smaller than 16 pixels per side.
        """
        resolution = context.config.data.resolution
        if resolution < SMALLEST:
            raise UserError(
                f"{context.name}: found images of {resolution} pixels per side, expected at least {SMALLEST}; remove "
                "sliced_wasserstein from evaluation.metrics"
            )
        super().__init__(resolution)
        self.reals = {name: rows for name, rows in reals.items() if name.startswith("level")}
        self.count = min(max_images, context.num_samples, *map(len, self.reals.values()))

    def update(self, images: Tensor, numbers: Tensor) -> None:
        """Add images, uint8, shape (n, C, R, R), and their numbers, int64, shape (n,)."""
        kept = int((numbers < self.count).sum())  # numbers increase
        if kept:
            super().update(images[:kept], numbers[:kept])

    def compute(self) -> dict[str, Tensor]:
        """Compute the mean over the levels and each level's distance, such as `[16]`, times 1,000: float64 scalars."""
        found = {}
        for name, generated in super().compute().items():
            fakes, reals = (normalized(side).to(self.device) for side in (generated, self.reals[name][: self.count]))
            found[f"[{name.removeprefix('level')}]"] = 1000 * sliced_distance(fakes, reals)
        return {"": torch.stack(list(found.values())).mean(), **found}


def descriptors(level: Tensor, numbers: Tensor) -> Tensor:
    """Return the neighborhoods of 128 addressed places of each image: (n, C, S, S) to float32 (n, 128, C, 49)."""
    size = level.shape[-1]
    purpose = f"sliced_wasserstein/places {size}"
    y, x = integers(0, purpose, numbers, size - SIDE + 1, (2, PER_IMAGE)).unbind(1)
    windows = level.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # a view, shape (n, C, S - 6, S - 6, 7, 7)
    images = torch.arange(len(level), device=level.device)[:, None]
    return windows[images, :, y, x].flatten(3).float()


def normalized(rows: Tensor) -> Tensor:
    """Normalize each channel by its mean and population standard deviation: (n, 128, C, 49) to (128 n, 49 C).

    A channel that is constant becomes 0.
    """
    parts = rows.split(_IMAGES)
    count = rows.numel() // rows.shape[2]
    mean = torch.stack([part.double().sum((0, 1, 3)) for part in parts]).sum(0) / count
    squares = [(part.double() - mean[:, None]).square().sum((0, 1, 3)) for part in parts]
    deviation = (torch.stack(squares).sum(0) / count).sqrt()
    scale = torch.where(deviation > 0, 1 / deviation, 0.0)
    done = torch.empty_like(rows)
    for target, part in zip(done.split(_IMAGES), parts, strict=True):
        target.copy_((part.double() - mean[:, None]) * scale[:, None])
    return done.flatten(0, 1).flatten(1)


def directions(dimension: int) -> Tensor:
    """Return the addressed unit vectors, float32, shape (512, dimension)."""
    drawn = normal(0, "sliced_wasserstein/directions", torch.arange(DIRECTIONS), (dimension,))
    return F.normalize(drawn.double()).float()


def sliced_distance(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean over directions of the Wasserstein-1 distance of the projections: (m, d) each, to a scalar."""
    distances = []
    for some in directions(first.shape[1]).to(first.device).split(_AT_A_TIME):
        with ieee_float32():
            a, b = (some @ side.T for side in (first, second))
        distances.append((a.sort(1).values - b.sort(1).values).abs().double().mean(1))
    return torch.cat(distances).mean()
