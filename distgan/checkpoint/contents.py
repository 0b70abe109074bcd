"""Content of a checkpoint's state.json, validated because its source is untrusted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from distgan.checkpoint.directory import USE_OLDER, Best
from distgan.checkpoint.loading import load_state
from distgan.config.error_messages import explain
from distgan.data.kinds import text
from distgan.data.kinds.latents import LatentSpace
from distgan.errors import UserError
from distgan.monitoring.diagnosis import Diagnosis, Finite
from distgan.monitoring.divergence import Divergence

Count = Annotated[int, Field(ge=0, lt=2**62)]


def _check_vocabulary(vocabulary: list[str]) -> list[str]:
    if problem := text.find_problem(vocabulary):
        raise ValueError(problem)
    return vocabulary


Vocabulary = Annotated[list[str], AfterValidator(_check_vocabulary)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Record):
    """Training data of the checkpoint."""

    fingerprint: Annotated[str, Field(max_length=200)]
    samples: Count


class Classes(_Record):
    """Classes of a conditional run."""

    names: list[str] | None
    counts: Annotated[list[Count], Field(min_length=1)]


Acceptable = Literal["data", "seed", "batch", "statistics", "code"]
"""Differences from the checkpoint that `--accept` allows. Each makes the resumed run another experiment."""
ACCEPTABLE: tuple[Acceptable, ...] = get_args(Acceptable)


class Description(_Record):
    """All content of a checkpoint except its tensors."""

    step: Count
    position: Count
    """Stream position."""
    images: Count
    """Number of real images that discriminator updates used."""
    best: Best | None
    accepted: list[Acceptable] = []
    """Differences that `--accept` has allowed so far. With `batch`, the step does not determine the position."""
    substitutions: list[Any]
    data: Data
    classes: Classes | None
    vocabulary: Vocabulary | None = None
    """Characters of text, by index; None for other data."""
    latent_space: LatentSpace | None = None
    """Shape, shift and scale of latents; None for other data."""
    decoder: Annotated[str, Field(max_length=200)] | None = None
    """Hash of the decoder of latents; None without one."""
    teacher: Annotated[str, Field(max_length=200)] | None = None
    """Hash of the network of `objective.alignment`; None without one."""
    world_size: Annotated[int, Field(ge=1)]
    accumulation: Annotated[int, Field(ge=1)] | None = None
    """Number of micro-batches per update; None in checkpoints of earlier versions."""
    statistics: dict[str, dict[str, tuple[Finite, Finite]]]
    """Per player: totals and counts of the open logging interval, so that a resume logs the same row."""
    diagnosis: Diagnosis = Diagnosis()
    divergence: Divergence = Divergence()
    rollbacks: Annotated[list[Count], Field(max_length=1000)] = []
    """Steps that the run went back to after a divergence, in order."""
    config: dict[str, Any]
    versions: dict[str, str]
    code: dict[str, str] = {}
    """Package of the user's code -> SHA-256 of its sources."""


def load_description(path: Path) -> Description:
    """Return the description of a checkpoint. Raises UserError naming the file and the wrong key."""
    try:
        return Description.model_validate(load_state(path))
    except ValidationError as error:
        raise UserError(f"{path / 'state.json'}: {explain(error, Description)[1]}; {USE_OLDER}") from None
