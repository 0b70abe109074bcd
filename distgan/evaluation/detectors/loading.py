"""Detectors for any program: no config, no index of the data, no process group."""

from __future__ import annotations

import copy
import hashlib
import os
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from distgan.config.evaluation.detectors import PUBLISHED_DETECTORS
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.detectors.classifier import DIMENSION, read_classifier
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.detectors.published import read_published
from distgan.evaluation.precision import plain_float32
from distgan.files import cache_folder, reason


def load_detector(
    source: str | os.PathLike[str] | nn.Module,
    *,
    weights: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_shape: tuple[int, int, int] = (3, 64, 64),
) -> Detector:
    """Load a detector for the metrics of images. Nothing is communicated: call it on every rank.

    Args:
        source: one of

            - for images (n, 1 or 3, H, W): `"inception"`, the Inception-v3 of published FIDs (Szegedy et al., CVPR
              2016; weights of 2015), `"dinov2"`, `"clip"` or `"vgg16"`;
            - the path of a classifier that an evaluation cached, `classifier-*.safetensors`, for images of the shape
              that it was trained on. Nothing in it is unpickled;
            - a network of yours, from uint8 images (n, C, R, R) to features (n, d), d >= 2, or to features and logits
              (n, k). `InceptionScore` needs the logits. The detector is a frozen copy in eval mode.
        weights: path of the weights of a name; by default they are in a cache, downloaded on first use.
        cache_dir: the cache folder; by default `$DISTGAN_CACHE`, or `~/.cache/distgan`.
        image_shape: (C, R, R) of your network's images. The network is called once on two black images of this shape
            to learn d and k, so it only matters to networks that take one shape.

    Returns:
        Detector with the attributes `name`, `dimension`, `num_logits` and `hash`. The hash identifies weights and
        preprocessing: the SHA-256 of the file of a name, of the classifier's weights, or of your network's class name,
        parameters and buffers.

    Raises:
        UserError: the source is none of the three; a file is missing, damaged or holds something else; weights cannot
            be downloaded; a package is not installed; your network fails or returns something else.
    """
    if isinstance(source, nn.Module):
        detector = _own(source, image_shape)
    elif isinstance(source, str) and source in PUBLISHED_DETECTORS:
        folder = cache_folder(os.fspath(cache_dir) if cache_dir is not None else None) / "evaluation"
        return read_published(source, os.fspath(weights) if weights is not None else None, folder)
    elif isinstance(source, str | os.PathLike):
        detector = _cached(Path(source))
    else:
        raise UserError(
            f"load_detector: found {type(source).__name__}, expected one of {', '.join(PUBLISHED_DETECTORS)}, the path "
            "of a cached classifier or a torch.nn.Module"
        )
    if weights is not None:
        raise UserError(f"weights: only for {', '.join(PUBLISHED_DETECTORS)}; remove it")
    return detector


def _cached(path: Path) -> Detector:
    if not path.exists():
        raise UserError(
            f"load_detector: {path}: no such file; expected one of {', '.join(PUBLISHED_DETECTORS)}, the path of a "
            "cached classifier, such as ~/.cache/distgan/evaluation/classifier-*.safetensors, or a torch.nn.Module"
        )
    found = read_classifier(path)
    return Detector("classifier", DIMENSION, found.num_classes, found.hash, found.network, found.image_shape)


def _own(module: nn.Module, image_shape: tuple[int, int, int]) -> Detector:
    name = type(module).__name__
    try:
        network = _Network(name, copy.deepcopy(module)).eval()
    except Exception as error:
        raise UserError(
            f"load_detector: {name} cannot be copied: {reason(error)[:200]}; pass the module without wrappers, such as "
            "ddp.module"
        ) from error
    place = next(chain(network.parameters(), network.buffers()), torch.empty(0))
    images = torch.zeros(2, *image_shape, dtype=torch.uint8, device=place.device)
    try:
        with torch.no_grad(), plain_float32(place.device):
            features, logits = network(images)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"load_detector: {name} fails on uint8 images of shape {tuple(images.shape)}: {reason(error)[:200]}; "
            "pass the (C, R, R) of its images as image_shape, and convert uint8 inside its forward method"
        ) from error
    if features.shape[1] < 2:
        raise UserError(f"load_detector: {name}: found {features.shape[1]} features per image, expected at least 2")
    return Detector(name, features.shape[1], logits.shape[1], _hash(network.module), network)


class _Network(nn.Module):
    """A user's network, with what it returns checked and in float32."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name, self.module = name, module

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute features (n, d) and logits (n, k), k = 0 without logits, of images (n, C, R, R), uint8."""
        output = self.module(images)
        found = tuple(output) if isinstance(output, tuple | list) else (output,)
        shaped = [
            isinstance(part, Tensor) and part.ndim == 2 and len(part) == len(images) and part.is_floating_point()
            for part in found
        ]
        if len(found) > 2 or not all(shaped):
            kinds = ", ".join(
                f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
                for part in found
            )
            n = len(images)
            raise UserError(
                f"detector {self.name}: found output ({kinds}) for {n} images, expected features ({n}, d) or features "
                f"and logits ({n}, k), floating point; return features.flatten(1)"
            )
        features = found[0].float()
        return features, found[1].float() if len(found) == 2 else features.new_empty(len(images), 0)


def _hash(module: nn.Module) -> str:
    """SHA-256 of a module's class name, parameters and buffers, those that are not in its state dict included."""
    tensors = {name: tensor.detach().cpu() for name, tensor in chain(module.named_parameters(), module.named_buffers())}
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    return hashlib.sha256(f"{name}\n{statistics_cache.digest(tensors)}".encode()).hexdigest()
