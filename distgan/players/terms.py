"""Extra terms of a player's loss: what they see, and what they and a user's adversarial loss return."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distgan.config import AdversarialConfig, ObjectiveConfig, ScheduleConfig
from distgan.errors import UserError
from distgan.losses.adversarial import AdversarialLoss


class TermView(NamedTuple):
    """What an extra term sees of one rank's part of a micro-batch. Samples, logits and features are float32."""

    network: nn.Module
    """The player's network. Its weights are float32 and whole; its methods can be differentiated twice."""
    latents: Tensor
    """(n, latent_size)"""
    labels: Tensor | None
    """(n,) int64: classes of the fakes; None if unconditional."""
    fakes: Tensor
    """(n, *sizes), without instance noise and augmentation. In the generator's loss, gradients flow through them to the
    generator."""
    fake_logits: Tensor
    """(n,): of the fakes with instance noise and augmented, if the config says so."""
    fake_features: Tensor
    """The discriminator's last features of the same samples. Using them without `needs_features` raises UserError."""
    reals: Tensor
    """(n, *sizes), without instance noise and augmentation. Using them or what follows in the generator's loss without
    `needs_reals` raises UserError."""
    real_labels: Tensor | None
    """(n,) int64: classes of the reals; None if unconditional or without reals."""
    real_logits: Tensor
    """(n,): of the reals with instance noise and augmented."""
    real_features: Tensor
    """Their features, as `fake_features`."""
    judge: Callable[..., Tensor]
    """`judge(samples, labels)` returns the discriminator's float32 logits (n,), which can be differentiated twice. It
    augments the samples, if the config says so, with the same draws in each call."""
    normal: Callable[..., Tensor]
    """`normal("purpose", *shape)` draws N(0, 1) of shape (n, *shape), the same for any number of ranks."""
    uniform: Callable[..., Tensor]
    """`uniform("purpose", *shape)` draws U[0, 1) of shape (n, *shape)."""


class Term(NamedTuple):
    """An extra term of a player's loss."""

    name: str
    """Name of its scalar."""
    path: str
    weight: float | ScheduleConfig
    every: int
    """Interval in updates of the player."""
    compute: Callable[[TermView], Tensor]
    needs_features: bool


class Absent:
    """Stands for a tensor that a loss or term did not ask for. Any use raises UserError, which names the attribute."""

    def __init__(self, what: str, attribute: str) -> None:
        self._error = UserError(
            f"{what}: is not there, because the class does not ask for it; set {attribute} = True in the class",
            everywhere=True,
        )

    def __getattr__(self, name: str) -> Any:
        raise self.__dict__["_error"]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: tuple[Any, ...] = (), named: Any = None) -> Any:
        absent = (value for value in (*given, *(named or {}).values()) if isinstance(value, cls))
        raise next(absent, cls("a tensor", "needs_reals"))._error

    def _refuse(self, *_: Any) -> Any:
        raise self._error

    __len__ = __iter__ = __getitem__ = __bool__ = __neg__ = __abs__ = __pow__ = __matmul__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __pos__ = __invert__ = __rpow__ = __floordiv__ = __rmatmul__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse


def build_loss(config: AdversarialConfig) -> AdversarialLoss:
    """Return the adversarial loss.

    Raises:
        UserError: its code is not allowed or cannot be loaded, or it lacks a method or holds state.
    """
    loss = config.build()
    for method in ("discriminator", "generator"):
        if not callable(getattr(loss, method, None)):
            raise UserError(f"objective.adversarial: {config.family} has no method {method}(real, fake); write one")
    check_stateless(f"objective.adversarial: {config.family}", loss)
    return loss  # type: ignore[no-any-return]


def check_stateless(name: str, thing: object) -> None:
    """Raise UserError for parameters or buffers, of which neither optimizer nor checkpoint would know."""
    held = isinstance(thing, nn.Module) and next(chain(thing.parameters(), thing.buffers()), None) is not None
    if held:
        raise UserError(
            f"{name} has parameters or buffers, which would be neither trained nor saved; put them in the network"
        )


def build_terms(config: ObjectiveConfig, role: str) -> list[Term]:
    """Return the extra terms of a player's loss.

    Raises:
        UserError: a term's code is not allowed or cannot be loaded, or a term is no stateless callable.
    """
    terms: list[Term] = []
    for number, term in enumerate(config.terms):
        if term.player != role:
            continue
        compute = term.build()
        if not callable(compute):
            raise UserError(f"objective.terms.{number}: {term.term} returned no callable; give it a __call__(view)")
        check_stateless(f"objective.terms.{number}: {term.term}", compute)
        label = f"{role}.{term.term.rpartition(':')[2]}"
        if any(other.name.endswith(label) for other in terms):
            label += f"_{number}"
        name = f"loss/{label}"
        terms.append(Term(name, term.term, term.weight, term.every, compute, term.facts.needs_features))
    return terms


def add_terms(
    terms: list[Term], weights: list[float], loss: Tensor, parts: dict[str, Tensor], view: TermView
) -> Tensor:
    """Return the loss plus the weighted terms, computed in full precision. Add the unweighted terms to `parts`.

    Args:
        weights: values of the terms' weights now.
    """
    with torch.autocast(loss.device.type, enabled=False):
        for term, weight in zip(terms, weights, strict=True):
            parts[term.name] = check_loss(term.path, term.compute(view), trains=False)
            loss = loss + weight * term.every * parts[term.name]
    return loss


def check_loss(name: str, value: object, *, trains: bool = True) -> Tensor:
    """Return a loss that a user's code may have computed.

    Args:
        trains: the loss needs a gradient.

    Raises:
        UserError: it is not one float number, or has no gradient.
    """
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{name}: returned {found}, expected a float tensor of shape (); return the mean over the batch",
            everywhere=True,
        )
    if trains and torch.is_grad_enabled() and not value.requires_grad:
        raise UserError(
            f"{name}: returned a loss without a gradient; compute it from all logits it gets, and do not detach them",
            everywhere=True,
        )
    return value
