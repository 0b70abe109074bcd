"""Perceptual path length, PPL: how much images change along paths between latents.

Karras, Laine, Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks", CVPR 2019, section 4.1:
the mean of d(G(p(t)), G(p(t + epsilon))) / epsilon^2 over paths p, with d the perceptual distance LPIPS. With the mean
over t in [0, 1] it is the mean squared length of the paths. StyleGAN2 (Karras et al. 2020) reports paths in W at t = 0,
of whole images. As there, lengths below the 1 % quantile and above the 99 % quantile do not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from distgan import randomness
from distgan.errors import UserError, blaming
from distgan.evaluation.detectors.features import evaluation_folder
from distgan.evaluation.precision import plain_float32
from distgan.evaluation.samples import pad_batch
from distgan.evaluation.states import joined
from distgan.interpolation import slerp
from distgan.losses.lpips import SMALLEST, convolutions, load_lpips
from distgan.networks.stylegan2.noise import constant_noise
from distgan.published_weights import VGG16, Wording

if TYPE_CHECKING:
    from distgan.config import Config
    from distgan.evaluation.contract import EvaluatedGenerator, EvaluationContext

_PURPOSE = "path length"
_INSTEAD = "remove the metric"
_HIGHEST = 256
"""Images of twice as many pixels per side and more are averaged down to it."""


class PerceptualPathLength(Metric):
    """Perceptual path length of an evaluation, of `evaluation.num_samples` paths: `SuiteMetric`.

    Path i is a function of the seed and of i, and a path keeps the label of its start. Its two images have the same
    noise. Images are not rounded to 8 bits, which would hide a step of 1e-4.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    kinds = ("images",)
    takes = ("generator", "numbers")
    lengths: list[Tensor] | Tensor
    distance: Callable[[Tensor, Tensor], Tensor]
    """Maps images in [-1, 1], (n, C, H, W), and others to distances (n,)."""

    def __init__(
        self,
        context: EvaluationContext,
        *,
        space: Literal["w", "z"] = "w",
        sampling: Literal["end", "full"] = "end",
        epsilon: float = 1e-4,
        crop: bool = False,
        weights: str | None = None,
    ) -> None:
        """Load LPIPS with rank 0's weights. Collective: call on every rank.

        Raises UserError if its weights cannot be downloaded or read, or the generator or its images do not fit.
        """
        super().__init__()
        self.validate(context.config, context.name, space=space, crop=crop, weights=weights)
        self.space, self.sampling, self.epsilon, self.crop = space, sampling, epsilon, crop
        self.name, self.seed = context.name, context.config.seed
        self.pairs = max(1, context.config.evaluation.batch_size // 2)
        wording = Wording(context.name, "weights in {metric: ppl, weights: PATH}", "evaluation.cache_dir", _INSTEAD)
        folder = evaluation_folder(context.config.evaluation)
        read = context.runtime.run_on_main(lambda _: convolutions(VGG16.read(weights, folder, wording).tensors))
        with blaming(weights or "the downloaded weights"):
            self.distance = load_lpips(read)
        self.add_state("lengths", [], dist_reduce_fx="cat")

    @staticmethod
    def validate(config: Config, name: str, *, space: str, crop: bool, weights: str | None) -> None:
        """Raise UserError if the generator has no paths in this space, its images are too small, or a file is missing.

        Args:
            name: name of the metric in messages.
        """
        network = config.generator.load()
        if space == "w" and isinstance(network, type):
            _check_styles(network, name, config.generator.architecture)
        if config.data.resolution < (2 * SMALLEST if crop else SMALLEST):
            raise UserError(
                f"{name}: data.resolution = {config.data.resolution}: VGG16 needs {SMALLEST} pixels per side after "
                f"cropping; {_INSTEAD}"
            )
        if weights is not None and not Path(weights).expanduser().is_file():
            raise UserError(f"{name}: weights = {weights}: no such file; correct the path, or remove weights")

    def update(self, generator: EvaluatedGenerator, numbers: Tensor) -> None:
        """Add the paths of these numbers, int64, shape (n,)."""
        assert isinstance(self.lengths, list)
        for part in numbers.split(self.pairs):
            self.lengths.append(self._measure(generator, pad_batch(part, self.pairs))[: len(part)].double())

    def compute(self) -> Tensor:
        """Compute the mean length of the paths of all ranks."""
        return trimmed_mean(joined(self.lengths))

    def _measure(self, generator: EvaluatedGenerator, numbers: Tensor) -> Tensor:
        """Return the lengths of paths, shape (n,)."""
        starts, labels = generator.draw(_PURPOSE, 2 * numbers)
        ends, _ = generator.draw(_PURPOSE, 2 * numbers + 1)
        shares = torch.zeros(len(numbers))
        if self.sampling == "full":
            shares = randomness.uniform(self.seed, f"{_PURPOSE}/share", numbers)
        shares = shares.double().to(starts.device)
        steps = torch.cat((shares, shares + self.epsilon))
        images = images_on_paths(generator.network, self.space, starts, ends, labels, steps, self.name)
        images = images.float()
        resolution = images.shape[-1]
        if self.crop:
            images = center_crop(images)
        if resolution >= 2 * _HIGHEST:
            images = F.avg_pool2d(images, resolution // _HIGHEST)
        with plain_float32(images.device):
            return self.distance(*images.chunk(2)) / self.epsilon**2


def images_on_paths(
    network: Any, space: str, starts: Tensor, ends: Tensor, labels: Tensor | None, shares: Tensor, name: str = "ppl"
) -> Tensor:
    """Return the images at places on n paths, with the noise of a path's start.

    Args:
        network: generator in evaluation mode. Paths in W need its methods `styles(latents, labels)` and
            `synthesize(styles, latents)`, as `losses.path_length` does.
        space: `w`, straight lines between the styles of latents; or `z`, arcs between latents, see `arcs`.
        starts, ends: latents, shape (n, d); labels: shape (n,), or None.
        shares: places from 0 at the start to 1 at the end, float64, shape (k n,): for all paths, k times.
    """
    repeats = len(shares) // len(starts)
    has_styles = all(hasattr(network, method) for method in ("styles", "synthesize"))
    noise = starts.repeat(repeats, 1)
    if space == "w":
        _check_styles(network, name, type(network).__name__)
        ends_of_lines = (network.styles(latents, labels) for latents in (starts, ends))
        first, last = (styles.repeat(repeats, *(1,) * (styles.dim() - 1)) for styles in ends_of_lines)
        between = first.double().lerp(last.double(), shares.view(-1, *(1,) * (first.dim() - 1)))
        images: Tensor = network.synthesize(between.to(first.dtype), noise)
        return images
    latents = arcs(noise, ends.repeat(repeats, 1), shares)
    labels = None if labels is None else labels.repeat(repeats)
    if has_styles:
        images = network.synthesize(network.styles(latents, labels), noise)
    else:
        with constant_noise(network):
            images = network(latents, labels)
    return images


def arcs(starts: Tensor, ends: Tensor, shares: Tensor) -> Tensor:
    """Move from starts toward the directions of ends, by shares of their angles, on spheres around 0.

    A network that normalizes its latents, as StyleGAN's, sees what the released code makes: an arc between unit
    vectors. For others the start's length is that of a latent of the training.

    Args:
        starts, ends: shape (n, d).
        shares: float64, shape (n,).

    Returns:
        Shape (n, d), in the dtype of the starts.
    """
    lengths = starts.double().norm(dim=1, keepdim=True)
    return slerp(starts.double(), lengths * F.normalize(ends.double()), shares[:, None])[:, 0].to(starts.dtype)


def trimmed_mean(values: Tensor) -> Tensor:
    """Return the mean of the values from the 1 % quantile to the 99 % quantile, both included; NaN if one is NaN.

    Quantiles are values: the next lower one at 1 %, the next higher one at 99 %.

    Args:
        values: shape (n,), n >= 1.
    """
    ordered = values.double().sort().values
    last = len(ordered) - 1
    low, high = ordered[last // 100], ordered[-(-99 * last // 100)]
    if ordered[-1].isnan():
        return torch.tensor(math.nan, dtype=torch.float64)
    return ordered[(ordered >= low) & (ordered <= high)].mean()


def center_crop(images: Tensor) -> Tensor:
    """Return the center of aligned faces (n, C, R, R): 3/8 to 7/8 of the height, 2/8 to 6/8 of the width."""
    eighth = images.shape[-1] // 8
    return images[..., 3 * eighth : 7 * eighth, 2 * eighth : 6 * eighth]


def _check_styles(network: type | nn.Module, name: str, said: str) -> None:
    missing = [method for method in ("styles", "synthesize") if not hasattr(network, method)]
    if missing:
        raise UserError(
            f"{name}: space = w needs a generator with a mapping network; {said} has no method {missing[0]}; set "
            "space: z, or use generator.architecture: stylegan2"
        )
