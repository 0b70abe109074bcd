"""Losses that a user's code computes: extra terms of a player's loss, what they see, and what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distgan.config import ObjectiveConfig
from distgan.errors import UserError


class TermView(NamedTuple):
    """What an extra term sees of one rank's part of a micro-batch. Samples, logits and features are float32."""

    latents: Tensor
    """(n, latent_size)"""
    labels: Tensor | None
    """(n,) int64: classes of the fakes; None if unconditional."""
    fakes: Tensor
    """(n, *sizes). In the generator's loss, gradients flow through them to the generator."""
    fake_logits: Tensor
    """(n,)"""
    fake_features: Tensor | None
    """The discriminator's last features; None without `needs_features`."""
    reals: Tensor | None
    """(n, *sizes). In the generator's loss these four are None without `needs_reals`."""
    real_labels: Tensor | None
    real_logits: Tensor | None
    real_features: Tensor | None
    judge: Callable[..., Tensor]
    """`judge(samples, labels)` returns the discriminator's float32 logits (n,), which can be differentiated twice."""
    normal: Callable[..., Tensor]
    """`normal("purpose", *shape)` draws N(0, 1) of shape (n, *shape), the same for any number of ranks."""
    uniform: Callable[..., Tensor]
    """`uniform("purpose", *shape)` draws U[0, 1) of shape (n, *shape)."""


class Term(NamedTuple):
    """An extra term of a player's loss."""

    name: str
    """Name of its scalar."""
    path: str
    weight: float
    compute: Callable[[TermView], Tensor]
    needs_features: bool


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
        if isinstance(compute, torch.nn.Module) and any((*compute.parameters(), *compute.buffers())):
            raise UserError(
                f"objective.terms.{number}: {term.term} has parameters or buffers, which would be neither trained nor "
                "saved; put them in the network"
            )
        label = f"{role}.{term.term.rpartition(':')[2]}"
        if any(other.name.endswith(label) for other in terms):
            label += f"_{number}"
        name = f"loss/{label}"
        terms.append(Term(name, term.term, term.weight, compute, term.facts.needs_features))
    return terms


def add_terms(terms: list[Term], loss: Tensor, parts: dict[str, Tensor], view: TermView) -> Tensor:
    """Return the loss plus the weighted terms, computed in full precision. Add the unweighted terms to `parts`."""
    with torch.autocast(loss.device.type, enabled=False):
        for term in terms:
            parts[term.name] = check_loss(term.path, term.compute(view))
            loss = loss + term.weight * parts[term.name]
    return loss


def check_loss(name: str, value: object) -> Tensor:
    """Return a loss that a user's code may have computed. Raises UserError unless it is one float number."""
    if not isinstance(value, Tensor) or value.shape != () or not value.is_floating_point():
        found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(
            f"{name}: returned {found}, expected a float tensor of shape (); return the mean over the batch",
            everywhere=True,
        )
    return value
