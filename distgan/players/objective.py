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
from distgan.errors import UserError, blaming
from distgan.losses import gradient_penalties
from distgan.losses.adversarial import AdversarialLoss, draw_targets, targeted_cross_entropy
from distgan.losses.regularizers import HistoricalAverage, feature_matching, noise_sigma
from distgan.networks.hooks import captured, find_layer
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape
from distgan.players import scalars
from distgan.players.terms import TermView, add_terms, build_terms, check_loss
from distgan.schedule import penalty_gamma

AnyPenalty = TypeVar("AnyPenalty", ZeroCenteredPenaltyConfig, GradientPenaltyConfig)
LossAndScalars = tuple[Tensor, dict[str, Tensor]]


class Judged(NamedTuple):
    """Samples with what the discriminator makes of them."""

    samples: Tensor
    """(n, *sizes)"""
    logits: Tensor
    """(n,), at least float32."""
    features: dict[str, Tensor]
    """Outputs of the layers that the objective looks at, at least float32."""


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
    """Base class of both players' objectives.

    Raises:
        UserError: code that the objective names is not allowed or cannot be loaded, or the discriminator lacks a layer
            that a term needs.
    """

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
        self.adversarial: AdversarialLoss = config.objective.adversarial.build()
        self.facts = config.objective.adversarial.facts
        self.loss_name = config.objective.adversarial.path
        self.terms = build_terms(config.objective, self.role)
        self.layers: dict[str, str] = {}
        """Layers of the discriminator that the loss looks at, with the key that asks for each."""
        self._feature_layer: str | None = None
        if any(term.needs_features for term in self.terms):
            self._feature_layer = self._watch(None, "objective.terms")
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

    @property
    def discriminator(self) -> nn.Module:
        """The discriminator's network."""
        return self.network if self.role == "discriminator" else self.opponent

    def _watch(self, layer: str | None, key: str) -> str:
        """Capture a layer of the discriminator in each pass; None is its last features before the logit."""
        if layer is None:
            layer = getattr(self.discriminator, "feature_layer", None)
        with blaming(key):
            if layer is None:
                raise UserError(
                    f"{type(self.discriminator).__name__} does not say which layer has its features; give the class an "
                    "attribute feature_layer with the layer's name",
                    everywhere=True,
                )
            find_layer(self.discriminator, layer)
        self.layers[layer] = key
        return layer

    def _judge(self, samples: Tensor, labels: Tensor | None, *, differentiable: bool = False) -> Judged:
        """Run the discriminator. With `differentiable`, the logits have second derivatives in the returned samples."""
        if differentiable:
            samples = samples.detach().requires_grad_(True)
        with ExitStack() as held:
            held.enter_context(self._autocast(samples, unless=differentiable))
            outputs = {}
            for layer, key in self.layers.items():
                held.enter_context(blaming(key))
                outputs[layer] = held.enter_context(captured(self.discriminator, layer))
            # A compiled network has no second derivative, and hooks do not see its layers.
            eager = differentiable or bool(self.layers)
            logits = (self.discriminator.forward if eager else self.discriminator)(samples, labels)
        features = {layer: at_least_float32(found[-1]) for layer, found in outputs.items()}
        return Judged(samples, at_least_float32(logits), features)

    def _add_terms(
        self, loss: Tensor, parts: dict[str, Tensor], batch: MicroBatch, fakes: Judged, reals: Judged | None
    ) -> Tensor:
        """Add the extra terms to the loss, and their values to `parts`."""
        if not self.terms:
            return loss

        def judge(samples: Tensor, labels: Tensor | None = None) -> Tensor:
            return at_least_float32(self.discriminator.forward(samples, labels))

        def normal(purpose: str, *shape: int) -> Tensor:
            return self._normal(f"extra terms/{purpose}", batch, batch.latents.new_empty(0, *shape))

        def uniform(purpose: str, *shape: int) -> Tensor:
            return self._uniform(f"extra terms/{purpose}", batch, batch.latents, *shape)

        layer = self._feature_layer or ""
        view = TermView(
            latents=batch.latents,
            labels=self._fake_labels(batch),
            fakes=at_least_float32(fakes.samples),
            fake_logits=fakes.logits,
            fake_features=fakes.features.get(layer),
            reals=None if reals is None else reals.samples,
            real_labels=None if reals is None else batch.real_labels,
            real_logits=None if reals is None else reals.logits,
            real_features=None if reals is None else reals.features.get(layer),
            judge=judge,
            normal=normal,
            uniform=uniform,
        )
        return add_terms(self.terms, loss, parts, view)

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
            real = self._judge(reals, batch.real_labels, differentiable=r1 is not None)
            fake = self._judge(fakes, labels, differentiable=r2 is not None)
            reals, fakes, real_logits, fake_logits = real.samples, fake.samples, real.logits, fake.logits
            loss = self._adversarial(real_logits, fake_logits, batch)
            parts = {"loss/discriminator": loss} | scalars.discriminator_scalars(self.facts, real_logits, fake_logits)
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
                judged = self._judge(points, batch.real_labels, differentiable=True)
                penalty = gradient_penalties.gradient_penalty(judged.logits, judged.samples, gp)
                parts["loss/gradient_penalty"] = penalty
                loss = loss + gp.every * parts["loss/gradient_penalty"]
            loss = self._add_terms(loss, parts, batch, fake, real)
        if config.drift:
            parts["loss/drift"] = config.drift * gradient_penalties.drift(real_logits)
            loss = loss + parts["loss/drift"]
        return self._with_history(loss, parts)

    def _adversarial(self, real_logits: Tensor, fake_logits: Tensor, batch: MicroBatch) -> Tensor:
        if self.config.label_smoothing is None:
            return check_loss(self.loss_name, self.adversarial.discriminator(real_logits, fake_logits))
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
        self._matched = self._watch(matching.layer, _LAYER_KEY) if matching is not None else ""
        self._needs_reals = config.objective.generator_needs_reals

    def forward(self, batch: MicroBatch, step: int) -> LossAndScalars:
        """Return the loss and the scalars. `batch` needs reals if `ObjectiveConfig.generator_needs_reals`."""
        config, discriminator, labels = self.config, self.opponent, self._fake_labels(batch)
        with _frozen(discriminator), self._autocast(batch.latents):
            with reference_moments(self.network):
                fakes = self.network(batch.latents, labels)
            with reference_moments(discriminator):
                noisy = self._with_noise(fakes, "fake", batch, step)
                fake, real = self._judge(noisy, labels), None
                if self._needs_reals:
                    assert batch.reals is not None
                    with torch.no_grad():
                        real = self._judge(self._with_noise(batch.reals, "real", batch, step), batch.real_labels)
        parts: dict[str, Tensor] = {}
        matching = config.feature_matching
        loss = fake.logits.new_zeros(())
        if matching is None or matching.adversarial:
            real_logits = fake.logits if real is None else real.logits
            loss = check_loss(self.loss_name, self.adversarial.generator(real_logits, fake.logits))
        if matching is not None:
            assert real is not None
            real_features, fake_features = real.features[self._matched], fake.features[self._matched]
            parts["loss/feature_matching"] = feature_matching(real_features, fake_features, matching.distance)
            loss = loss + matching.weight * parts["loss/feature_matching"]
        with _frozen(discriminator):
            loss = self._add_terms(loss, parts, batch, fake._replace(samples=fakes), real)
        varied = scalars.diversity("generator/diversity", fakes)
        return self._with_history(loss, {"loss/generator": loss, **varied, **parts})


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
