"""Finding a checkpoint from the path a user gives, and loading one network of it. Needs no processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from distgan.data.index_table import plain
from distgan.errors import UserError
from distgan.training import checkpoint
from distgan.training.checkpoint_folder import directory_name


def find_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The verified checkpoint that a path means: itself, or the newest (or best) of a run folder.

    Raises:
        UserError: there is none, or the one named is damaged.
    """
    if (path / "manifest.json").exists():
        if best:
            raise UserError(f"{path}: one checkpoint, of which none is the best; name the run, or leave --best out")
        checkpoint.verify(path)
        return path
    folder = path / "checkpoints"
    if not folder.is_dir():
        what = (
            "neither a run folder (it would hold checkpoints/) nor a checkpoint" if path.exists() else "does not exist"
        )
        fix = (
            "; give its run_dir"
            if path.suffix in (".yaml", ".yml")
            else "; give the folder of a run or a checkpoint in it"
        )
        raise UserError(f"{path}: {what}{fix}")
    if best:
        record = checkpoint.read_best(folder)
        if record is None:
            raise UserError(
                f"{path}: no best checkpoint is noted; set evaluation.every in training, or leave --best out"
            )
        chosen = folder / directory_name(record.step)
        checkpoint.verify(chosen)
        return chosen
    newest = checkpoint.newest_valid(folder)
    if newest is None:
        raise UserError(f"{folder}: holds no valid checkpoint")
    return newest


def read_network(path: Path, name: str, network: nn.Module) -> dict[str, Tensor]:
    """The tensors for a network in one file of a checkpoint. Raises UserError naming the one that does not fit."""
    tensors = checkpoint.load_files(path, [name])[name]
    if problem := find_misfit(tensors, network.state_dict()):
        raise UserError(
            f"{path}/{name}.safetensors: {problem}; resume with the config the run was started with (config.yaml in "
            "its folder), or choose another run_dir"
        )
    if broken := find_broken(tensors):
        raise UserError(f"{path}/{name}.safetensors: {broken}; take another checkpoint")
    return tensors


def find_misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """The first tensor that a network lacks, has not, or has of another type or shape, if there is one."""
    for key in [*expected, *found]:
        there = f"{found[key].dtype} {tuple(found[key].shape)}" if key in found else "missing"
        here = f"{expected[key].dtype} {tuple(expected[key].shape)}" if key in expected else "absent"
        if there != here:
            return f"{plain(key)[:200]} is {there} there, but {here} in the network of this config"
    return None


def find_broken(tensors: Mapping[str, Tensor]) -> str | None:
    """The first tensor with numbers that are not finite, if there is one; no training leaves any."""
    broken = (key for key, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all())
    return next((f"{plain(key)[:200]} holds numbers that are not finite" for key in broken), None)


def check_numbers(path: Path, files: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Raise UserError if there is NaN among an optimizer's or an average's tensors; infinite moments are possible."""
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            if tensor.isnan().any():
                raise UserError(f"{path}/{name}.safetensors: {plain(key)[:200]} holds NaN; take another checkpoint")
