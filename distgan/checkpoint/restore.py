"""Finding a checkpoint from the path a user gives, and loading one network of it. Needs no processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from distgan.checkpoint import directory, reading
from distgan.checkpoint.directory import directory_name
from distgan.errors import UserError, printable


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The verified checkpoint that a path means: itself, or the newest (or best) of a run folder.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / "manifest.json").exists():
        if best:
            raise UserError(f"{path}: one checkpoint, of which none is the best; name the run, or leave --best out")
        directory.verify(path)
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        found = "neither a run folder (it would hold checkpoints/) nor a checkpoint"
        named = "its run_dir" if path.suffix in (".yaml", ".yml") else "the folder of a run, or a checkpoint in it"
        raise UserError(f"{path}: {found if path.exists() else 'does not exist'}; give {named}")
    if best:
        record = directory.read_best(folder)
        if record is None:
            raise UserError(
                f"{path}: no best checkpoint is noted; set evaluation.every in training, or leave --best out"
            )
        chosen = folder / directory_name(record.step)
        directory.verify(chosen)
        return chosen
    newest = directory.newest_valid(folder)
    if newest is None:
        raise UserError(f"{folder}: holds no valid checkpoint")
    return newest


def read_network(path: Path, name: str, network: nn.Module, *, num_classes: int) -> dict[str, Tensor]:
    """The tensors for a network in one file of a checkpoint. Raises UserError naming the one that does not fit."""
    tensors = reading.load_files(path, [name])[name]
    if problem := find_misfit(tensors, network.state_dict()):
        raise UserError(
            f"{path}/{name}.safetensors: {problem}; resume with the config the run was started with (config.yaml in "
            "its folder), or choose another run_dir"
        )
    if broken := find_non_finite(tensors, num_classes):
        raise UserError(f"{path}/{name}.safetensors: {broken}; take another checkpoint")
    return tensors


def find_misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor that a network lacks, has not, or has of another type or shape, if there is one."""
    for key in [*expected, *found]:
        there = f"{found[key].dtype} {tuple(found[key].shape)}" if key in found else "missing"
        here = f"{expected[key].dtype} {tuple(expected[key].shape)}" if key in expected else "absent"
        if there != here:
            return f"{printable(key)[:200]} is {there} there, but {here} in the network of this config"
    return None


def find_non_finite(tensors: Mapping[str, Tensor], num_classes: int) -> str | None:
    """The first tensor of a network with values that no training leaves, if there is one."""
    faults = ((key, _fault(key, tensor, num_classes)) for key, tensor in tensors.items())
    return next((f"{printable(key)[:200]} holds {fault}" for key, fault in faults if fault), None)


def _fault(key: str, tensor: Tensor, num_classes: int) -> str | None:
    if tensor.is_floating_point() and not tensor.isfinite().all():
        return "numbers that are not finite"
    owner, _, name = key.rpartition(".")
    if name == "running_var" and (tensor < 0).any():
        return f"a negative variance, {tensor.min().item():.4g}"
    if name == "reference_labels" and not 0 <= tensor.min() <= tensor.max() < num_classes:
        return f"labels from {tensor.min()} to {tensor.max()}, expected 0 to {num_classes - 1}"
    # Of spectral norm, which divides by u^T W v. Half precision rounds them.
    if ".parametrizations." in f".{owner}" and name in ("u", "v"):
        length = tensor.double().norm().item()
        return f"a vector of length {length:.4g}, expected 1" if abs(length - 1) > 0.02 else None
    return None


def check_numbers(path: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise UserError for values that no optimizer or average has: NaN, and negative steps or second moments.

    Infinite moments are possible.
    """
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            negative = key.endswith(_NEVER_NEGATIVE) and (tensor < 0).any()
            if negative or tensor.isnan().any():
                fault = "negative numbers" if negative else "NaN"
                raise UserError(
                    f"{path}/{name}.safetensors: {printable(key)[:200]} holds {fault}; take another checkpoint"
                )


_NEVER_NEGATIVE = "/step", "/exp_avg_sq", "/square_avg"
