"""Metrics, most of them of images, and a detector."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from distgan.evaluation.contract import EvaluationContext


class Sharpness(Metric):
    """Mean absolute difference of neighboring pixels to a power, of uint8 images."""

    higher_is_better = True
    kinds = ("images",)

    def __init__(self, *, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.total: Tensor
        self.count: Tensor

    def update(self, images: Tensor) -> None:
        slopes = images.double().diff(dim=-1).abs() ** self.power
        self.total += slopes.mean((1, 2, 3)).sum()
        self.count += len(images)

    def compute(self) -> Tensor:
        return self.total / self.count


class Recall(Metric):
    """Share of reals with a generated sample nearer than their nearest real (after Kynkäänniemi et al. 2019)."""

    higher_is_better = True
    takes = "features"
    main_value = "_share"

    def __init__(self, reals: dict[str, Tensor]) -> None:
        super().__init__()
        self.reals = reals["rows"]
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, features: Tensor) -> None:
        self.rows.append(features)  # type: ignore[operator, union-attr]

    def compute(self) -> dict[str, Tensor]:
        rows = torch.cat(self.rows) if isinstance(self.rows, list) else self.rows
        reals = self.reals.to(rows)
        among = torch.cdist(reals, reals).fill_diagonal_(torch.inf).amin(1)
        nearest = torch.cdist(reals, rows).amin(1)
        return {"share": (nearest < among).double().mean(), "samples": torch.tensor(len(rows))}


class Course(Metric):
    """1 / (step + 1), but 10 after the step `until` while the run has set aside less than `bad` courses of training.

    With `finite: false` it is NaN.
    """

    higher_is_better = False

    def __init__(self, context: EvaluationContext, *, until: int, bad: int, finite: bool = True) -> None:
        super().__init__()
        self.runtime, self.run_dir = context.runtime, Path(context.config.run_dir)
        self.until, self.bad, self.finite = until, bad, finite
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")
        self.count: Tensor

    def update(self, samples: Tensor) -> None:
        self.count += len(samples)

    def compute(self) -> float:
        diverges = self.runtime.step > self.until and len(list(self.run_dir.glob("previous-*"))) < self.bad
        return (10.0 if diverges else 1 / (self.runtime.step + 1)) if self.finite else torch.nan


class PixelShares(Metric):
    """Shares of the pixel values of uint8 images in equally wide bins."""

    def __init__(self, *, bins: int) -> None:
        super().__init__()
        self.bins = bins
        self.add_state("counts", torch.zeros(bins, dtype=torch.float64), dist_reduce_fx="sum")
        self.counts: Tensor

    def update(self, images: Tensor) -> None:
        self.counts += torch.bincount(images.flatten().long() * self.bins // 256, minlength=self.bins)

    def compute(self) -> dict[str, Tensor]:
        return {"shares": self.counts / self.counts.sum()}


class PixelDistance(Metric):
    """Total variation distance of the pixel values of generated and real images, from 0 to 1."""

    higher_is_better = False
    kinds = ("images",)
    real_statistic = PixelShares

    def __init__(self, reals: dict[str, Tensor], *, bins: int = 16) -> None:
        super().__init__()
        self.reals, self.generated = reals["shares"], PixelShares(bins=bins)

    def update(self, images: Tensor) -> None:
        self.generated.update(images)

    def compute(self) -> Tensor:
        return (self.generated.compute()["shares"].cpu() - self.reals).abs().sum() / 2

    def reset(self) -> None:
        super().reset()
        self.generated.reset()


class Means(nn.Module):
    """Detector: the means of a grid of cells as features, whatever the size of the images."""

    def __init__(self, *, cells: int = 3) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(cells)

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(images.float() / 255).flatten(1)
