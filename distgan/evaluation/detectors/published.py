"""Detectors with published weights, by their names in `PUBLISHED_DETECTORS`."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from distgan.config.evaluation.detectors import PUBLISHED_DETECTORS
from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector
from distgan.files import locked
from distgan.packages import missing_package
from distgan.published_weights import HubFile, PublishedFile, Weights, Wording

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime


def in_config(name: str) -> Wording:
    """Return the names for a detector of a config."""
    weights = f"weights in {{detector: {name}, weights: PATH}}"
    return Wording(f"detector {name}", weights, "evaluation.cache_dir", "set evaluation.detector=classifier")


def in_call(name: str) -> Wording:
    """Return the names for `load_detector(NAME)`."""
    return Wording(f'load_detector("{name}")', "weights", "cache_dir", "pass a network of yours")


class _Network(Protocol):
    dimension: int
    num_logits: int


class Implementation(Protocol):
    """The module of a name in this folder."""

    PUBLISHED: PublishedFile | HubFile

    def build(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return the network. Raises UserError if the weights are those of another one."""


def load_published(name: str, weights: str | None, cache: Path, runtime: Runtime) -> Detector:
    """Load a detector with rank 0's weights. Collective: call on every rank.

    Args:
        weights: path of the weights; None uses a cache, downloaded on first use.
        cache: the cache folder of evaluations.

    Raises:
        UserError: a package is missing, or the weights cannot be downloaded or read, or belong to another network.
    """
    wording = in_config(name)
    with runtime.raise_on_all_ranks():
        module = implementation(name, wording)
    read = runtime.run_on_main(lambda _: module.PUBLISHED.read(weights, cache, wording))
    with runtime.raise_on_all_ranks():
        return _detector(name, module, read, weights)


def read_published(name: str, weights: str | None, cache: Path) -> Detector:
    """Load a detector in one process, without a Runtime. Processes of one node that start together download once."""
    wording = in_call(name)
    module = implementation(name, wording)
    with ExitStack() as lock:
        if weights is None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                lock.enter_context(locked(cache / f"{name}.lock", wait=True))
            except OSError:  # a folder without locks, or one that the download explains
                pass
        read = module.PUBLISHED.read(weights, cache, wording)
    return _detector(name, module, read, weights)


def implementation(name: str, wording: Wording) -> Implementation:
    """Return the module of a name. Raises UserError if a package is missing."""
    try:
        return cast(Implementation, import_module(f"distgan.evaluation.detectors.{name}"))
    except ImportError:
        raise missing_package(wording.user, PUBLISHED_DETECTORS[name], wording.instead) from None


def _detector(name: str, module: Implementation, weights: Weights, path: str | None) -> Detector:
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights must not advance the generator of the training
            network = module.build(weights.tensors)
    except UserError as error:
        raise UserError(f"{path or 'the downloaded weights'}: {error}") from None
    made = cast(_Network, network)
    return Detector(name, made.dimension, made.num_logits, weights.sha256, network)
