"""Base of metrics that keep the features of all generated samples and compute on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.moments import Gaussian, add_to_gram, empty_gram, gaussian_of_gram
from distgan.evaluation.states import joined

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

_BATCH = 1024


class FeatureRows(Metric):
    """Metric whose state is the features of all generated samples: 4 d bytes each, on every rank while it computes."""

    is_differentiable = False
    full_state_update = False
    computes_on_all_ranks = True
    features: list[Tensor] | Tensor
    numbers: list[Tensor] | Tensor

    def __init__(self, runtime: Runtime, name: str = "features", **settings: Any) -> None:
        """Prepare the states.

        Args:
            name: name of the value in messages, such as `mifid[inception]`.
            settings: keyword arguments of `torchmetrics.Metric`.
        """
        super().__init__(**settings)
        self.runtime, self.name = runtime, name
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("numbers", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor) -> None:
        """Add features, shape (n, d), and the samples' numbers, int64, shape (n,)."""
        assert isinstance(self.features, list)
        assert isinstance(self.numbers, list)
        self.features.append(features.detach())
        self.numbers.append(numbers.to(features.device))

    def rows(self) -> Tensor:
        """Return the features in order of the numbers, so that nothing depends on which rank held them.

        Raises UserError, on every rank, if some are not finite.
        """
        # On the metric's device also on a rank that had no samples, whose list was empty.
        rows = joined(self.features)[joined(self.numbers).long().argsort()].to(self.device)
        # Before the ranks share the work: an error on some of them would leave the others waiting in a collective.
        check_finite(rows, self.name, "generated")
        return rows


def check_finite(rows: Tensor, name: str, side: str) -> None:
    """Raise UserError if features, shape (n, d), the same on every rank, are not all finite.

    Args:
        name: name of the metric's value, with its detector.
        side: `generated` or `real`.
    """
    finite = rows.isfinite().all(1)
    if not finite.all():
        raise UserError(
            f"{name}: the detector gives {int((~finite).sum())} of {len(rows)} {side} images features that are not "
            "finite; use another detector, or correct yours",
            everywhere=True,
        )


def gaussian_of_rows(rows: Tensor) -> Gaussian:
    """Return the moments of features, shape (n, d). Raises UserError for fewer than two."""
    dimension = rows.shape[1]
    gram = empty_gram(dimension).to(rows.device)
    for batch in rows.split(_BATCH):
        add_to_gram(gram, batch)
    return gaussian_of_gram(gram, dimension)


def row_blocks(count: int, size: int, runtime: Runtime) -> list[slice]:
    """Return this rank's blocks of at most `size` of `count` rows: rank r of W has the blocks r, r + W, ..."""
    starts = range(runtime.rank * size, count, runtime.world_size * size)
    return [slice(start, min(start + size, count)) for start in starts]
