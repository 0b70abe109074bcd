"""Objective of each player on one micro-batch, as one module with one forward.

A wrapper (DDP, DeepSpeed) sees one forward and one backward per micro-batch. Inside there may be several passes through
the network, gradient penalties with their own backward, and collectives of batch statistics. The other player's network
is referenced, not registered, so that a wrapper sees the parameters of one network.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config, GradientPenaltyConfig, ZeroCenteredPenaltyConfig
from distgan.distributed.collectives import at_least_float32
from distgan.errors import blaming
from distgan.losses import gradient_penalties
from distgan.losses.adversarial import ADVERSARIAL, draw_targets, targeted_cross_entropy
from distgan.losses.regularizers import HistoricalAverage, feature_matching, noise_sigma
from distgan.networks.hooks import captured, find_layer
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape
from distgan.players import scalars
from distgan.schedule import penalty_gamma

AnyPenalty = TypeVar("AnyPenalty", ZeroCenteredPenaltyConfig, GradientPenaltyConfig)
LossAndScalars = tuple[Tensor, dict[str, Tensor]]

_LAYER_KEY = "objective.feature_matching.layer"


class MicroBatch(NamedTuple):
    """One rank's part of a micro-batch. Samples are network inputs: floats of shape (n, *sizes)."""

    addresses: Tensor
    """(n,) int64: address of each sample's random draws, equal for any number of ranks."""
    latents: Tensor
    """(n, latent_size)"""
    labels: Tensor | None
    """(n,) int64: classes of the fakes where the objective has no reals; None if unconditional."""
    reals: Tensor | None
    """(n, *sizes); None where the objective needs no reals."""
    real_labels: Tensor | None
    """(n,) int64: classes of the reals; None if unconditional."""


def blank_batch(share: int, latent_size: int, shape: SampleShape, device: torch.device) -> MicroBatch:
    """Return zeros in the shape of one rank's part of a micro-batch."""
    numbers = torch.zeros(share, dtype=torch.int64, device=device)
    labels = numbers if shape.num_classes else None
    latents = torch.zeros(share, latent_size, device=device)
    return MicroBatch(numbers, latents, labels, torch.zeros(share, *shape.sizes, device=device), labels)


class Objective(nn.Module):
    """Base class of both players' objectives."""

    role: str

    def __init__(
        self, network: nn.Module, opponent: nn.Module, config: Config, autocast_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.network = network
        self._opponent = (opponent,)
        self.config = config.objective
        self.seed = config.seed
        self.steps = config.training.steps
        self.accumulation = config.training.gradient_accumulation_steps
        """Micro-batches per update."""
        self.autocast_dtype = autocast_dtype
        self.family = ADVERSARIAL[config.objective.adversarial]
        self.history_weight: float = getattr(config.objective.historical_averaging, self.role)
        self.history: HistoricalAverage | None = None
        """Historical average of this player's parameters; None if its weight is 0."""
        if self.history_weight:
            self.history = HistoricalAverage(network)

    @property
    def opponent(self) -> nn.Module:
        """The other player's network."""
        return self._opponent[0]

    @staticmethod
    def _fake_labels(batch: MicroBatch) -> Tensor | None:
        """Return the labels of the reals if there are any, else the drawn labels.

        Then pairs, and the points between them, have one class, as in the released code of WGAN-GP
        (gan_cifar_resnet.py), of progressive growing and of R3GAN.
        """
        return batch.labels if batch.real_labels is None else batch.real_labels

    def _autocast(self, like: Tensor, *, unless: bool = False) -> torch.autocast:
        """Return a context that runs networks in bf16 if the config asks for it. Losses and penalties stay float32."""
        dtype = self.autocast_dtype
        return torch.autocast(like.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None and not unless)

    def _with_noise(self, samples: Tensor, kind: str, batch: MicroBatch, step: int) -> Tensor:
        """Add instance noise to the discriminator's inputs, if the config has any at this step."""
        noise = self.config.instance_noise
        sigma = noise_sigma(noise, step) if noise is not None else 0.0
        return samples + sigma * self._normal(f"instance noise/{kind}", batch, samples) if sigma else samples

    def _normal(self, purpose: str, batch: MicroBatch, like: Tensor) -> Tensor:
        """Draw addressed N(0, 1) in the shape of `like`."""
        drawn = randomness.normal(self.seed, f"{self.role}/{purpose}", batch.addresses, like.shape[1:])
        return drawn.to(like.dtype)

    def _uniform(self, purpose: str, batch: MicroBatch, like: Tensor, *shape: int) -> Tensor:
        """Draw addressed U[0, 1) of shape (n, *shape)."""
        return randomness.uniform(self.seed, f"{self.role}/{purpose}", batch.addresses, shape).to(like.dtype)

    def _with_history(self, loss: Tensor, parts: dict[str, Tensor]) -> LossAndScalars:
        """Add the historical-averaging term to the loss, and detach its parts from the graph."""
        if self.history is not None:
            distance = self.history.penalty()
            parts[f"loss/{self.role}_history"] = distance
            loss = loss + self.history_weight * distance
        return loss, {name: part.detach() for name, part in parts.items()}


class DiscriminatorObjective(Objective):
    """Loss of the discriminator. A pass with a gradient penalty runs entirely in float32."""

    role = "discriminator"

    def forward(self, batch: MicroBatch, step: int, update: int) -> LossAndScalars:
        """Return the loss and the scalars. `update` counts discriminator updates and selects lazy penalties."""
        config = self.config
        assert batch.reals is not None
        labels = self._fake_labels(batch)
        with torch.no_grad(), self._autocast(batch.reals), reference_moments(self.opponent):
            fakes = self.opponent(batch.latents, labels)
        reals = self._with_noise(batch.reals, "real", batch, step)
        fakes = self._with_noise(fakes.to(reals.dtype), "fake", batch, step)
        r1, r2, gp = _due(config.r1, update), _due(config.r2, update), _due(config.gradient_penalty, update)
        with ExitStack() as held:
            # A penalized pass needs normalization moments in its own precision.
            penalized = any(penalty is not None for penalty in (r1, r2, gp))
            with self._autocast(reals, unless=penalized):
                held.enter_context(reference_moments(self.network))
            reals, real_logits = self._judge(reals, batch.real_labels, differentiable=r1 is not None)
            fakes, fake_logits = self._judge(fakes, labels, differentiable=r2 is not None)
            loss = self._adversarial(real_logits, fake_logits, batch)
            parts = {"loss/discriminator": loss} | scalars.discriminator_scalars(
                config.family, real_logits, fake_logits
            )
            parts |= scalars.diversity("data/diversity", batch.reals)
            if r1 is not None:
                parts["loss/r1"] = gradient_penalties.zero_centered(
                    real_logits, reals, penalty_gamma(r1, step, self.steps)
                )
                loss = loss + r1.every * parts["loss/r1"]
            if r2 is not None:
                parts["loss/r2"] = gradient_penalties.zero_centered(
                    fake_logits, fakes, penalty_gamma(r2, step, self.steps)
                )
                loss = loss + r2.every * parts["loss/r2"]
            if gp is not None:
                points = self._penalized_points(gp.points, gp.perturbation, reals.detach(), fakes.detach(), batch)
                points, logits = self._judge(points, batch.real_labels, differentiable=True)
                parts["loss/gradient_penalty"] = gradient_penalties.gradient_penalty(logits, points, gp)
                loss = loss + gp.every * parts["loss/gradient_penalty"]
        if config.drift:
            parts["loss/drift"] = config.drift * gradient_penalties.drift(real_logits)
            loss = loss + parts["loss/drift"]
        return self._with_history(loss, parts)

    def _judge(self, samples: Tensor, labels: Tensor | None, *, differentiable: bool) -> tuple[Tensor, Tensor]:
        """Return the samples and their float32 logits. With `differentiable`, the logits have second derivatives."""
        if differentiable:
            samples = samples.detach().requires_grad_(True)
            # A compiled network has no second derivative, so call its eager forward method.
            return samples, at_least_float32(self.network.forward(samples, labels))
        with self._autocast(samples):
            return samples, at_least_float32(self.network(samples, labels))

    def _adversarial(self, real_logits: Tensor, fake_logits: Tensor, batch: MicroBatch) -> Tensor:
        if self.config.label_smoothing is None:
            return self.family.discriminator(real_logits, fake_logits)
        targets = draw_targets(self.config.label_smoothing, self._uniform("targets", batch, real_logits, 4))
        return targeted_cross_entropy(real_logits, fake_logits, *targets)

    def _penalized_points(self, kind: str, variance: float, reals: Tensor, fakes: Tensor, batch: MicroBatch) -> Tensor:
        if kind == "gaussian":
            return gradient_penalties.perturb_gaussian(reals, self._normal("perturbation", batch, reals), variance)
        fractions = self._uniform("interpolation", batch, reals)
        if kind == "uniform":
            noise = self._uniform("perturbation", batch, reals, *reals.shape[1:])
            return gradient_penalties.perturb_uniform(reals, noise, fractions)
        return gradient_penalties.interpolate_samples(reals, fakes, fractions)


class GeneratorObjective(Objective):
    """Loss of the generator. The discriminator is a frozen network in it.

    Raises:
        UserError: the discriminator has no layer of the name in `objective.feature_matching.layer`.
    """

    role = "generator"

    def __init__(
        self, network: nn.Module, opponent: nn.Module, config: Config, autocast_dtype: torch.dtype | None
    ) -> None:
        super().__init__(network, opponent, config, autocast_dtype)
        matching = config.objective.feature_matching
        self._layer = (matching.layer or str(opponent.feature_layer)) if matching is not None else None
        if self._layer is not None:
            with blaming(_LAYER_KEY):
                find_layer(opponent, self._layer)

    def forward(self, batch: MicroBatch, step: int) -> LossAndScalars:
        """Return the loss and the scalars. `batch` needs reals if `ObjectiveConfig.generator_needs_reals`."""
        config, discriminator, labels = self.config, self.opponent, self._fake_labels(batch)
        with _frozen(discriminator), self._autocast(batch.latents):
            with reference_moments(self.network):
                fakes = self.network(batch.latents, labels)
            with reference_moments(discriminator):
                noisy = self._with_noise(fakes, "fake", batch, step)
                fake_logits, fake_features = self._judge(noisy, labels)
                real_logits, real_features = fake_logits, fake_features
                if config.generator_needs_reals:
                    assert batch.reals is not None
                    with torch.no_grad():
                        reals = self._with_noise(batch.reals, "real", batch, step)
                        real_logits, real_features = self._judge(reals, batch.real_labels)
        parts: dict[str, Tensor] = {}
        matching = config.feature_matching
        loss = fake_logits.new_zeros(())
        if matching is None or matching.adversarial:
            loss = self.family.generator(real_logits, fake_logits)
        if matching is not None:
            assert real_features is not None
            assert fake_features is not None
            parts["loss/feature_matching"] = feature_matching(real_features, fake_features, matching.distance)
            loss = loss + matching.weight * parts["loss/feature_matching"]
        varied = scalars.diversity("generator/diversity", fakes)
        return self._with_history(loss, {"loss/generator": loss, **varied, **parts})

    def _judge(self, samples: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the discriminator's float32 logits and, with feature matching, its float32 features."""
        if self._layer is None:
            return at_least_float32(self.opponent(samples, labels)), None
        with blaming(_LAYER_KEY), captured(self.opponent, self._layer) as outputs:
            # The eager forward method, because hooks do not see the layers of a compiled network.
            logits = self.opponent.forward(samples, labels)
        return at_least_float32(logits), at_least_float32(outputs[-1])


def _due(penalty: AnyPenalty | None, update: int) -> AnyPenalty | None:
    """Return the penalty if it is due in this update, else None."""
    return penalty if penalty is not None and update % penalty.every == 0 else None


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Freeze the network's parameters inside the block; its input still gets a gradient."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
