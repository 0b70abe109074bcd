"""Files of published weights: where they are, how they are read, and messages about them."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor, nn

from distgan.errors import UserError
from distgan.files import explained, is_disk_error, new_file, reason, writing
from distgan.hub_errors import hub_errors

log = logging.getLogger("distgan")

_MAX_BYTES = 4 << 30
_SILENCE_SECONDS = 30.0
"""Time without an answer after which a download fails."""


class Wording(NamedTuple):
    """Names of the settings in messages: keys of a config, or arguments of a call."""

    user: str
    """What needs the weights: a detector or a metric."""
    weights: str
    cache: str
    instead: str
    """What works without these weights."""


_NAME = "model.safetensors"
_UNREADABLE = (OSError, ValueError, SafetensorError)


class Weights(NamedTuple):
    """Tensors of a weights file, on the CPU, and its SHA-256."""

    tensors: dict[str, Tensor]
    sha256: str


def read_tensors(path: Path) -> Weights:
    """Read named tensors from a file of PyTorch's or .safetensors. Only tensors are unpickled.

    Raises:
        ValueError: the file cannot be read, is too large or holds more. The message is the cause.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"the file is larger than {_MAX_BYTES} bytes")
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            tensors = load(content)
        else:
            tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's message advises to unpickle it
        raise ValueError("the file is damaged, or holds Python objects, which are not unpickled") from None
    except (*_UNREADABLE, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(_cause(error)) from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("the file holds more than named tensors")
    return Weights(tensors, hashlib.sha256(content).hexdigest())


class PublishedFile(NamedTuple):
    """A file of weights that PyTorch wrote, at an address of its own."""

    address: str
    sha256: str
    """First digits of its SHA-256."""

    def path(self, given: str | None, cache: Path) -> Path:
        """Return the path of the file, which may not exist: as given, else in the cache folder, or torch.hub's copy."""
        if given:
            return Path(given).expanduser()
        name = self.address.rpartition("/")[2]
        others = Path(torch.hub.get_dir()) / "checkpoints" / name  # as torchvision and torch-fidelity download it
        return others if others.is_file() and not (cache / name).exists() else cache / name

    def read(self, given: str | None, cache: Path, wording: Wording) -> Weights:
        """Read the file, or its tensors as .safetensors, from a path, or from a cache, downloaded on first use.

        Only tensors are unpickled.

        Raises:
            UserError: the file cannot be downloaded or read, or holds more than tensors.
        """
        path = self.path(given, cache)
        if given is None and not path.exists():
            self._download(path, wording)
        try:
            found = read_tensors(path)
        except ValueError as error:
            raise UserError(
                f"{wording.weights} = {path}: cannot read PyTorch weights: {error}; set it to the path of a copy of "
                f"{self.address}"
            ) from None
        if path.suffix != ".safetensors" and not found.sha256.startswith(self.sha256):
            log.warning(
                "%s: not the published weights of %s: found SHA-256 %s..., expected %s...; compare values only between "
                "runs with this file",
                path, wording.user, found.sha256[:8], self.sha256,
            )  # fmt: skip
        return found

    def _download(self, path: Path, wording: Wording) -> None:
        log.info("%s: downloading the weights from %s to %s", wording.user, self.address, path)
        try:
            with writing(path, "the weights"):
                path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                self._fetch(partial)
        except (OSError, RuntimeError, HTTPException) as error:
            if isinstance(error, OSError) and is_disk_error(error):
                raise UserError(
                    f"{path}: cannot write the weights: {reason(explained(error, path))}; or set {wording.cache}"
                ) from None
            raise UserError(
                f"{wording.user}: cannot download {self.address}: {reason(error)}; download it on another machine "
                f"and set {wording.weights} to its path, or {wording.instead}"
            ) from None

    def _fetch(self, target: Path) -> None:
        """Download the file.

        Raises:
            OSError: the server cannot be reached, or was silent for `_SILENCE_SECONDS`.
            RuntimeError: the file has another SHA-256.
        """
        digest = hashlib.sha256()
        with urllib.request.urlopen(self.address, timeout=_SILENCE_SECONDS) as response, open(target, "wb") as file:
            while chunk := response.read(1 << 20):
                digest.update(chunk)
                file.write(chunk)
        if not digest.hexdigest().startswith(self.sha256):
            raise RuntimeError(f"found SHA-256 {digest.hexdigest()[:8]}..., expected {self.sha256}...")


class HubFile(NamedTuple):
    """The file `model.safetensors` of a repository of the Hugging Face Hub. Nothing is unpickled."""

    repository: str
    prefixes: tuple[str, ...] = ("",)
    """Beginnings of the names of the tensors that are used."""

    @property
    def address(self) -> str:
        """Where it is, for messages."""
        return f"hf://{self.repository}"

    def path(self, given: str | None, cache: Path) -> Path | None:
        """Return the path of the file: as given, which may not exist, a file or its folder; else in the Hub's cache.

        Return None if it is not there. The cache folder is not used.
        """
        if given is not None:
            return Path(given) / _NAME if Path(given).is_dir() else Path(given)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, _NAME)
        return Path(found) if isinstance(found, str) else None

    def read(self, given: str | None, cache: Path, wording: Wording) -> Weights:
        """Read the file from a path, or from the cache of huggingface_hub, downloaded on first use.

        Raises:
            UserError: the file cannot be downloaded or read.
        """
        copy = f"hf download {self.repository} {_NAME}"
        path = self.path(given, cache)
        if path is None or given is None:
            from huggingface_hub import hf_hub_download

            instead = f"run `{copy}` on another machine and set {wording.weights} to the path of the file"
            with hub_errors(f"{wording.user}: cannot download {self.address}", instead):
                path = Path(hf_hub_download(self.repository, _NAME))
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"the file is larger than {_MAX_BYTES} bytes")
            with open(path, "rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            tensors = load_file(path)
        except _UNREADABLE as error:
            raise UserError(
                f"{wording.weights} = {path}: cannot read safetensors: {_cause(error)}; set it to the path of the file "
                f"that `{copy}` prints"
            ) from None
        return Weights({name: tensors[name] for name in tensors if name.startswith(self.prefixes)}, sha256)


VGG16 = PublishedFile("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
"""torchvision's VGG-16, trained on ImageNet: of the detector `vgg16`, and of LPIPS, which was calibrated with it."""


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Set all parameters and buffers of a network, as float32.

    Raises:
        UserError: the weights are those of another network.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            shapes = [f"shape {shapes[name]}" if name in shapes else "none" for shapes in (found, wanted)]
            raise UserError(f"not the weights of {what}: {name}: found {shapes[0]}, expected {shapes[1]}")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def _cause(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]
