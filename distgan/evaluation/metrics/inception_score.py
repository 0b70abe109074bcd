"""Inception score: high if a classifier is certain of each sample and the samples spread evenly over the classes.

Salimans, Goodfellow, Zaremba, Cheung, Radford, Chen, "Improved Techniques for Training GANs", NeurIPS 2016, section 4:

    exp(E_x KL(p(y | x) || p(y))),    p(y) = E_x p(y | x),

from 1 (the same prediction for all samples) to the number of classes. As in their code, the score is the mean over ten
splits of consecutive samples, reported with the standard deviation over the splits. It grows with the split size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.errors import UserError
from distgan.evaluation.moments import all_reduce

if TYPE_CHECKING:
    from distgan.evaluation.contract import EvaluationContext

SPLITS = 10


class Score(NamedTuple):
    """Mean and population standard deviation over the splits, float64 scalars."""

    mean: Tensor
    deviation: Tensor


class InceptionScoreOfLogits(Metric):
    """Update with logits and the numbers of their samples; compute a `Score`.

    The score of a split needs only the sums of p and of sum p log p over its samples. These sums are the state. Ranks
    reduce them once, whichever rank held which samples.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    probabilities: Tensor
    negative_entropies: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, num_samples: int, splits: int = SPLITS, **settings: Any) -> None:
        """Prepare the sums of all splits.

        Args:
            num_samples: total number of samples over all ranks.
            settings: keyword arguments of `torchmetrics.Metric`.

        Raises:
            UserError: there are fewer samples than splits.
        """
        if num_samples < splits:
            raise UserError(
                f"evaluation.num_samples = {num_samples}: inception_score needs at least {splits} samples, one per "
                f"split; set evaluation.num_samples={splits} or more, or remove inception_score from evaluation.metrics"
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
            numbers: their numbers in [0, num_samples), int64, shape (n,). Split s of S begins at
                s * num_samples // S.
        """
        logarithms = logits.detach().double().log_softmax(1)
        probabilities = logarithms.exp()
        starts = torch.arange(1, self.splits, device=logits.device) * self.num_samples // self.splits
        split = torch.bucketize(numbers.to(logits.device), starts, right=True)
        self.probabilities.index_add_(0, split, probabilities)
        self.negative_entropies.index_add_(0, split, (probabilities * logarithms).sum(1))
        self.counts.index_add_(0, split, torch.ones_like(split, dtype=torch.float64))

    def compute(self) -> Score:
        """Compute the score of all samples of all ranks."""
        mean = self.probabilities / self.counts[:, None]
        divergences = self.negative_entropies / self.counts - torch.xlogy(mean, mean).sum(1)
        scores = divergences.exp()
        return Score(scores.mean(), scores.std(correction=0))


class InceptionScore(InceptionScoreOfLogits):
    """Inception score of an evaluation, with its deviation over the splits: `SuiteMetric`."""

    kinds = ("images",)
    takes = ("logits", "numbers")

    def __init__(self, context: EvaluationContext) -> None:
        """Prepare the sums. Raises UserError if there are fewer samples than splits."""
        assert context.detector is not None
        super().__init__(context.detector.num_logits, context.num_samples)

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Compute the mean and `std`."""
        score = super().compute()
        return {"": score.mean, "std": score.deviation}
