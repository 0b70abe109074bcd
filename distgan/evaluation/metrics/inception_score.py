"""The Inception score: how sure a classifier is of each sample, and how evenly it spreads them over the classes.

Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", NeurIPS 2016, section 4:

    exp(E_x KL(p(y | x) || p(y))),    p(y) = E_x p(y | x),

from 1 (all samples look alike to the classifier) to its number of classes. As in their code, the score is the mean
over ten splits of consecutive samples, with the standard deviation over these; it grows with the size of a split.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.moments import all_reduce

SPLITS = 10


class Score(NamedTuple):
    """Over the splits, float64 scalars; the standard deviation is the population's."""

    mean: Tensor
    deviation: Tensor


class InceptionScore(Metric):
    """Update with logits and the numbers of their samples; compute a `Score`.

    A split's score needs of its samples only the sums of p and of sum p log p, so these are the state: ranks reduce
    them once, and whose samples they were does not matter.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    probabilities: Tensor
    negative_entropies: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, num_samples: int, splits: int = SPLITS, **settings: Any) -> None:
        """num_samples: how many there will be, of all ranks. settings: those of `torchmetrics.Metric`.

        Raises UserError for fewer samples than splits.
        """
        if num_samples < splits:
            raise UserError(
                f"evaluation.num_samples = {num_samples}: an inception score is over {splits} splits of the samples; "
                f"take at least {splits}, or leave inception_score out of evaluation.metrics"
            )
        super().__init__(**{"dist_sync_fn": all_reduce, **settings})
        self.num_samples, self.splits = num_samples, splits
        for name, shape in (
            ("probabilities", (splits, num_classes)), ("negative_entropies", (splits,)), ("counts", (splits,)),
        ):  # fmt: skip
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, numbers: Tensor) -> None:
        """Add samples.

        Args:
            logits: shape (n, num_classes), any real dtype.
            numbers: which of the `num_samples` these are, int64, shape (n,). Split s of S holds those from
                s * num_samples // S on.
        """
        logarithms = logits.detach().double().log_softmax(1)
        probabilities = logarithms.exp()
        starts = torch.arange(1, self.splits, device=logits.device) * self.num_samples // self.splits
        split = torch.bucketize(numbers.to(logits.device), starts, right=True)
        self.probabilities.index_add_(0, split, probabilities)
        self.negative_entropies.index_add_(0, split, (probabilities * logarithms).sum(1))
        self.counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def compute(self) -> Score:
        """The score of all samples of all ranks."""
        mean = self.probabilities / self.counts[:, None]
        divergences = self.negative_entropies / self.counts - torch.xlogy(mean, mean).sum(1)
        scores = divergences.exp()
        return Score(scores.mean(), scores.std(correction=0))
