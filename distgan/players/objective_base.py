"""What both players' objectives share: a micro-batch, the discriminator's verdict on samples, and addressed noise."""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import Config
from distgan.distributed.collectives import at_least_float32
from distgan.errors import UserError, blaming
from distgan.losses.regularizers import HistoricalAverage, noise_sigma
from distgan.networks.hooks import captured, find_layer
from distgan.networks.shape import SampleShape
from distgan.players.terms import TermView, add_terms, build_loss, build_terms

LossAndScalars = tuple[Tensor, dict[str, Tensor]]


class Judged(NamedTuple):
    """Samples with what the discriminator makes of them."""

    samples: Tensor
    """(n, *sizes)"""
    logits: Tensor
    """(n,), at least float32."""
    features: dict[str, Tensor]
    """Outputs of the layers that the objective looks at, at least float32."""


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
        self.adversarial = build_loss(config.objective.adversarial)
        self.loss_facts = config.objective.adversarial.facts
        self.loss_path = config.objective.adversarial.path
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
        self,
        loss: Tensor,
        parts: dict[str, Tensor],
        batch: MicroBatch,
        samples: Tensor,
        fakes: Judged,
        reals: Judged | None,
        update: int,
    ) -> Tensor:
        """Add the extra terms to the loss, and their values to `parts`.

        Args:
            samples: the fakes without noise.
            update: number of earlier updates of this player, which selects lazy terms.
        """
        due = [term for term in self.terms if update % term.every == 0]
        if not due:
            return loss

        def judge(samples: Tensor, labels: Tensor | None = None) -> Tensor:
            return at_least_float32(self.discriminator.forward(samples, labels))

        def normal(purpose: str, *shape: int) -> Tensor:
            return self._normal(f"extra terms/{purpose}", batch, batch.latents.new_empty(0, *shape))

        def uniform(purpose: str, *shape: int) -> Tensor:
            return self._uniform(f"extra terms/{purpose}", batch, batch.latents, *shape)

        layer = self._feature_layer or ""
        view = TermView(
            network=self.network,
            latents=batch.latents,
            labels=self._fake_labels(batch),
            fakes=at_least_float32(samples),
            fake_logits=fakes.logits,
            fake_features=fakes.features.get(layer),
            reals=None if reals is None else batch.reals,
            real_labels=None if reals is None else batch.real_labels,
            real_logits=None if reals is None else reals.logits,
            real_features=None if reals is None else reals.features.get(layer),
            judge=judge,
            normal=normal,
            uniform=uniform,
        )
        return add_terms(due, loss, parts, view)

    def _with_history(self, loss: Tensor, parts: dict[str, Tensor]) -> LossAndScalars:
        """Add the historical-averaging term to the loss, and detach its parts from the graph."""
        if self.history is not None:
            distance = self.history.penalty()
            parts[f"loss/{self.role}_history"] = distance
            loss = loss + self.history_weight * distance
        return loss, {name: part.detach() for name, part in parts.items()}
