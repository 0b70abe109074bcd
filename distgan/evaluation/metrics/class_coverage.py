"""Class coverage: the number of classes that a classifier finds in generated samples.

The protocol of StackedMNIST (Metz et al., "Unrolled Generative Adversarial Networks", ICLR 2017; Lin et al., PacGAN,
NeurIPS 2018): each sample counts for the class of its largest logit. In those papers one sample is enough to find a
class: `min_samples=1`. Because a classifier errs, that finds every class when there are few. By default a class counts
as found when its share of the samples is at least a tenth of its share of the data. For 1,000 equally frequent classes
that is one sample in 10,000, and three of the papers' 25,600 or 26,000. The divergence has no threshold. It equals the
papers' where the classes of the data are equally frequent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.evaluation.divergences import kl_divergence
from distgan.evaluation.moments import all_reduce

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

THRESHOLD = 0.1
"""Smallest ratio of a class's share of the samples to its share of the data at which it counts as found."""


class Spread(NamedTuple):
    """Class coverage of samples, as scalars: int64, float64, float64."""

    found: Tensor
    """Number of classes found."""
    smallest_share: Tensor
    """Share of the samples in the least frequent class."""
    kl: Tensor
    """KL divergence of the samples' class frequencies from the data's, in nats; 0 if equal."""


class ClassSpread(Metric):
    """Update with logits; compute a `Spread` over the classes of the data."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    present: Tensor
    shares: Tensor
    counts: Tensor

    def __init__(self, class_counts: Tensor, min_samples: int | None = None, **settings: Any) -> None:
        """Prepare the counts.

        Args:
            class_counts: real samples per class, shape (k,).
            min_samples: fewest samples of a class that count as found; None for a tenth of its share of the data.
            settings: keyword arguments of `torchmetrics.Metric`.
        """
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        self.min_samples = min_samples
        present = class_counts > 0
        self.register_buffer("present", present, persistent=False)
        self.register_buffer(
            "shares", (class_counts / class_counts.sum(dtype=torch.float64))[present], persistent=False
        )
        self.add_state("counts", torch.zeros(len(self.shares), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add samples by their logits, shape (n, k)."""
        classes = logits.detach()[:, self.present].argmax(1)
        self.counts += torch.bincount(classes, minlength=len(self.counts))

    def compute(self) -> Spread:
        """Compute the spread of all samples of all ranks."""
        shares = self.counts / self.counts.sum(dtype=torch.float64)
        by_share = shares >= THRESHOLD * self.shares
        found = by_share if self.min_samples is None else self.counts >= self.min_samples
        return Spread(found.sum(), shares.min(), kl_divergence(shares, self.shares))


class Classes(ClassSpread):
    """Number of classes found by an evaluation, with `smallest_share` and `kl`: `SuiteMetric`."""

    kinds = ("images",)
    takes = "logits"

    def __init__(self, context: EvaluationContext, min_samples: int | None = None) -> None:
        labels = torch.from_numpy(context.index.labels.astype(np.int64))
        super().__init__(torch.bincount(labels, minlength=context.index.num_classes), min_samples)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the number of classes found, `smallest_share` and `kl`."""
        spread = super().compute()
        return {"": spread.found, "smallest_share": spread.smallest_share, "kl": spread.kl}
