from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distgan import randomness


def counter(*words: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([word], dtype=torch.int64) for word in words)


@pytest.mark.parametrize(
    ("words", "key", "expected"),
    [
        # Known answers published with Random123 (kat_vectors, philox4x32 with 10 rounds).
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0xA4093822 | 0x299F31D0 << 32,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(words: tuple[int, ...], key: int, expected: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in randomness.philox(counter(*words), key)) == expected


def test_words_are_uniform_in_every_bit() -> None:
    drawn = randomness.words(0, "test", torch.arange(4096), 16)
    assert drawn.min() >= 0
    assert drawn.max() < 2**32
    for bit in range(32):
        share = ((drawn >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(drawn.numel())


@given(st.integers(0, 2**62), st.integers(0, 2**50), st.integers(1, 9), st.integers(1, 40))
def test_a_draw_depends_on_its_own_position_only(seed: int, start: int, n: int, count: int) -> None:
    together = randomness.normal(seed, "z", torch.arange(start, start + n), (count,))
    alone = torch.cat([randomness.normal(seed, "z", torch.tensor([start + i]), (count,)) for i in range(n)])
    assert torch.equal(together, alone)


def test_seed_and_purpose_and_position_all_matter() -> None:
    draw = randomness.uniform(1, "a", torch.tensor([5]), (64,))
    for other in (
        randomness.uniform(2, "a", torch.tensor([5]), (64,)),
        randomness.uniform(1, "b", torch.tensor([5]), (64,)),
        randomness.uniform(1, "a", torch.tensor([6]), (64,)),
        randomness.uniform(1, "a", torch.tensor([5 + 2**32]), (64,)),
    ):
        assert (draw == other).float().mean() < 0.1


def test_distributions() -> None:
    scipy_stats = pytest.importorskip("scipy.stats")
    positions = torch.arange(2000)
    normal = randomness.normal(3, "n", positions, (51,)).double().numpy().ravel()
    uniform = randomness.uniform(3, "u", positions, (51,)).double().numpy().ravel()
    assert scipy_stats.kstest(normal, "norm").pvalue > 1e-3
    assert scipy_stats.kstest(uniform, "uniform").pvalue > 1e-3
    counts = np.bincount(randomness.integers(3, "i", positions, 7, (51,)).numpy().ravel(), minlength=7)
    assert scipy_stats.chisquare(counts).pvalue > 1e-3


def test_addresses_are_functions_of_the_row() -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    found = randomness.addresses(rows)
    assert found.dtype == torch.int64
    assert found.min() >= 0
    assert torch.equal(randomness.addresses(rows.flip(0).double()), found.flip(0))
    # By hand: sums of the first two words of Philox at (bits, place), of 32 and 31 bits.
    bits = rows[0].numpy().view(np.uint32)
    key = randomness.derive_key(0, "addresses")
    words = [randomness.philox(counter(int(word), place, 0, 0), key) for place, word in enumerate(bits)]
    low, high = (sum(int(word[part].item()) for word in words) for part in range(2))
    assert found[0].item() == low % 2**32 + high % 2**31 * 2**32


def test_addresses_tell_apart_what_hardly_differs() -> None:
    row = torch.zeros(1, 4)
    others = torch.eye(4) * 1.4e-45  # the least float32
    swapped = torch.tensor([[1.0, 2, 0, 0], [2, 1, 0, 0], [0, 1, 2, 0]])
    found = randomness.addresses(torch.cat((row, others, swapped)))
    assert len(set(found.tolist())) == 8
    many = randomness.addresses(torch.arange(4096.0)[:, None])
    for bit in range(63):  # 5 standard deviations
        assert ((many >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 64)
