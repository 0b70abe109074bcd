"""What state.json of a checkpoint says, checked: it may come from a stranger."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from distgan.checkpoint import reading
from distgan.checkpoint.directory import Best
from distgan.config.error_messages import explain
from distgan.data.kinds import text
from distgan.errors import UserError
from distgan.monitoring.diagnosis import Diagnosis, Finite

Count = Annotated[int, Field(ge=0, lt=2**62)]


def _check_vocabulary(vocabulary: list[str]) -> list[str]:
    if problem := text.find_problem(vocabulary):
        raise ValueError(problem)
    return vocabulary


Vocabulary = Annotated[list[str], AfterValidator(_check_vocabulary)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(_Record):
    """The data that was trained on."""

    fingerprint: Annotated[str, Field(max_length=200)]
    samples: Count


class Classes(_Record):
    """The classes of a conditional run."""

    names: list[str] | None
    counts: Annotated[list[Count], Field(min_length=1)]


Acceptable = Literal["data", "seed", "batch", "statistics"]
"""Changes that `--accept` lets a resumed run make: each changes what the continued run means."""
ACCEPTABLE: tuple[Acceptable, ...] = get_args(Acceptable)


class Description(_Record):
    """All of a checkpoint that is not a tensor."""

    step: Count
    position: Count
    """Stream position, and the number of real images seen."""
    images: Count
    best: Best | None
    accepted: list[Acceptable] = []
    """What `--accept` has allowed resumes so far; with `batch`, the position is no function of the step."""
    substitutions: list[Any]
    data: Data
    classes: Classes | None
    vocabulary: Vocabulary | None = None
    """The characters of text, by their numbers."""
    world_size: Annotated[int, Field(ge=1)]
    statistics: dict[str, dict[str, tuple[Finite, Finite]]]
    """Per player: totals and counts of the logging interval under way, so that its row is the same after a resume."""
    diagnosis: Diagnosis = Diagnosis()
    config: dict[str, Any]
    versions: dict[str, str]


def load_description(path: Path) -> Description:
    """The description of a checkpoint. Raises UserError naming the file and key that is wrong."""
    try:
        return Description.model_validate(reading.load_state(path))
    except ValidationError as error:
        raise UserError(f"{path / 'state.json'}: {explain(error, Description)}; take another checkpoint") from None
