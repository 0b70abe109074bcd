"""Randomness that is addressed, not carried: every draw is a pure function of (seed, purpose, position).

A counter-based generator (Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011) is keyed by seed and purpose; its counter is the position and the place within that position's draw. So any
rank, worker or resumed process gets the same numbers for the same sample, and no generator state is ever saved.
Integer arithmetic is exact on every device; `normal` goes through float64 logarithms and cosines, whose last bit may
differ between devices before rounding to float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def derive_key(seed: int, purpose: str) -> int:
    """64-bit key of an independent stream: BLAKE2b of the seed and the purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of a 128-bit counter, given and returned as four broadcastable int64 tensors of 32-bit words."""
    # Words 0 and 2 are treated alike, and so are 1 and 3: stacked, they take half as many small operations.
    even, odd = (
        torch.stack(torch.broadcast_tensors(counter[2], counter[0])),
        torch.stack(torch.broadcast_tensors(counter[1], counter[3])),
    )
    shape = (2, *(1,) * (even.dim() - 1))
    # Constants that are computed on the device: to copy them there from a list, the host would wait for it.
    multipliers = _pair(*_MULTIPLIERS[::-1], even.device)
    rounds = torch.arange(_ROUNDS, device=even.device)[:, None]
    keys = (_pair(key & _MASK, key >> 32, even.device) + rounds * _pair(*_WEYL, even.device)) & _MASK
    for round_keys in keys.view(_ROUNDS, *shape):
        # The product of two 32-bit words wraps in int64, but its 64 bits are the right ones. Stored as (2, 0), the
        # even words are multiplied in the order in which the next odd words need them.
        product = even * multipliers.view(shape)
        odd, even = product & _MASK, (((product >> 32) & _MASK) ^ odd ^ round_keys).flip(0)
    return even[1], odd[0], even[0], odd[1]


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    return first + torch.arange(2, device=device) * (second - first)


def words(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """`count` uniform 32-bit words for each position, as int64 in [0, 2^32): shape (len(positions), count).

    Args:
        positions: int64, shape (n,), each >= 0; the draw of a position does not depend on the others.
    """
    place = positions[:, None]
    block = torch.arange(-(-count // 4), device=positions.device)[None]
    zero = torch.zeros_like(block)
    drawn = philox((block + zero, zero + 0, place & _MASK, (place >> 32) & _MASK), derive_key(seed, purpose))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).flatten(1)[:, :count]


def uniform(seed: int, purpose: str, positions: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """U[0, 1) in float32 (multiples of 2^-24), shape (n, *shape)."""
    drawn = words(seed, purpose, positions, math.prod(shape))
    return ((drawn >> 8).float() * 2.0**-24).view(len(positions), *shape)


def normal(seed: int, purpose: str, positions: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """N(0, 1) in float32, shape (n, *shape), by the Box-Muller transform of pairs of 32-bit uniforms in (0, 1)."""
    count = math.prod(shape)
    pairs = (words(seed, purpose, positions, 2 * -(-count // 2)).double() + 0.5) * 2.0**-32
    radius = (-2 * pairs[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * pairs[:, 1::2]
    drawn = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]
    return drawn.float().view(len(positions), *shape)


def integers(seed: int, purpose: str, positions: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Uniform integers in [0, high) for high <= 2^31, int64, shape (n, *shape); bias below high * 2^-32."""
    drawn = words(seed, purpose, positions, math.prod(shape))
    return ((drawn * high) >> 32).view(len(positions), *shape)
