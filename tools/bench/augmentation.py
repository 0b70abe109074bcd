"""Measure the cost of `objective.augmentation` per image, against the operators of StyleGAN2-ADA's released code.

The baseline does ADA's default transforms as that code does: it pads by what the farthest transform of the batch needs,
doubles and halves the resolution by convolutions, and multiplies colors by a matrix per image. Another contestant is
one `grid_sample` without filters and one matrix, the least that such transforms can cost; a third is torchvision's
operators, called image by image, because a call has one set of parameters. Contestants take turns. `forward` is what a
discriminator update pays per sample; `forward and backward` is what a generator update pays.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as vision  # type: ignore[import-untyped]

from distgan import randomness
from distgan.losses.augmentation import Augmentation, AugmentationDraws
from distgan.losses.augmentation.ada import Ada
from distgan.losses.augmentation.color import adjust_color
from distgan.losses.augmentation.diffaugment import DiffAugment
from distgan.losses.augmentation.geometry import inverse_map
from distgan.losses.augmentation.resampling import SYM6

BASELINE = "StyleGAN2-ADA's operators"


def released_operators(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """Apply ADA's default transforms by padding, convolutions, `grid_sample` and a matrix per image."""
    count, channels, height, width = images.shape
    parameters = Ada().parameters(draws, height=height, width=width)
    inverse = inverse_map(parameters.geometry).to(images.dtype)
    middle = torch.tensor([width - 1.0, height - 1.0], device=images.device) / 2
    corners = torch.tensor([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)], device=images.device) * middle
    reached = (corners @ inverse[:, :, :2].mT + inverse[:, None, :, 2]).flatten(0, 1)
    needed = torch.stack((-reached.amin(0), reached.amax(0))) - middle + 6
    (left, top), (right, bottom) = needed.clamp(min=0).minimum(2 * middle).ceil().int().tolist()
    wide = F.pad(images, (left, right, top, bottom), mode="reflect").flatten(0, 1)[:, None]
    taps = torch.tensor(SYM6, device=images.device, dtype=images.dtype) / math.sqrt(2)
    row, column = taps.view(1, 1, 1, -1), taps.view(1, 1, -1, 1)
    wide = F.conv_transpose2d(F.conv_transpose2d(wide, 2 * row, stride=(1, 2)), 2 * column, stride=(2, 1))
    size, linear = torch.tensor(wide.shape[:1:-1], device=images.device), inverse[:, :, :2]
    ratio = torch.tensor([2.0 * width + 10, 2.0 * height + 10], device=images.device) / size[:, None]
    # The center of the image is half a place before that of the doubled one.
    padded = torch.tensor([left - right, top - bottom], device=images.device)
    offset = 2 * inverse[:, :, 2] + linear.sum(2) / 2 + padded - 0.5
    theta = torch.cat((linear * ratio, (2 * offset / size)[:, :, None]), dim=2)
    grid = F.affine_grid(theta, [count, channels, 2 * height + 10, 2 * width + 10], align_corners=False)
    moved = F.grid_sample(wide.view(count, channels, *wide.shape[2:]), grid, align_corners=False).flatten(0, 1)
    moved = F.conv2d(F.conv2d(moved[:, None], row, stride=(1, 2)), column, stride=(2, 1))
    black = adjust_color(images.new_zeros(count, 3, 1, 1), parameters.color)
    unit = torch.eye(3, device=images.device)[None, :, None].expand(count, -1, -1, -1)
    matrix = (adjust_color(unit, parameters.color) - black).squeeze(2)
    return (matrix @ moved.view(count, channels, -1) + black.squeeze(3)).view_as(images)


def least_operators(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """Resample all images at once without filters, and multiply their colors by a matrix each."""
    drawn = draws.uniform("parameters", 18)
    inverse = torch.eye(2, 3, device=images.device) + 0.3 * (drawn[:, :6].view(-1, 2, 3) - 0.5)
    grid = F.affine_grid(inverse, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
    matrix = torch.eye(3, device=images.device) + drawn[:, 6:15].view(-1, 3, 3) - 0.5
    return (matrix @ moved.flatten(2) + drawn[:, 15:, None]).view_as(images)


def torchvision_operators(images: Tensor, draws: AugmentationDraws) -> Tensor:
    """Resample each image and change its brightness, contrast and saturation with torchvision's operators."""
    drawn = draws.uniform("parameters", 8).tolist()
    found = []
    for image, (angle, x, y, scale, shear, brightness, contrast, saturation) in zip(images, drawn, strict=True):
        moved = vision.affine(
            image,
            angle=360.0 * angle,
            translate=[image.shape[-1] * (x - 0.5) / 4, image.shape[-1] * (y - 0.5) / 4],
            scale=2 ** (scale - 0.5),
            shear=[30 * (shear - 0.5)],
            interpolation=vision.InterpolationMode.BILINEAR,
        )
        brighter = vision.adjust_brightness(moved.clamp(0, 1), 0.5 + brightness)
        found.append(vision.adjust_saturation(vision.adjust_contrast(brighter, 0.5 + contrast), 2 * saturation))
    return torch.stack(found)


CONTESTANTS: dict[str, Augmentation] = {
    BASELINE: released_operators,
    "torchvision, image by image": torchvision_operators,
    "one grid_sample, one matrix": least_operators,
    "ada, its defaults": Ada(),
    "ada, everything": Ada(frequency_filter=1.0, noise=1.0, cutout=1.0),
    "diffaugment, everything": DiffAugment(),
}


def make_run(augmentation: Augmentation, images: Tensor, *, backward: bool) -> Callable[[], None]:
    """Return a function that augments the images once, and takes the gradient if `backward`."""
    places = torch.arange(len(images), device=images.device)
    draws = AugmentationDraws(
        uniform=lambda purpose, *shape: randomness.uniform(0, purpose, places, shape),
        normal=lambda purpose, *shape: randomness.normal(0, purpose, places, shape),
        probability=0.8,
    )
    samples = images.clone().requires_grad_(backward)

    def run() -> None:
        augmented = augmentation(samples, draws)
        if backward:
            torch.autograd.grad(augmented.square().mean(), samples)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="pixels per side (default: 32 64)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per call (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds (default: %(default)s)")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    for side in options.sides:
        images = torch.rand(options.batch_size, 3, side, side, device=device)
        for backward in (False, True):
            print(f"{side} pixels, {'forward and backward' if backward else 'forward'}, {device.type}")
            seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
            runs = {name: make_run(augment, images, backward=backward) for name, augment in CONTESTANTS.items()}
            for number in range(options.rounds + 2):
                for name, run in runs.items():
                    started = time.perf_counter()
                    run()
                    if number >= 2:
                        seconds[name].append(time.perf_counter() - started)
            report(seconds, options.batch_size)


def report(seconds: dict[str, list[float]], batch_size: int) -> None:
    """Print medians per image, and how many times as fast as the baseline each contestant is."""
    base = statistics.median(seconds[BASELINE])
    for name, found in seconds.items():
        median = statistics.median(found)
        print(f"  {name:28} {1e6 * median / batch_size:8.0f} us per image, {base / median:6.2f} times as fast")


if __name__ == "__main__":
    main()
