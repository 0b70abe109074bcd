"""Objective of each player on one micro-batch, as one module with one forward.

A wrapper (DDP, DeepSpeed) sees one forward and one backward per micro-batch. Inside there may be several passes through
the network, gradient penalties with their own backward, and collectives of batch statistics. The other player's network
is referenced, not registered, so that a wrapper sees the parameters of one network.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.config import Config, GradientPenaltyConfig, ScheduleConfig, ZeroCenteredPenaltyConfig
from distgan.errors import UserError
from distgan.losses import gradient_penalties
from distgan.losses.adversarial import draw_targets, targeted_cross_entropy
from distgan.losses.augmentation.controller import AugmentationController
from distgan.losses.regularizers import feature_matching
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.moving import moving_buffers
from distgan.players import scalars
from distgan.players.alignment import LAYER, Alignment
from distgan.players.objective_base import LossAndScalars, Objective
from distgan.players.reconstruction import Reconstruction, generate
from distgan.players.samples import Inputs, Judged, MicroBatch, Pass, Side
from distgan.players.terms import Absent, check_loss

_LAYER_KEY = "objective.feature_matching.layer"


class DiscriminatorObjective(Objective):
    """Loss of the discriminator. A pass with a gradient penalty runs in float32 unless precision is by stage.

    Raises:
        UserError: the weights of `objective.alignment` are missing, or the discriminator has no projector for it.
    """

    role = "discriminator"

    def __init__(
        self,
        network: nn.Module,
        opponent: nn.Module,
        config: Config,
        autocast_dtype: torch.dtype | None,
        controller: AugmentationController | None = None,
    ) -> None:
        super().__init__(network, opponent, config, autocast_dtype, controller)
        self.alignment: Alignment | None = None
        self._moves = bool(moving_buffers(network))
        if (section := config.objective.alignment) is not None and section.weights is not None:
            self._watch(LAYER, "objective.alignment")
            self.alignment = Alignment(section, self.augmentation)

    def differentiates_twice(self, images: int, update: int) -> bool:
        r1, r2, gp = self._due(images, update)
        exact = any(penalty is not None and penalty.method == "exact" for penalty in (r1, r2))
        return exact or gp is not None or bool(self._terms_due(update))

    def forward(self, batch: MicroBatch, images: int, update: int) -> LossAndScalars:
        """Return the loss and the scalars.

        Args:
            images: images before this step, which schedules follow.
            update: discriminator updates before this one, which selects lazy penalties.
        """
        config = self.config
        assert batch.reals is not None
        labels = self._fake_labels(batch)
        with torch.no_grad(), self._autocast(batch.reals), reference_moments(self.opponent):
            generated, _ = generate(self.config, self.opponent, batch, labels)
        generated = generated.to(batch.reals.dtype)
        reals = self._with_noise(batch.reals, "real", batch, images)
        fakes = self._with_noise(generated, "fake", batch, images)
        r1, r2, gp = self._due(images, update)
        with ExitStack() as held:
            # A penalized pass needs normalization moments in its own precision.
            penalized = any(penalty is not None for penalty in (r1, r2, gp))
            with self._autocast(reals, penalized=penalized):
                held.enter_context(reference_moments(self.network))
            sides = Side("real", reals, batch.real_labels, r1), Side("fake", fakes, labels, r2)
            real, fake = self._judge_sides(sides, batch, images)
            loss = self._adversarial(real.logits, fake.logits, batch)
            parts = {"loss/discriminator": loss} | scalars.discriminator_scalars(
                self.loss_facts, real.logits, fake.logits
            )
            parts |= scalars.diversity("data/diversity", batch.reals)
            if self.augmentation is not None:
                probability = self.augmentation.probability(images)
                parts |= scalars.augmentation_scalars(self.loss_facts, real.logits, probability)
            for name, side, judged in (("loss/r1", sides[0], real), ("loss/r2", sides[1], fake)):
                if side.penalty is not None:
                    parts[name] = self._zero_centered(side, judged, images)
                    loss = loss + side.penalty.every * parts[name]
            if gp is not None:
                parts["loss/gradient_penalty"] = self._gradient_penalty(gp, real, fake, batch, images)
                loss = loss + gp.every * parts["loss/gradient_penalty"]
            if self.alignment is not None:
                parts["loss/alignment"] = self._aligned(self.alignment, real, batch, images)
                weight = schedule.value(self.alignment.weight, images, self.length)
                loss = loss + weight * parts["loss/alignment"]
            loss = self._add_terms(loss, parts, batch, images, generated, fake, real, update)
        if config.drift != 0:
            weight = schedule.value(config.drift, images, self.length)
            parts["loss/drift"] = weight * gradient_penalties.drift(real.logits)
            loss = loss + parts["loss/drift"]
        return self._with_history(loss, parts, images)

    def _due(
        self, images: int, update: int
    ) -> tuple[ZeroCenteredPenaltyConfig | None, ZeroCenteredPenaltyConfig | None, GradientPenaltyConfig | None]:
        """Return R1, R2 and the gradient penalty, or None for those that are not due or have a weight of 0 then."""
        r1, r2, gp = self.config.r1, self.config.r2, self.config.gradient_penalty

        def is_due(every: int, weight: float | ScheduleConfig) -> bool:
            # Not only for speed: 0 times an infinite penalty would not be 0.
            return update % every == 0 and schedule.value(weight, images, self.length) != 0

        return (
            r1 if r1 is not None and is_due(r1.every, r1.gamma) else None,
            r2 if r2 is not None and is_due(r2.every, r2.gamma) else None,
            gp if gp is not None and is_due(gp.every, gp.weight) else None,
        )

    def _adversarial(self, real_logits: Tensor, fake_logits: Tensor, batch: MicroBatch) -> Tensor:
        if self.config.label_smoothing is None:
            return check_loss(self.loss_path, self.adversarial.discriminator(real_logits, fake_logits))
        targets = draw_targets(self.config.label_smoothing, self._uniform("targets", batch, real_logits, 4))
        return targeted_cross_entropy(real_logits, fake_logits, *targets)

    def _judge_sides(self, sides: Sequence[Side], batch: MicroBatch, images: int) -> list[Judged]:
        """Run the discriminator on the sides, and on the ends of finite differences where some are due.

        All samples go through it in one pass, whose sharded weights are gathered once. With ends that is needed, so
        that a layer that changes in each pass, as spectral norm, is the same at both ends; without them such a
        discriminator has a pass for each side, as do exact penalties, whose derivatives would be of both sides, and a
        layer that the loss looks at, whose outputs need not have one row for each sample to be split by. A
        discriminator with batch statistics always has a pass for each part, because these are over samples of one kind.
        """
        inputs = [
            self._inputs(side.samples, side.labels, side.kind, batch, images, differentiable=side.is_exact)
            for side in sides
        ]
        ends = [self._ends(side, given, batch, images) for side, given in zip(sides, inputs, strict=True)]
        passes = [
            Pass(given.augmented, given.labels, side.penalty is not None, side.is_exact)
            for side, given in zip(sides, inputs, strict=True)
        ] + list(chain(*ends))
        apart = self._moves or bool(self.layers) or any(side.is_exact for side in sides)
        if not self.compares_batch and (any(ends) or not apart):
            logits, features = self._pass_together(passes)
        else:
            logits, features = zip(*(self._discriminate(*part) for part in passes), strict=True)
        rest = iter(logits[len(sides) :])
        return [
            Judged(given.samples, logits[place], features[place], tuple(islice(rest, len(ends[place]))))
            for place, given in enumerate(inputs)
        ]

    def _pass_together(self, passes: Sequence[Pass]) -> tuple[Sequence[Tensor], Sequence[dict[str, Tensor]]]:
        """Run the discriminator once on all parts. Return their logits and features."""
        sizes = [len(part.augmented) for part in passes]
        labels = [part.labels for part in passes if part.labels is not None]
        logits, features = self._discriminate(
            torch.cat([part.augmented for part in passes]),
            torch.cat(labels) if labels else None,
            any(part.penalized for part in passes),
            any(part.differentiable for part in passes),
        )
        for layer, found in features.items():
            if len(found) != sum(sizes):
                raise UserError(
                    f"{self.layers[layer]}: the layer {layer!r} has outputs of shape {tuple(found.shape)} for "
                    f"{sum(sizes)} samples, expected one row per sample; choose another layer",
                    everywhere=True,
                )
        parts = {layer: found.split(sizes) for layer, found in features.items()}
        return logits.split(sizes), [{layer: of[place] for layer, of in parts.items()} for place in range(len(sizes))]

    def _ends(self, side: Side, given: Inputs, batch: MicroBatch, images: int) -> list[Pass]:
        """Return the perturbed samples of a side: x + s n and, if antithetic, x - s n, for each direction n."""
        penalty = side.penalty
        if penalty is None or side.is_exact:
            return []
        few = batch._replace(addresses=batch.addresses[:: penalty.stride])
        points = given.samples.detach()[:: penalty.stride]
        labels = None if given.labels is None else given.labels[:: penalty.stride]
        augmented = self.augmentation is not None and self.augmentation.before_penalties
        ends = []
        for draw in range(penalty.draws):
            step = penalty.step(self.kind) * self._normal(f"finite differences of {side.kind}/{draw}", few, points)
            for end in (points + step, points - step) if penalty.antithetic else (points + step,):
                moved = end if augmented else self._augment(end, side.kind, few, images, points)
                ends.append(Pass(self._perturb_levels(moved, side.kind, few), labels, True, False))
        return ends

    def _aligned(self, alignment: Alignment, real: Judged, batch: MicroBatch, images: int) -> Tensor:
        """Return the alignment of the reals with their images, moved as the augmentation moved the reals."""
        assert batch.reals is not None
        inputs = alignment.inputs(batch)
        if self.augmentation is not None:
            draws = self._drawing("augmentation of real", batch, batch.reals)
            inputs = self.augmentation.follow(inputs, batch.reals.shape[2:], images, *draws)
        with self._autocast(inputs):
            tokens = alignment.teacher(inputs)
        return alignment.loss(real.features[LAYER], tokens, batch)

    def _zero_centered(self, side: Side, judged: Judged, images: int) -> Tensor:
        """Return R1 or R2 of a side whose penalty is due."""
        penalty, ends = side.penalty, judged.ends
        assert penalty is not None
        gamma = schedule.value(penalty.gamma, images, self.length)
        if side.is_exact:
            return gradient_penalties.zero_centered(judged.logits, judged.samples, gamma)
        step = penalty.step(self.kind)
        if penalty.antithetic:
            return gradient_penalties.finite_difference(torch.cat(ends[::2]), torch.cat(ends[1::2]), 2 * step, gamma)
        center = judged.logits[:: penalty.stride]
        return gradient_penalties.finite_difference(torch.cat(ends), center.repeat(len(ends)), step, gamma)

    def _gradient_penalty(
        self, penalty: GradientPenaltyConfig, real: Judged, fake: Judged, batch: MicroBatch, images: int
    ) -> Tensor:
        """Return the penalty at points between reals and fakes, or near reals."""
        reals, fakes = real.samples.detach(), fake.samples.detach()
        points = self._penalized_points(penalty.points, penalty.perturbation, reals, fakes, batch)
        kind = None if self.augmentation is not None and self.augmentation.before_penalties else "points"
        judged = self._judge(points, batch.real_labels, kind, batch, images, differentiable=True)
        weight = schedule.value(penalty.weight, images, self.length)
        return gradient_penalties.gradient_penalty(
            judged.logits, judged.samples, weight, penalty.target, one_sided=penalty.one_sided
        )

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
        self,
        network: nn.Module,
        opponent: nn.Module,
        config: Config,
        autocast_dtype: torch.dtype | None,
        controller: AugmentationController | None = None,
    ) -> None:
        super().__init__(network, opponent, config, autocast_dtype, controller)
        matching = config.objective.feature_matching
        self._matched = self._watch(matching.layer, _LAYER_KEY) if matching is not None else ""
        self._compares_reals = config.objective.generator_compares_reals
        self.reconstruction: Reconstruction | None = None
        if config.objective.reconstruction is not None:
            self.reconstruction = Reconstruction(network, config.objective.reconstruction, self.length)

    def differentiates_twice(self, images: int, update: int = 0) -> bool:
        # An adaptive weight takes gradients before the backward pass does.
        adaptive = self.config.reconstruction is not None and self.config.reconstruction.adaptive
        return adaptive or bool(self._terms_due(update))

    def frozen_opponent(self) -> AbstractContextManager[None]:
        return _frozen(self.opponent)

    def forward(self, batch: MicroBatch, images: int, update: int = 0) -> LossAndScalars:
        """Return the loss and the scalars. `batch` needs reals if `ObjectiveConfig.generator_needs_reals`.

        Args:
            images: images before this step, which schedules follow.
            update: generator updates before this one, which selects lazy terms.
        """
        config, discriminator, labels = self.config, self.opponent, self._fake_labels(batch)
        parts: dict[str, Tensor] = {}
        with self.frozen_opponent(), ExitStack() as held:
            with self._autocast(batch.latents):
                with reference_moments(self.network):
                    fakes, moments = generate(self.config, self.network, batch, labels)
                held.enter_context(reference_moments(discriminator))
                noisy, real = self._with_noise(fakes, "fake", batch, images), None
                fake = self._judge(noisy, labels, "fake", batch, images)
                if self._compares_reals:
                    assert batch.reals is not None
                    with torch.no_grad():
                        reals = self._with_noise(batch.reals, "real", batch, images)
                        real = self._judge(reals, batch.real_labels, "real", batch, images)
            matching = config.feature_matching
            loss = fake.logits.new_zeros(())
            if matching is None or matching.adversarial:
                real_logits: Any = Absent(f"{self.loss_path}: real", "needs_reals") if real is None else real.logits
                loss = check_loss(self.loss_path, self.adversarial.generator(real_logits, fake.logits))
            if matching is not None:
                assert real is not None
                real_features, fake_features = real.features[self._matched], fake.features[self._matched]
                parts["loss/feature_matching"] = feature_matching(real_features, fake_features, matching.distance)
                weight = schedule.value(matching.weight, images, self.length)
                loss = loss + weight * parts["loss/feature_matching"]
            if self.reconstruction is not None:
                assert moments is not None
                loss = self.reconstruction.add(loss, parts, batch.reals, fakes, moments, images)
            loss = self._add_terms(loss, parts, batch, images, fakes, fake, real, update)
        varied = scalars.diversity("generator/diversity", fakes)
        return self._with_history(loss, {"loss/generator": loss, **varied, **parts}, images)


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
