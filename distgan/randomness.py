"""Stateless random numbers: every draw is a pure function of (seed, purpose, position).

The generator is the counter-based Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2,
3", SC 2011). Seed and purpose give the key. The counter is the position and the block index within the draw of that
position. So any rank, data loader worker or resumed process gets the same numbers for the same sample, and checkpoints
store no generator state.

Integers and uniforms are the same on every device. `normal` uses float64 logarithms and cosines. Their last bit may
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
    """Return the 64-bit key of a stream: BLAKE2b of the seed and the purpose."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")


def branch_seed(seed: int, rollbacks: int) -> int:
    """Return the seed of what training draws after so many rollbacks of a run; without any, the seed itself.

    It is below 2^63, as the `seed` of a config is.
    """
    return derive_key(seed, f"rollback/{rollbacks}") >> 1 if rollbacks else seed


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply Philox4x32-10 to 128-bit counters.

    Args:
        counter: four int64 tensors of broadcastable shapes, the 32-bit words of the counters.
        key: 64-bit key.

    Returns:
        Four int64 tensors of the common shape, uniform 32-bit words.
    """
    # A round does the same to words 0 and 2, and to words 1 and 3. Stacking them halves the number of small kernels.
    even, odd = (
        torch.stack(torch.broadcast_tensors(counter[2], counter[0])),
        torch.stack(torch.broadcast_tensors(counter[1], counter[3])),
    )
    shape = (2, *(1,) * (even.dim() - 1))
    # Compute the constants on the device, because copying them from a list would block the host.
    multipliers = _pair(*_MULTIPLIERS[::-1], even.device)
    rounds = torch.arange(_ROUNDS, device=even.device)[:, None]
    keys = (_pair(key & _MASK, key >> 32, even.device) + rounds * _pair(*_WEYL, even.device)) & _MASK
    for round_keys in keys.view(_ROUNDS, *shape):
        # The product of two 32-bit words may overflow int64, but all its 64 bits are correct. The even words are stored
        # in the order (2, 0), which is the order in which the next odd words need the products.
        product = even * multipliers.view(shape)
        odd, even = product & _MASK, (((product >> 32) & _MASK) ^ odd ^ round_keys).flip(0)
    return even[1], odd[0], even[0], odd[1]


def _pair(first: int, second: int, device: torch.device) -> Tensor:
    return first + torch.arange(2, device=device) * (second - first)


def words(seed: int, purpose: str, positions: Tensor, count: int) -> Tensor:
    """Draw `count` uniform 32-bit words per position.

    Args:
        positions: int64, shape (n,), each >= 0. The draw of a position does not depend on the other positions.

    Returns:
        int64 in [0, 2^32), shape (n, count), on the device of `positions`.
    """
    place = positions[:, None]
    block = torch.arange(-(-count // 4), device=positions.device)[None]
    zero = torch.zeros_like(block)
    drawn = philox((block + zero, zero + 0, place & _MASK, (place >> 32) & _MASK), derive_key(seed, purpose))
    return torch.stack(torch.broadcast_tensors(*drawn), dim=-1).flatten(1)[:, :count]


def addresses(values: Tensor) -> Tensor:
    """Return positions for draws that shall be a function of what each row holds, such as a sample's latent.

    A position is the sum over the row of hashes of each number's float32 bits at its place in the row. Equal rows have
    equal positions; different ones share a position with a probability near 2^-63.

    Args:
        values: floats, shape (n, d), d at most 2^31.

    Returns:
        int64 in [0, 2^63), shape (n,), without a gradient.
    """
    bits = values.detach().float().contiguous().view(torch.int32).long() & _MASK
    place = torch.arange(bits.shape[1], device=bits.device)[None]
    low, high, *_ = philox((bits, place, place * 0, place * 0), derive_key(0, "addresses"))
    return (low.sum(1) & _MASK) | ((high.sum(1) & _MASK >> 1) << 32)


def uniform(seed: int, purpose: str, positions: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw from U[0, 1): float32 multiples of 2^-24, shape (n, *shape). `positions` is as in `words`."""
    drawn = words(seed, purpose, positions, math.prod(shape))
    return ((drawn >> 8).float() * 2.0**-24).view(positions.shape[0], *shape)


def normal(seed: int, purpose: str, positions: Tensor, shape: Sequence[int] = ()) -> Tensor:
    """Draw from N(0, 1) with the Box-Muller transform: float32, shape (n, *shape). `positions` is as in `words`."""
    count = math.prod(shape)
    pairs = (words(seed, purpose, positions, 2 * -(-count // 2)).double() + 0.5) * 2.0**-32
    radius = (-2 * pairs[:, 0::2].log()).sqrt()
    angle = 2 * math.pi * pairs[:, 1::2]
    drawn = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]
    return drawn.float().view(positions.shape[0], *shape)


def integers(seed: int, purpose: str, positions: Tensor, high: int, shape: Sequence[int] = ()) -> Tensor:
    """Draw uniform integers in [0, high): int64, shape (n, *shape). `positions` is as in `words`.

    Args:
        high: at most 2^31. The relative bias is below high * 2^-32.
    """
    drawn = words(seed, purpose, positions, math.prod(shape))
    return ((drawn * high) >> 32).view(positions.shape[0], *shape)
