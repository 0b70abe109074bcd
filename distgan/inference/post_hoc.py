"""Averages of any width over a run's weights, made after training (Karras et al. 2024, section 3.2)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from distgan.checkpoint.averages import FOLDER, snapshots
from distgan.checkpoint.contents import load_description
from distgan.checkpoint.downloads import is_url
from distgan.checkpoint.layout import read_sets
from distgan.checkpoint.loading import find_checkpoint, load_sets, load_state
from distgan.checkpoint.merging import write_merged
from distgan.config import parse_config
from distgan.data.storage.locations import local_path, public_name
from distgan.distributed.parts import Stored
from distgan.errors import UserError, counted
from distgan.files import reason, writing
from distgan.schedule import power_exponent

_MOST_SNAPSHOTS = 100_000
_FIX = "remove the file to do without it"


class Profile(NamedTuple):
    """A power-function average: its relative standard deviation, and its time in images."""

    std: float
    images: int


class Fit(NamedTuple):
    """Weights of averages, which sum to 1, and the distance of the profile that they make from the wanted one."""

    weights: NDArray[np.float64]
    distance: float
    """L2 norm of the difference of both profiles as functions of time, over the norm of the wanted one."""


def fit_profile(profiles: Sequence[Profile], wanted: Profile) -> Fit:
    """Return the weights with which averages of `profiles` come closest to the average `wanted`.

    The least-squares fit of the wanted profile, a power function of time that is 0 after its own time (Karras et al.
    2024, appendix C, algorithm 3), in float64.
    """
    exponents = np.array([power_exponent(profile.std) for profile in profiles])
    times = np.array([float(profile.images) for profile in profiles])
    products = _inner_products(exponents[:, None], times[:, None], exponents[None], times[None])
    exponent, time = np.array(power_exponent(wanted.std)), np.array(float(wanted.images))
    wanted_products = _inner_products(exponents, times, exponent, time)
    solved = np.linalg.lstsq(products, wanted_products, rcond=None)[0]
    weights = np.asarray(solved / solved.sum(), np.float64)
    square = weights @ products @ weights - 2 * weights @ wanted_products
    norm = float(_inner_products(exponent, time, exponent, time))
    return Fit(weights, math.sqrt(max(0.0, 1.0 + float(square) / norm)))


def _inner_products(
    a: NDArray[np.float64], time_a: NDArray[np.float64], b: NDArray[np.float64], time_b: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the integrals over time of products of two profiles (p(t) = (a + 1) t^a / T^(a + 1) up to T)."""
    ratio = time_a / time_b
    power = np.where(time_a < time_b, b, -a)
    largest = np.maximum(time_a, time_b)
    return np.asarray((a + 1) * (b + 1) * ratio**power / ((a + b + 1) * largest))


_TOLERANCE = 0.2
"""Largest distance of an average's profile from the wanted one."""


class Average(NamedTuple):
    """A written average."""

    path: Path
    snapshots: int
    """Number of times whose averages it is made of."""
    distance: float
    """See `Fit`."""
    amplification: float
    """Sum of the weights' absolute values: rounding errors of the snapshots grow at most so many times."""


def average(run: str | os.PathLike[str], std: float, destination: str | os.PathLike[str] | None = None) -> Average:
    """Write the power-function average of a run's weights of relative width `std`, up to its newest checkpoint.

    The result is a checkpoint without training state: evaluate, sample and export take it, but nothing resumes from it.

    Args:
        std: 0.01 to 0.25.
        destination: folder to create; by default `averages/std-STD-step-STEP` in the run folder.

    Raises:
        UserError: the run keeps no profiles, its snapshots are too few for this width, one of them is damaged, or the
            folder exists or cannot be written.
    """
    if not 0.01 <= std <= 0.25:
        raise UserError(f"--std {std:g}: expected a width from 0.01 to 0.25, such as 0.1")
    target = None if destination is None else local_path(destination, "--out")
    if is_url(run):
        raise UserError(
            f"{public_name(str(run))}: average needs a run folder, found a URL; copy the run to a local folder and "
            "pass that"
        )
    folder = Path(run)
    found = find_checkpoint(folder)
    if found == folder:
        raise UserError(f"{folder}: found a single checkpoint; pass the run folder, which has the snapshots")
    description = load_description(found)
    config = parse_config(description.config, source=f"{found}/state.json")
    if not config.ema.profiles:
        raise UserError(f"{folder}: the run keeps no power-function averages; train with ema.profiles=[0.05,0.1]")
    target = target or folder / FOLDER / f"std-{std:g}-{found.name}"
    if os.path.lexists(target):
        raise UserError(f"{target}: exists; remove it, or name another folder with --out")
    sources = _sources(folder, found, description.images, config.ema.profiles)
    times = len({profile.images for profile, _ in sources})
    fit = fit_profile([profile for profile, _ in sources], Profile(std, description.images))
    if fit.distance > _TOLERANCE:
        raise UserError(
            f"{folder}: --std {std:g}: the closest average of {counted(times, 'snapshot')} is {fit.distance:.0%} off; "
            f"take a width nearer to {' or '.join(f'{kept:g}' for kept in config.ema.profiles)}, or train with a "
            "smaller ema.snapshot_kimg"
        )
    averaged = load_sets(found, ["generator_ema"])["generator_ema"]
    made = _combine(sources, fit.weights, averaged)
    with writing(target, "the average"):
        sets = {"generator_ema": {name: Stored.of(tensor) for name, tensor in made.items()}}
        write_merged(target, sets, json.dumps(load_state(found)).encode(), description.step)
    return Average(target, times, fit.distance, float(np.abs(fit.weights).sum()))


def _sources(folder: Path, checkpoint: Path, images: int, stds: Sequence[float]) -> list[tuple[Profile, Path]]:
    """Return each profile of the snapshots before the checkpoint, with its file, and of the checkpoint itself."""
    if not images:
        raise UserError(f"{checkpoint}: the run has not trained yet; train it first")
    files = {time: path for time, path in snapshots(folder).items() if 0 < time < images and path.is_file()}
    files[images] = checkpoint
    if len(files) > _MOST_SNAPSHOTS:
        raise UserError(f"{folder}: found {len(files):,} snapshots, expected at most {_MOST_SNAPSHOTS:,}")
    return [(Profile(std, time), path) for time, path in files.items() for std in stds]


def _combine(
    sources: Sequence[tuple[Profile, Path]], weights: NDArray[np.float64], like: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the weighted sum of averages, in float64 until the end; tensors that are not averaged stay `like`."""
    sums: dict[str, Tensor] = {}
    names: set[str] | None = None
    # First those of the checkpoint, which were verified.
    for (profile, path), weight in reversed(list(zip(sources, weights.tolist(), strict=True))):
        with _opened(path) as saved:
            found = {key.partition("/")[2]: key for key in saved if key.startswith(f"{profile.std}/")}
            names = set(found) if names is None else names
            if not found or set(found) != names:
                raise UserError(f"{path}: not the averages of width {profile.std:g} that the others have; {_FIX}")
            for name, key in found.items():
                tensor = saved[key]()
                fits = name in like and (tensor.shape, tensor.dtype) == (like[name].shape, torch.float32)
                if not fits or not tensor.isfinite().all():
                    raise UserError(f"{path}: {key[:200]}: not a weight of this generator, or not finite; {_FIX}")
                total = sums.setdefault(name, torch.zeros(tensor.shape, dtype=torch.float64))
                total.add_(tensor.double(), alpha=weight)
    return like | {name: total.to(like[name].dtype) for name, total in sums.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Callable[[], Tensor]]]:
    """Context manager that opens a snapshot, or the averages of a checkpoint: name -> function that reads a tensor."""
    if path.is_dir():
        yield {name: stored.whole for name, stored in read_sets(path, ["profiles"])["profiles"].items()}
        return
    try:
        with safe_open(path, framework="pt") as file:
            yield {name: partial(file.get_tensor, name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable snapshot: {reason(error)}; {_FIX}") from None
