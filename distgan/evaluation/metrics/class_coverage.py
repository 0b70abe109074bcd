"""How generated samples spread over the classes of the data, as a classifier tells them apart.

The protocol of StackedMNIST (Metz et al., "Unrolled Generative Adversarial Networks", ICLR 2017; Lin et al., PacGAN,
NeurIPS 2018): each sample counts for the class of its largest logit. There, a class is found with one sample; but a
classifier errs, so of few classes all would be. Here a class is found when the samples have at least a tenth of its
share in the data. For StackedMNIST's 1,000 classes that is one sample in 10,000, as there; of the 25,600 or 26,000
samples of its papers it is three, so that at most as many classes are found as by their count. The divergence has no
threshold, and is theirs where the data's classes are equally frequent.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.evaluation.divergences import kl_divergence
from distgan.evaluation.moments import all_reduce

THRESHOLD = 0.1
"""Of a class's share in the data: what its share of the samples must be for it to count as found."""


class Spread(NamedTuple):
    """Scalars: int64, float64, float64."""

    found: Tensor
    """Classes that the samples have enough of."""
    smallest_share: Tensor
    """The least frequent class's share of the samples."""
    kl: Tensor
    """KL of the samples' classes to the data's, in nats: 0 when they are as frequent as there."""


class ClassSpread(Metric):
    """Update with logits; compute a `Spread` over the classes that the data have."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    present: Tensor
    shares: Tensor
    counts: Tensor

    def __init__(self, class_counts: Tensor, **settings: Any) -> None:
        """class_counts: real samples of each class, shape (k,). settings: those of `torchmetrics.Metric`."""
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        present = class_counts > 0
        self.register_buffer("present", present, persistent=False)
        self.register_buffer(
            "shares", (class_counts / class_counts.sum(dtype=torch.float64))[present], persistent=False
        )
        self.add_state("counts", torch.zeros(len(self.shares), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add samples: logits of shape (n, k)."""
        classes = logits.detach()[:, self.present].argmax(1)
        self.counts += torch.bincount(classes, minlength=len(self.counts))

    def compute(self) -> Spread:
        """The spread of all samples of all ranks."""
        shares = self.counts / self.counts.sum(dtype=torch.float64)
        return Spread((shares >= THRESHOLD * self.shares).sum(), shares.min(), kl_divergence(shares, self.shares))
