"""Find a checkpoint from a user's path and load from it. No process group is needed.

Nothing is ever unpickled: tensors are in safetensors files, all else is JSON.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn

from distgan.checkpoint import directory
from distgan.checkpoint.directory import JSON_LIMIT, USE_OLDER, directory_name
from distgan.checkpoint.downloads import download, is_url
from distgan.checkpoint.layout import read_sets
from distgan.distributed.parts import Stored
from distgan.errors import UserError, printable
from distgan.files import read_bounded, reason

AnyTensor = TypeVar("AnyTensor", Tensor, Stored)


def find_checkpoint(source: str | os.PathLike[str], *, best: bool = False) -> Path:
    """Return the verified checkpoint of a path: the path itself, or the newest (or best) of a run folder.

    Of a URL of a run or checkpoint in an object store, it is the local copy.

    Raises:
        UserError: there is no checkpoint, or the given one is damaged.
    """
    if is_url(source):
        return download(os.fspath(source), best=best)
    path = Path(source)
    if (path / "manifest.json").exists():
        if best:
            raise UserError(
                f"{path}: --best needs a run folder, found a single checkpoint; pass the run folder or remove --best"
            )
        directory.verify(path)
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        found = "neither a run folder (no checkpoints/ in it) nor a checkpoint (no manifest.json in it)"
        is_config = path.suffix in (".yaml", ".yml")
        named = "the run_dir of that config" if is_config else "a run folder or RUN/checkpoints/step-N"
        raise UserError(f"{path}: {found if path.exists() else 'does not exist'}; pass {named}")
    if best:
        record = directory.read_best(folder)
        if record is None:
            raise UserError(
                f"{path}: --best: no checkpoint is marked as the best; train with evaluation.every, or remove --best"
            )
        chosen = folder / directory_name(record.step)
        directory.verify(chosen)
        return chosen
    newest = directory.newest_valid(folder)
    if newest is None:
        raise UserError(f"{folder}: no valid checkpoint; train the run until its first checkpoint")
    return newest


def load_sets(path: Path, names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Load the whole tensors of some sets of a checkpoint, such as `generator_ema`. Call `verify` first.

    Raises:
        UserError: a set is missing or unreadable; the message names the file.
    """
    return {
        name: {key: stored.whole() for key, stored in tensors.items()}
        for name, tensors in read_sets(path, names).items()
    }


def load_state(path: Path) -> dict[str, Any]:
    """Return the JSON state of a checkpoint. Raises UserError naming the file if it is missing or damaged."""
    file = path / "state.json"
    content = read_bounded(file, JSON_LIMIT)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {reason(error)}; {USE_OLDER}") from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: found {type(state).__name__}, expected a JSON object; {USE_OLDER}")
    return state


class Share(NamedTuple):
    """The tensors that one of `world_size` ranks checks for all: every `world_size`-th."""

    rank: int
    world_size: int

    def of(self, tensors: Mapping[str, AnyTensor]) -> dict[str, AnyTensor]:
        """Return the share of some tensors."""
        chosen = itertools.islice(tensors.items(), self.rank, None, self.world_size)
        return dict(chosen)


ALL = Share(0, 1)


def read_network(
    path: Path, name: str, network: nn.Module, *, num_classes: int, share: Share = ALL
) -> dict[str, Stored]:
    """Return the tensors of a network from one set of a checkpoint. Raises UserError naming a wrong tensor.

    Args:
        share: the tensors whose numbers this rank checks.
    """
    tensors = read_sets(path, [name])[name]
    if problem := find_misfit(tensors, network.state_dict()):
        raise UserError(f"{path}: {name}: {problem}; resume with config.yaml of the run folder, or set another run_dir")
    if broken := find_non_finite(share.of(tensors), num_classes):
        raise UserError(f"{path}: {name}: {broken}; {USE_OLDER}")
    return tensors


def find_misfit(found: Mapping[str, Tensor | Stored], expected: Mapping[str, Tensor]) -> str | None:
    """Describe the first tensor that is missing, unknown, or of another dtype or shape; None if all fit."""
    for key in [*expected, *found]:
        there = f"{found[key].dtype} {tuple(found[key].shape)}" if key in found else "missing"
        here = f"{expected[key].dtype} {tuple(expected[key].shape)}" if key in expected else "absent"
        if there != here:
            return f"{printable(key)[:200]}: found {there}, expected {here} from the network of this config"
    return None


def find_non_finite(tensors: Mapping[str, Tensor | Stored], num_classes: int) -> str | None:
    """Describe the first tensor with values that training cannot produce; None if there is none."""
    for key, tensor in tensors.items():
        # One whole tensor at a time, so that the memory for all of them is not needed.
        if fault := _fault(key, tensor.whole() if isinstance(tensor, Stored) else tensor, num_classes):
            return f"{printable(key)[:200]} holds {fault}"
    return None


def _fault(key: str, tensor: Tensor, num_classes: int) -> str | None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return "numbers that are not finite"
    owner, _, name = key.rpartition(".")
    if name == "running_var" and (tensor < 0).any():
        return f"a negative variance, {tensor.min().item():.4g}"
    if name == "reference_labels" and not 0 <= tensor.min() <= tensor.max() < num_classes:
        return f"labels from {tensor.min()} to {tensor.max()}, expected 0 to {num_classes - 1}"
    # Vectors of spectral norm, which divides by u^T W v. The tolerance allows for half precision.
    if ".parametrizations." in f".{owner}" and name in ("u", "v"):
        length = tensor.double().norm().item()
        return f"a vector of length {length:.4g}, expected 1" if abs(length - 1) > 0.02 else None
    return None


def check_numbers(path: Path, sets: Mapping[str, Mapping[str, Stored]], share: Share = ALL) -> None:
    """Raise UserError for NaN, and for negative steps or second moments.

    Infinite moments are valid: an optimizer can produce them.
    """
    for name, tensors in sets.items():
        for key, stored in share.of(tensors).items():
            tensor = stored.whole()
            negative = key.endswith(_NEVER_NEGATIVE) and (tensor < 0).any()
            if negative or tensor.isnan().any():
                fault = "negative numbers" if negative else "NaN"
                raise UserError(f"{path}: {name}: {printable(key)[:200]} holds {fault}; {USE_OLDER}")


_NEVER_NEGATIVE = "/step", "/exp_avg_sq", "/square_avg"
