"""Inception-v3 of 2015, the network behind published FIDs, from torch-fidelity's port of the TensorFlow graph.

Szegedy, Vanhoucke, Ioffe, Shlens, Wojna, "Rethinking the Inception Architecture for Computer Vision", CVPR 2016.
torch-fidelity also ports the graph's resizing to 299 pixels, so values match torch-fidelity's FID.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import urllib.request
from contextlib import ExitStack
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from distgan.errors import UserError
from distgan.files import explained, is_disk_error, locked, new_file, reason, writing

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

log = logging.getLogger("distgan")

DIMENSION = 2048
NUM_LOGITS = 1008
URL: str = URL_INCEPTION_V3
_PUBLISHED_SHA256 = "6726825d"
_MAX_BYTES = 1 << 30
_SILENCE_SECONDS = 30.0
"""Time without an answer after which a download fails."""


class Wording(NamedTuple):
    """Names of the settings in messages: keys of a config, or arguments of a call."""

    detector: str
    weights: str
    cache: str
    instead: str
    """What works without these weights."""


IN_CONFIG = Wording(
    "detector inception", "weights in {detector: inception, weights: PATH}", "evaluation.cache_dir",
    "set evaluation.detector=classifier",
)  # fmt: skip
IN_CALL = Wording('load_detector("inception")', "weights", "cache_dir", "pass a network of yours")


class Inception(nn.Module):
    """uint8 images (n, 1 or 3, H, W) -> features (n, 2048) and logits without bias (n, 1008), float32."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        """Load the weights. Raises RuntimeError if they belong to another network."""
        super().__init__()
        # The extractor unpickles its file without limits, so it only gets a file that was written here from tensors.
        # It also draws initial weights, which must not advance the random generator of the training.
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        with torch.random.fork_rng(devices=[]):
            self.extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], safe)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif images.shape[1] != 3:
            raise UserError(f"images: found {images.shape[1]} channels, expected 1 or 3; convert the images to RGB")
        features, logits = self.extractor(images)
        return features, logits


def load_inception(path: str | None, cache: Path, runtime: Runtime) -> tuple[Inception, str]:
    """Return the network, with rank 0's weights, and the SHA-256 of the weights file.

    Collective: call on every rank.

    Args:
        path: weights file; None uses the file in `cache`, downloaded on first use.

    Raises:
        UserError: the weights cannot be downloaded or read, hold more than tensors, or belong to another network.
    """
    loaded = None
    with runtime.raise_on_all_ranks():
        if runtime.is_main:
            loaded = _read_weights(Path(path) if path else _download(cache, IN_CONFIG), IN_CONFIG)
    weights, sha256 = runtime.broadcast_object(loaded)
    with runtime.raise_on_all_ranks():
        return _build(weights, path, IN_CONFIG), sha256


def read_inception(path: str | None, cache: Path) -> tuple[Inception, str]:
    """Do the same as `load_inception` in one process, without a Runtime.

    Processes of one node that start together download once.
    """
    if path is None:
        file = weights_file(None, cache)
        with ExitStack() as lock:
            if not file.exists():
                try:
                    cache.mkdir(parents=True, exist_ok=True)
                    lock.enter_context(locked(file.with_suffix(".lock"), wait=True))
                except OSError:  # a folder without locks, or one that the download explains
                    pass
            file = _download(cache, IN_CALL)
    else:
        file = Path(path)
    weights, sha256 = _read_weights(file, IN_CALL)
    return _build(weights, path, IN_CALL), sha256


def _build(weights: dict[str, Tensor], path: str | None, wording: Wording) -> Inception:
    try:
        return Inception(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path}: not the weights of torch-fidelity's Inception-v3: {reason}; "
            f"download {URL}, or remove {wording.weights}"
        ) from None


def weights_file(path: str | None, cache: Path) -> Path:
    """Return the path of the weights file that `load_inception` reads or downloads for the same arguments."""
    return Path(path) if path else cache / URL.rpartition("/")[2]


def _read_weights(path: Path, wording: Wording) -> tuple[dict[str, Tensor], str]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"the file is larger than {_MAX_BYTES} bytes")
        content = path.read_bytes()
        weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("the file holds more than named tensors")
    except (OSError, ValueError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(
            f"{wording.weights} = {path}: cannot read PyTorch weights: {reason}; set it to the path of a copy of {URL}"
        ) from None
    sha256 = hashlib.sha256(content).hexdigest()
    if not sha256.startswith(_PUBLISHED_SHA256):
        log.warning(
            "%s: not the published Inception weights: found SHA-256 %s..., expected %s...; compare FIDs only between "
            "runs with this file",
            path,
            sha256[:8],
            _PUBLISHED_SHA256,
        )
    return weights, sha256


def _download(cache: Path, wording: Wording) -> Path:
    """Return the published weights file in the cache folder; download and check it on first use."""
    path = weights_file(None, cache)
    if path.exists():
        return path
    log.info("%s: downloading the weights from %s to %s", wording.detector, URL, path)
    try:
        with writing(path, "the weights"):
            cache.mkdir(parents=True, exist_ok=True)
        with new_file(path) as partial:
            _fetch(URL, partial)
    except (OSError, RuntimeError, HTTPException) as error:
        if isinstance(error, OSError) and is_disk_error(error):
            raise UserError(
                f"{path}: cannot write the weights: {reason(explained(error, path))}; or set {wording.cache}"
            ) from None
        raise UserError(
            f"{wording.detector}: cannot download {URL}: {reason(error)}; download it on another machine and "
            f"set {wording.weights} to its path, or {wording.instead}"
        ) from None
    return path


def _fetch(url: str, target: Path) -> None:
    """Download the published weights.

    Raises:
        OSError: the server cannot be reached, or was silent for `_SILENCE_SECONDS`.
        RuntimeError: the file has another SHA-256.
    """
    digest = hashlib.sha256()
    with urllib.request.urlopen(url, timeout=_SILENCE_SECONDS) as response, open(target, "wb") as file:
        while chunk := response.read(1 << 20):
            digest.update(chunk)
            file.write(chunk)
    if not digest.hexdigest().startswith(_PUBLISHED_SHA256):
        raise RuntimeError(f"found SHA-256 {digest.hexdigest()[:8]}..., expected {_PUBLISHED_SHA256}...")
