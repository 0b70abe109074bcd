"""Show that on disjoint supports the minimax generator's gradient vanishes and the Wasserstein generator's does not.

The setting is example 1 of Arjovsky et al. 2017: real samples (0, Z) and generated samples (theta, Z), with Z from
U[0, 1). Then JS = log 2 for every theta except 0, and W = |theta|. A minimax discriminator that trains at fixed theta
becomes certain, and dL_G/dtheta vanishes (Arjovsky and Bottou 2017, theorem 2.4 and figure 2). The gradient of a
Wasserstein critic does not vanish. With a gradient penalty of weight lambda, its optimal slope s maximizes
s |theta| - lambda (s - 1)^2. So |dL_G/dtheta| = s = 1 + |theta| / (2 lambda), and its estimate of W is s |theta|.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distgan.players.objective import GeneratorObjective
from distgan.players.samples import MicroBatch

from ..charts import Chart, Curve, draw
from .fixed_opponent import Trial, configure
from .optimal_discriminator import GOLDEN_RATIO, GRID, Mixture

BATCH, UPDATES = 64, 1000
LAMBDA = 10.0
OBJECTIVES: dict[str, dict[str, Any]] = {
    "minimax": {"adversarial": "minimax"},
    "non-saturating": {"adversarial": "non_saturating"},
    "Wasserstein, penalty": {"adversarial": "wasserstein", "gradient_penalty": {"weight": LAMBDA}},
    "Wasserstein, clipping": {"adversarial": "wasserstein", "weight_clipping": {"limit": 0.1}},
}
ADAM = {"learning_rate": 1e-3, "betas": [0.5, 0.9]}


class Segment(nn.Module):
    """Generator with one parameter. It maps latents (n, 1) in [0, 1) to the points (theta, latent), shape (n, 2)."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.cat((self.theta.expand(len(latents), 1), latents), 1)


class Segments:
    """Discriminator of the two segments, and the gradient of the generator's loss."""

    def __init__(self, name: str, theta: float) -> None:
        config = configure(2, UPDATES, BATCH, ADAM, **OBJECTIVES[name])
        self.trial = Trial(config)
        self.device = self.trial.runtime.device
        self.generator = Segment(theta).to(self.device)
        self.objective = GeneratorObjective(self.generator, self.trial.network, config, None)
        self.latents = ((torch.arange(BATCH, device=self.device) + 0.5) / BATCH).double()[:, None]

    def train(self, updates: int) -> None:
        """Train the discriminator for `updates` more updates, at fixed theta."""
        reals = torch.cat((torch.zeros_like(self.latents), self.latents), 1)
        fakes = self.generator(self.latents).detach()
        for _ in range(updates):
            # Pair each real point with other generated points over time, so that the interpolates of the gradient
            # penalty fill the rectangle between the segments.
            self.trial.update(reals, fakes.roll(7 * self.trial.updates, 0))

    def gradient(self) -> float:
        """Return dL_G/dtheta."""
        batch = MicroBatch(torch.arange(BATCH, device=self.device), self.latents, None, None, None)
        loss, _ = self.objective(batch, 0)
        (gradient,) = torch.autograd.grad(loss, self.generator.theta)
        return float(gradient)

    def divergence(self) -> float:
        """Return the divergence estimate that a run would report, as a mean over the updates since the last call."""
        report = self.trial.report()
        return next(value for name, value in report.items() if name.startswith("divergence/"))


def main(folder: Path) -> None:
    """Run all measurements, print them, and draw their charts."""
    draw([_over_updates(), *_over_theta(), _between_normals()], folder / "vanishing-gradients.png", columns=2)


def _over_updates() -> Chart:
    """Measure the generator's gradient at theta = 1 while the discriminator trains."""
    every = UPDATES // 40
    curves = []
    for number, name in enumerate(OBJECTIVES):
        segments, gradients = Segments(name, 1.0), []
        for _ in range(0, UPDATES, every):
            segments.train(every)
            gradients.append(abs(segments.gradient()))
        print(
            f"{name}, theta = 1: |dL_G/dtheta| {gradients[0]:.2g} after {every} updates, {gradients[-1]:.2g} in the end"
        )
        curves.append(Curve(name, range(every, UPDATES + 1, every), gradients, number))
    return Chart(
        "|gradient of the generator's loss|, theta = 1", "updates of the discriminator", curves, (1e-12, 1e6), True
    )


def _over_theta() -> list[Chart]:
    """Measure a trained discriminator's estimate of the divergence and its gradient for the generator."""
    places = [-1.0, -0.7, -0.4, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0]
    estimates, gradients = [], []
    for number, name in ((0, "minimax"), (2, "Wasserstein, penalty")):
        ends = [Segments(name, theta) for theta in places]
        for segments in ends:
            segments.train(UPDATES // 2)
            segments.divergence()
            segments.train(10)
        label = "Jensen-Shannon" if number == 0 else "Wasserstein"
        estimates.append(Curve(label, places, [segments.divergence() for segments in ends], number))
        gradients.append(Curve(name, places, [segments.gradient() for segments in ends], number))
        print(f"{label} estimates at theta = {places[0]}, ..., {places[-1]}:", *(f"{y:.3f}" for y in estimates[-1].y))
    theory = [0.0 if theta == 0 else math.log(2) for theta in places], [abs(theta) for theta in places]
    truth = [Curve(label, places, y, 5, dashed=True) for label, y in zip(("true values", ""), theory, strict=True)]
    return [
        Chart("divergence of the segments, as estimated", "theta", [*estimates, *truth], (0.0, 1.8)),
        Chart("gradient of the generator's loss", "theta", gradients, (-1.6, 2.4)),
    ]


def _between_normals() -> Chart:
    """Train a discriminator and a critic on two distant normal distributions (Arjovsky et al. 2017, figure 2)."""
    real, fake = Mixture(((-2.0, 0.4),)), Mixture(((2.0, 0.4),))
    x = GRID.tolist()
    curves = [Curve("real", x, real.density(GRID).tolist(), 4), Curve("generated", x, fake.density(GRID).tolist(), 1)]
    for number, label, name in ((0, "D", "minimax"), (2, "critic", "Wasserstein, penalty")):
        trial = Trial(configure(1, UPDATES, BATCH, ADAM, **OBJECTIVES[name]))
        for update in range(UPDATES):
            shift = update * GOLDEN_RATIO % 1
            trial.update(
                real.quantiles(BATCH, shift)[:, None], fake.quantiles(BATCH, shift)[:, None].roll(7 * update, 0)
            )
        with torch.no_grad():
            logits = trial.network(GRID[:, None].to(trial.runtime.device)).cpu()
        values = logits.sigmoid() if name == "minimax" else logits - logits[len(logits) // 2]
        curves.append(Curve(label, x, values.tolist(), number))
    return Chart("discriminator and critic between two normals", "x", curves, (-3.0, 4.0))
