"""What both players' objectives share: the discriminator's verdict on samples, extra terms and addressed noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distgan import randomness, schedule
from distgan.config import Config, ScheduleConfig
from distgan.distributed.blocks import eager, is_compiled
from distgan.distributed.collectives import at_least_float32
from distgan.errors import UserError, blaming
from distgan.losses.augmentation.controller import AugmentationController
from distgan.losses.level_noise import add_level_noise
from distgan.losses.regularizers import HistoricalAverage
from distgan.networks.hooks import captured, find_layer
from distgan.networks.layers.virtual_batch_norm import uses_reference
from distgan.networks.progressive import GrowingNetwork
from distgan.players.augmentation import InputAugmentation
from distgan.players.samples import Inputs, Judged, MicroBatch
from distgan.players.terms import Absent, Term, TermView, add_terms, build_loss, build_terms

LossAndScalars = tuple[Tensor, dict[str, Tensor]]
Draw = Callable[..., Tensor]


class Objective(nn.Module):
    """Base class of both players' objectives.

    Raises:
        UserError: code that the objective names is not allowed or cannot be loaded, or the discriminator lacks a layer
            that a term needs.
    """

    role: str

    def __init__(
        self,
        network: nn.Module,
        opponent: nn.Module,
        config: Config,
        autocast_dtype: torch.dtype | None,
        controller: AugmentationController | None = None,
    ) -> None:
        """controller: holds the probability of the augmentation if that is adaptive; both players share it."""
        super().__init__()
        self.network = network
        self._opponent = (opponent,)
        self.config = config.objective
        self.seed, self.kind = config.seed, config.data.kind
        self.length = schedule.run_images(config)
        """Images of the whole run."""
        self.accumulation = config.training.accumulation
        """Micro-batches per update."""
        self.autocast_dtype = autocast_dtype
        self.compiles = config.training.compile
        self._watches_compiled = False
        """True if the loss looks at a layer inside compiled code."""
        self.by_stage = config.training.float32_below is not None
        """True if penalized passes autocast too, because the networks choose the precision by stage."""
        self.adversarial = build_loss(config.objective.adversarial)
        self.loss_facts = config.objective.adversarial.facts
        self.loss_path = config.objective.adversarial.path
        self.levels, self.channels = config.generator.facts.levels, config.data.channels
        self.compares_batch = bool(config.discriminator.facts.batch_statistics)
        """True if logits depend on other samples of their pass."""
        self.augmentation: InputAugmentation | None = None
        if config.objective.augmentation is not None:
            self.augmentation = InputAugmentation(config.objective.augmentation, controller, self.length)
        self.terms = build_terms(config.objective, self.role)
        self.layers: dict[str, str] = {}
        """Layers of the discriminator that the loss looks at, with the key that asks for each."""
        self._feature_layer: str | None = None
        if any(term.needs_features for term in self.terms):
            self._feature_layer = self._watch(None, "objective.terms")
        self.history_weight: float | ScheduleConfig = getattr(config.objective.historical_averaging, self.role)
        self.history: HistoricalAverage | None = None
        """Historical average of this player's parameters; None if its weight is 0."""
        if self.history_weight != 0:
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

    def _autocast(self, like: Tensor, *, penalized: bool = False) -> torch.autocast:
        """Return a context that runs networks in bf16 if the config asks for it. Losses and penalties stay float32.

        Take no gradient inside it: backward operations would be cast too, also those of float32 stages.

        Args:
            penalized: a gradient penalty is taken of the pass. It is float32 unless precision is by stage.
        """
        dtype = self.autocast_dtype
        enabled = dtype is not None and (self.by_stage or not penalized)
        return torch.autocast(like.device.type, dtype=dtype or torch.bfloat16, enabled=enabled)

    def _with_noise(self, samples: Tensor, kind: str, batch: MicroBatch, images: int) -> Tensor:
        """Add instance noise to the discriminator's inputs, if the config has any after `images` images."""
        noise = self.config.instance_noise
        sigma = schedule.value(noise.sigma, images, self.length) if noise is not None else 0.0
        return samples + sigma * self._normal(f"instance noise/{kind}", batch, samples) if sigma else samples

    def _normal(self, purpose: str, batch: MicroBatch, like: Tensor) -> Tensor:
        """Draw addressed N(0, 1) in the shape of `like`."""
        drawn = randomness.normal(self.seed, f"{self.role}/{purpose}", batch.addresses, like.shape[1:])
        return drawn.to(like.dtype)

    def _uniform(self, purpose: str, batch: MicroBatch, like: Tensor, *shape: int) -> Tensor:
        """Draw addressed U[0, 1) of shape (n, *shape)."""
        return randomness.uniform(self.seed, f"{self.role}/{purpose}", batch.addresses, shape).to(like.dtype)

    def _drawing(self, purpose: str, batch: MicroBatch, samples: Tensor) -> tuple[Draw, Draw]:
        """Return functions `draw(name, *shape)` of U[0, 1) and of N(0, 1), for purposes below this one.

        Numbers are float32, or float64 if the samples are.
        """
        like = at_least_float32(samples[:0])

        def uniform(name: str, *shape: int) -> Tensor:
            return self._uniform(f"{purpose}/{name}", batch, like, *shape)

        def normal(name: str, *shape: int) -> Tensor:
            return self._normal(f"{purpose}/{name}", batch, like.new_empty(0, *shape))

        return uniform, normal

    @property
    def whole_weights(self) -> str | None:
        """What of this player needs all weights of its network at once; None if nothing does."""
        if self.terms:
            return "objective.terms"
        if self.history is not None:
            return "objective.historical_averaging"
        if isinstance(self.network, GrowingNetwork):
            return "growth"
        return "virtual batch norm" if uses_reference(self.network) else None

    def differentiates_twice(self, *arguments: Any) -> bool:
        """Return True if an update takes second derivatives; `arguments` are those of `forward` after the batch."""
        return False

    def frozen_opponent(self) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of an update."""
        return nullcontext()

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
            found = find_layer(self.discriminator, layer)
        self._watches_compiled |= is_compiled(self.discriminator, found, self.compiles)
        self.layers[layer] = key
        return layer

    def _augment(
        self, samples: Tensor, kind: str, batch: MicroBatch, images: int, reference: Tensor | None = None
    ) -> Tensor:
        """Augment inputs of the discriminator, if the config has an augmentation.

        Args:
            samples: (k n, *sizes) for any k; all k share the draws of the batch.
            kind: purpose of the draws, so that reals and fakes have their own.
            images: images before this step, which the probability may follow.
            reference: samples of the same shape, of which statistics are taken; None for those given.
        """
        if self.augmentation is None:
            return samples
        # All levels of a sample share its draws, and the statistics of the last one.
        levels = samples.shape[1] // self.channels if self.levels > 1 else 1
        rows = samples if levels == 1 else torch.cat(samples.chunk(levels, dim=1))
        if levels > 1:
            last = (samples if reference is None else reference)[:, -self.channels :]
            reference = last.repeat(levels, 1, 1, 1)
        draws = self._drawing(f"augmentation of {kind}", _repeated(batch, rows), rows)
        augmented = self.augmentation(rows, images, *draws, reference)
        return augmented if levels == 1 else torch.cat(augmented.chunk(levels), dim=1)

    def _perturb_levels(self, samples: Tensor, kind: str | None, batch: MicroBatch) -> Tensor:
        """Add noise to the levels of samples, or to copies of samples that have none; see `losses.level_noise`."""
        if self.levels == 1:
            return samples
        each = samples.unflatten(1, (-1, self.channels)).expand(-1, self.levels, -1, -1, -1)
        return add_level_noise(each, self._normal(f"noise of {kind}", _repeated(batch, each), each)).flatten(1, 2)

    def _judge(
        self,
        samples: Tensor,
        labels: Tensor | None,
        kind: str | None,
        batch: MicroBatch,
        images: int,
        *,
        differentiable: bool = False,
    ) -> Judged:
        """Run the discriminator on augmented samples.

        Args:
            kind: purpose of the augmentation's draws; None for samples that are augmented already.
            images: images before this step.
            differentiable: the logits have second derivatives in the returned samples.
        """
        inputs = self._inputs(samples, labels, kind, batch, images, differentiable=differentiable)
        logits, features = self._discriminate(inputs.augmented, labels, differentiable, differentiable)
        return Judged(inputs.samples, logits, features)

    def _inputs(
        self,
        samples: Tensor,
        labels: Tensor | None,
        kind: str | None,
        batch: MicroBatch,
        images: int,
        *,
        differentiable: bool = False,
    ) -> Inputs:
        """Augment samples, as `_judge` does."""
        if differentiable:
            samples = samples.detach().requires_grad_(True)
        inputs = samples if kind is None else self._augment(samples, kind, batch, images)
        if self.augmentation is not None and self.augmentation.before_penalties:
            samples = inputs = inputs.detach().requires_grad_(True) if differentiable else inputs
        return Inputs(samples, self._perturb_levels(inputs, kind, batch), labels)

    def _discriminate(
        self, augmented: Tensor, labels: Tensor | None, penalized: bool, differentiable: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the discriminator on inputs (n, *sizes). Return logits (n,) and features, at least float32.

        Args:
            penalized: a gradient penalty is taken of the pass.
            differentiable: the logits have second derivatives.
        """
        with ExitStack() as held:
            held.enter_context(self._autocast(augmented, penalized=penalized))
            outputs = {}
            for layer, key in self.layers.items():
                held.enter_context(blaming(key))
                outputs[layer] = held.enter_context(captured(self.discriminator, layer))
            if differentiable:  # other kernels of attention have no second derivative
                held.enter_context(sdpa_kernel(SDPBackend.MATH))
            # Compiled code has no second derivative, and hooks do not see its layers.
            held.enter_context(eager(bool(self.compiles) and (differentiable or self._watches_compiled)))
            logits = self.discriminator(augmented, labels)
        features = {layer: at_least_float32(found[-1]) for layer, found in outputs.items()}
        return at_least_float32(logits), features

    def _terms_due(self, update: int) -> list[Term]:
        return [term for term in self.terms if update % term.every == 0]

    def _add_terms(
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        batch: MicroBatch,
        images: int,
        samples: Tensor,
        fakes: Judged,
        reals: Judged | None,
        update: int,
    ) -> Tensor:
        """Add the extra terms to the loss, and their values to `parts`.

        Args:
            images: images before this step, which schedules follow.
            samples: the fakes without noise.
            update: number of earlier updates of this player, which selects lazy terms.
        """
        due = self._terms_due(update)
        if not due:
            return loss

        def judge(samples: Tensor, labels: Tensor | None = None) -> Tensor:
            augmented = self._perturb_levels(self._augment(samples, "extra terms", batch, images), "extra terms", batch)
            # Other kernels of attention, and compiled code, have no second derivative.
            with sdpa_kernel(SDPBackend.MATH), eager(bool(self.compiles)):
                return at_least_float32(self.discriminator(augmented, labels))

        uniform, normal = self._drawing("extra terms", batch, batch.latents)
        layer = self._feature_layer or ""
        view = TermView(
            network=self.network,
            latents=batch.latents,
            labels=self._fake_labels(batch),
            fakes=at_least_float32(samples),
            fake_logits=fakes.logits,
            fake_features=_there(fakes.features.get(layer), "fake_features", "needs_features"),
            reals=_there(reals and batch.reals, "reals", "needs_reals"),
            real_labels=None if reals is None else batch.real_labels,
            real_logits=_there(reals and reals.logits, "real_logits", "needs_reals"),
            real_features=_there(reals and reals.features.get(layer), "real_features", "needs_reals, needs_features"),
            judge=judge,
            normal=normal,
            uniform=uniform,
        )
        weights = [schedule.value(term.weight, images, self.length) for term in due]
        return add_terms(due, weights, loss, parts, view)

    def _with_history(self, loss: Tensor, parts: dict[str, Tensor], images: int) -> LossAndScalars:
        """Add the historical-averaging term to the loss, and detach its parts from the graph."""
        if self.history is not None:
            distance = self.history.penalty()
            parts[f"loss/{self.role}_history"] = distance
            loss = loss + schedule.value(self.history_weight, images, self.length) * distance
        return loss, {name: part.detach() for name, part in parts.items()}


def _repeated(batch: MicroBatch, samples: Tensor) -> MicroBatch:
    """Return a batch whose addresses are repeated for k n samples of it. Raises UserError for another number."""
    repeats, rest = divmod(len(samples), len(batch.addresses))
    if rest:
        raise UserError(
            f"objective.terms: view.judge: found {len(samples)} samples of a micro-batch of {len(batch.addresses)}, "
            "expected a multiple, because objective.augmentation and noise of levels have draws for its samples; call "
            "it with whole batches",
            everywhere=True,
        )
    return batch._replace(addresses=batch.addresses.repeat(repeats))


def _there(found: Tensor | None, name: str, attribute: str) -> Any:
    return Absent(f"view.{name}", attribute) if found is None else found
