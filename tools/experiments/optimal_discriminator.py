"""Check that a converged discriminator is (alpha p + beta q) / (p + q) and yields the Jensen-Shannon divergence.

The optimal discriminator is D* = p / (p + q). Its value V = E log D(x) + E log(1 - D(G(z))) is 2 JS(p, q) - 2 log 2
(Goodfellow et al. 2014, proposition 1 and theorem 1). With targets alpha for real and beta for generated samples,
D* = (alpha p + beta q) / (p + q) (Salimans et al. 2016, section 3.4). Here p and q are known densities on a line. The
discriminator trains with distgan's own objective, player, optimizer and schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distgan.evaluation.divergences import js_divergence

from ..charts import Chart, Curve, draw
from .fixed_opponent import Trial, configure

GRID = torch.linspace(-6, 6, 2401, dtype=torch.float64)
BATCH = 256
GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
"""Its multiples modulo 1 fill [0, 1) evenly, so successive updates sample different quantiles."""
RATE = {"start": 2e-2, "end": 0, "shape": "cosine"}


@dataclass(frozen=True)
class Mixture:
    """Mixture of equally likely normal distributions on a line. `components` are (mean, standard deviation)."""

    components: tuple[tuple[float, float], ...]

    def density(self, x: Tensor) -> Tensor:
        """Return the density at each x, with the shape of x."""
        parts = [torch.exp(-(((x - mean) / width) ** 2) / 2) / width for mean, width in self.components]
        density: Tensor = torch.stack(parts).mean(0) / math.tau**0.5
        return density

    def quantiles(self, number: int, shift: float) -> Tensor:
        """Return the quantiles (i + shift) / number for i in [0, number): float64, shape (number,); shift in [0, 1)."""
        density = self.density(GRID)
        mass = torch.cumsum((density[1:] + density[:-1]) / 2, 0)
        mass = torch.cat((mass.new_zeros(1), mass / mass[-1]))
        shares = (torch.arange(number) + shift) / number
        return torch.from_numpy(np.interp(shares, mass, GRID))


@dataclass(frozen=True)
class Case:
    """Density p of real samples with target alpha, and density q of generated samples with target beta."""

    name: str
    p: Mixture
    q: Mixture
    alpha: float = 1.0
    beta: float = 0.0

    @property
    def optimum(self) -> Tensor:
        """D* on the grid."""
        p, q = self.p.density(GRID), self.q.density(GRID)
        return (self.alpha * p + self.beta * q) / (p + q)

    @property
    def divergence(self) -> float:
        """JS(p, q) in nats."""
        return js_divergence(self.p.density(GRID), self.q.density(GRID)).item()

    @property
    def loss(self) -> float:
        """Cross-entropy of D* in nats. Without label smoothing it is -V* = 2 log 2 - 2 JS(p, q)."""
        p, q = (side.density(GRID) / side.density(GRID).sum() for side in (self.p, self.q))
        one, zero = self.alpha * p + self.beta * q, (1 - self.alpha) * p + (1 - self.beta) * q
        return -(torch.xlogy(one, self.optimum) + torch.xlogy(zero, 1 - self.optimum)).sum().item()

    @property
    def seen(self) -> Tensor:
        """Mask of the grid points where samples are frequent enough to learn from."""
        return (self.p.density(GRID) + self.q.density(GRID)) / 2 > 0.01


_TWO, _ONE = Mixture(((-2.0, 0.5), (2.0, 0.8))), Mixture(((0.0, 1.2),))
CASES = (
    Case("p and q", _TWO, _ONE),
    Case("p = q", _ONE, _ONE),
    Case("one-sided smoothing, targets 0.9 and 0", _TWO, _ONE, alpha=0.9),
    Case("two-sided smoothing, targets 0.9 and 0.2", _TWO, _ONE, alpha=0.9, beta=0.2),
)


@dataclass(frozen=True)
class Trained:
    """Trained discriminator, with the scalars that a run would report as means over the last fifth of its updates."""

    probabilities: Tensor
    """D on the grid."""
    loss: float
    divergence: float
    """Reported Jensen-Shannon divergence in nats. Label smoothing makes it too low, because D does not maximize V."""

    def error(self, case: Case) -> float:
        """Return the largest distance |D - D*| where samples are frequent."""
        return (self.probabilities - case.optimum).abs()[case.seen].max().item()


def train(case: Case, steps: int = 600) -> Trained:
    """Train a discriminator between p and q for `steps` updates."""
    smoothed = (case.alpha, case.beta) != (1.0, 0.0)
    trial = Trial(
        configure(
            1, steps, BATCH, {"learning_rate": RATE, "betas": [0.9, 0.999]},
            adversarial="minimax", label_smoothing={"real": case.alpha, "fake": case.beta} if smoothed else None,
        )
    )  # fmt: skip
    for step in range(steps):
        if step == steps * 4 // 5:
            trial.report()
        trial.update(*(side.quantiles(BATCH, step * GOLDEN_RATIO % 1)[:, None] for side in (case.p, case.q)))
    with torch.no_grad():
        probabilities = trial.network(GRID[:, None].to(trial.runtime.device)).sigmoid().cpu()
    report = trial.report()
    return Trained(probabilities, report["loss/discriminator"], report["divergence/jensen_shannon"])


def main(folder: Path) -> None:
    """Train all cases, print their errors, and draw them."""
    charts = []
    for case in CASES:
        trained = train(case)
        print(
            f"{case.name}: D within {trained.error(case):.3f} of D*; loss {trained.loss:.4f}, that of D* "
            f"{case.loss:.4f}; Jensen-Shannon divergence {trained.divergence:.4f}, of p and q {case.divergence:.4f}"
        )
        x = GRID.tolist()
        charts.append(
            Chart(
                case.name,
                "x",
                [
                    Curve("p", x, case.p.density(GRID).tolist(), 0),
                    Curve("q", x, case.q.density(GRID).tolist(), 1),
                    Curve("optimal D", x, case.optimum.tolist(), 2),
                    Curve("trained D", x, trained.probabilities.tolist(), 5, dashed=True),
                ],
                (0.0, 1.0),
            )
        )
    draw(charts, folder / "optimal-discriminator.png", columns=2)
