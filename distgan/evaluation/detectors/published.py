"""Detectors with published weights, by name: `inception`, `dinov2`, `clip` and `vgg16`."""

from __future__ import annotations

from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.detectors.weights import HubFile, PublishedFile, Weights, Wording, in_call, in_config
from distgan.files import locked
from distgan.packages import missing_package

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

PACKAGES = {"inception": "torch-fidelity", "dinov2": "transformers", "clip": "transformers", "vgg16": "torch-fidelity"}
"""Package that each name needs."""


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
    """Do the same in one process, without a Runtime. Processes of one node that start together download once."""
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
        raise missing_package(wording.detector, PACKAGES[name], wording.instead) from None


def _detector(name: str, module: Implementation, weights: Weights, path: str | None) -> Detector:
    try:
        with torch.random.fork_rng(devices=[]):  # initial weights must not advance the generator of the training
            network = module.build(weights.tensors)
    except UserError as error:
        raise UserError(f"{path or 'the downloaded weights'}: {error}") from None
    made = cast(_Network, network)
    return Detector(name, made.dimension, made.num_logits, weights.sha256, network)
