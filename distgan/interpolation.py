"""Paths between latent vectors. Images change smoothly along a path unless the generator has memorized the data.

Spherical: White, "Sampling Generative Networks", 2016, section 2.1, after Shoemake, SIGGRAPH 1985. A normal latent of
many dimensions lies near a sphere. The straight line between two such latents passes through vectors far shorter than
those of the training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Path = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps starts and ends (n, d) and fractions in [0, 1] to latents (n, s, d), in the dtype of the starts.

The fractions have the shape (s,), or (n, s) if those of each pair differ.
"""

_PARALLEL = 1e-6
"""Vectors whose angle has a smaller sine count as parallel."""


def lerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """The straight line, (1 - t) a + t b; shapes as in `Path`."""
    return torch.lerp(start[:, None].double(), end[:, None].double(), share.double()[..., None]).to(start.dtype)


def slerp(start: Tensor, end: Tensor, share: Tensor) -> Tensor:
    """(sin((1 - t) w) a + sin(t w) b) / sin w, w the angle between a and b; shapes as in `Path`.

    The ends are not normalized, so the length changes from one to the other. Between parallel or opposite vectors,
    where the shortest arc is not unique, the path is the straight line.
    """
    a, b, t = start[:, None].double(), end[:, None].double(), share.double()[..., None]
    lengths = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    angle = ((a * b).sum(-1, keepdim=True) / lengths).clamp(-1, 1).acos()
    sine = angle.sin()
    arc = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / sine
    return torch.where(sine > _PARALLEL, arc, torch.lerp(a, b, t)).to(start.dtype)


def latent_paths(
    latents: Tensor, labels: Tensor | None, steps: int, path: Path = slerp
) -> tuple[Tensor, Tensor | None]:
    """Interpolate in `steps` even steps from the first latent to the second, the third to the fourth, and so on.

    Args:
        latents: shape (2 p, d).
        labels: shape (2 p,), or None. A path keeps the label of its start.

    Returns:
        Shapes (p * steps, d) and (p * steps,): path by path.
    """
    share = torch.linspace(0, 1, steps, dtype=torch.float64, device=latents.device)
    between = path(latents[0::2], latents[1::2], share).flatten(0, 1)
    return between, labels[0::2].repeat_interleave(steps) if labels is not None else None
