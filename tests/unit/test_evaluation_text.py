"""n-gram divergences by hand, against scipy and against plain counting; and what they are measured on."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from distgan.config import Config, parse_config
from distgan.data.index.loading import load_index
from distgan.data.kinds.text import decode_lines
from distgan.data.packing.pack import pack
from distgan.distributed.runtime import Runtime
from distgan.evaluation.metrics.ngrams import (
    NgramDivergence,
    held_out_index,
    ngram_divergence,
    ngram_divergences,
    read_lines,
)
from distgan.evaluation.names import criterion
from distgan.evaluation.suite import Evaluator
from tests.shards import refusal


def lines(*texts: str) -> Tensor:
    return torch.tensor([[ord(character) for character in text] for text in texts])


def counted(first: Tensor, second: Tensor, order: int) -> float:
    """The same by a dictionary of tuples and scipy."""
    grams = [
        Counter(tuple(line[i : i + order]) for line in side.tolist() for i in range(len(line) - order + 1))
        for side in (first, second)
    ]
    keys = sorted(grams[0] | grams[1])
    masses = [[side[key] for key in keys] for side in grams]
    return float(jensenshannon(*masses, base=2) ** 2)


def test_equal_lines_are_0_apart_and_disjoint_ones_1_bit() -> None:
    some, other = lines("abcabc", "bbbbbb"), lines("xyzxyz", "zzzzzz")
    for order in (1, 2, 3, 4):
        assert ngram_divergence(some, some, order).item() == pytest.approx(0, abs=1e-15)
        assert ngram_divergence(some, some.flip(0), order).item() == pytest.approx(0, abs=1e-15)
        assert ngram_divergence(some, other, order).item() == pytest.approx(1, abs=1e-15)


def test_an_example_by_hand() -> None:
    """Of "aab" and "abb": P(a) = 2/3 against 1/3; pairs {aa, ab} against {ab, bb}, half each.

    n = 1: m = 1/2 each, JS = 1 - H(1/3) = 1 - (log2 3 - 2/3) bits. n = 2: m = (1/4, 1/2, 1/4), so that
    KL = 1/2 log2 2 + 1/2 log2 1 = 1/2 bit on both sides. n = 3: disjoint.
    """
    first, second = lines("aab"), lines("abb")
    assert ngram_divergence(first, second, 1).item() == pytest.approx(1 - (math.log2(3) - 2 / 3), rel=1e-12)
    assert ngram_divergence(first, second, 2).item() == pytest.approx(0.5, rel=1e-12)
    assert ngram_divergence(first, second, 3).item() == pytest.approx(1, rel=1e-12)


def test_windows_stay_within_a_line_and_count_the_padding() -> None:
    """ "ab" then "ba" has no "bb" nor "aa"; a padded line has the pair of its last letter and the padding."""
    assert ngram_divergence(lines("ab", "ba"), lines("ba", "ab"), 2).item() == pytest.approx(0, abs=1e-15)
    assert ngram_divergence(lines("ab", "ba"), lines("bb", "aa"), 2).item() == pytest.approx(1)
    assert 0 < ngram_divergence(lines("ab``"), lines("abab"), 1).item() < 1


@given(st.data())
def test_it_is_that_of_counted_tuples(data: st.DataObject) -> None:
    high = data.draw(st.sampled_from([2, 5, 2048]))
    length = data.draw(st.integers(4, 9))
    rows = [data.draw(st.integers(1, 6)) for _ in range(2)]
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    first, second = (torch.from_numpy(random.integers(0, high, (n, length))) for n in rows)
    first[0, 0] = high - 1
    for order in (1, 2, 3, 4):
        value = ngram_divergence(first, second, order).item()
        assert value == pytest.approx(counted(first, second, order), abs=1e-9)
        assert -1e-12 <= value <= 1 + 1e-12


def test_both_sides_have_equally_many_lines() -> None:
    some, more = lines("abcd", "bcda"), lines("abcd", "bcda", "xxxx", "yyyy")
    assert ngram_divergences(some, more).tolist() == pytest.approx([0] * 4, abs=1e-15)
    assert ngram_divergences(more, some).tolist() == pytest.approx([0] * 4, abs=1e-15)


def test_the_value_does_not_depend_on_how_lines_came_in() -> None:
    random = torch.Generator().manual_seed(0)
    reals, made = (torch.randint(0, 9, (count, 6), generator=random) for count in (20, 50))
    numbers = torch.arange(50)
    expected = ngram_divergences(made[:20], reals)
    for order in (numbers, numbers.flip(0), torch.randperm(50, generator=random)):
        metric = NgramDivergence(reals.int(), most=40)
        for batch in order.split(7):
            metric.update(made[batch], batch)
        assert torch.equal(metric.compute(), expected)


# On shards


def config(folder: Path, **evaluation: Any) -> Config:
    networks = {"architecture": "characters", "normalization": "none"}
    return parse_config(
        {
            "run_dir": "unused",
            "data": {"kind": "text", "path": str(folder), "length": 12},
            "generator": networks,
            "discriminator": networks,
            "training": {"steps": 1, "batch_size": 8},
            "evaluation": {"cache_dir": str(folder / "cache"), "num_samples": 150, "batch_size": 16, **evaluation},
        }
    )


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    random = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "under", "trees"]
    rows = [" ".join(random.choice(words, 4)) for _ in range(1200)]
    (folder / "a.txt").write_text("\n".join(rows))
    pack(folder / "a.txt", folder / "shards", held_out=0.25, shard_size=300, workers=1)
    return folder / "shards"


def test_lines_are_an_addressed_choice(text: Path) -> None:
    index = load_index(str(text))
    everything = read_lines(config(text), index, 10_000)
    some = read_lines(config(text), index, 100)
    assert (len(everything), len(some)) == (len(index), 100)
    assert everything.dtype == torch.int32
    assert torch.equal(read_lines(config(text), index, 100), some)
    rows = {tuple(row) for row in everything.tolist()}
    assert {tuple(row) for row in some.tolist()} <= rows
    assert some.tolist() != sorted(some.tolist())


def test_held_out_lines_are_numbered_as_the_training_ones(text: Path, tmp_path: Path) -> None:
    index = load_index(str(text))
    (tmp_path / "b.txt").write_text("zzz zzz\nthe cat\n")  # in whose own vocabulary z comes first
    pack(tmp_path / "b.txt", tmp_path / "other", shuffle=False, workers=1)
    held_out = held_out_index(config(text, held_out=str(tmp_path / "other")), index)
    found = read_lines(config(text), held_out, 10)
    assert index.vocabulary is not None
    assert set(decode_lines(found.numpy(), index.vocabulary)) == {"\ufffd\ufffd\ufffd \ufffd\ufffd\ufffd", "the cat"}


def test_a_generator_of_real_lines_is_as_far_as_the_baseline(text: Path) -> None:
    """Training lines in place of generated ones are near held-out ones; letters at random are far."""
    index = load_index(str(text))
    settings = config(text)
    evaluator = Evaluator(settings, index, Runtime())
    real = read_lines(settings, index, 10_000).long()
    values = evaluator(lambda numbers: real[numbers])
    assert list(values) == [f"ngram_js{kind}[{n}]" for kind in ("", "_baseline") for n in (1, 2, 3, 4)]
    assert criterion(settings).name == "ngram_js[4]"
    held_out = read_lines(settings, held_out_index(settings, index), 150)
    expected = ngram_divergences(real[:150], held_out)
    assert [values[f"ngram_js[{n}]"] for n in (1, 2, 3, 4)] == pytest.approx(expected.tolist(), rel=1e-12)
    for n in (1, 2, 3, 4):
        assert values[f"ngram_js[{n}]"] == pytest.approx(values[f"ngram_js_baseline[{n}]"], rel=0.5)
    random = torch.randint(0, len(index.vocabulary or ()), (150, 12), generator=torch.Generator().manual_seed(0))
    far = evaluator(lambda numbers: random[numbers])
    assert far["ngram_js[4]"] > 0.9 > 2 * values["ngram_js[4]"]
    assert far["ngram_js_baseline[4]"] == values["ngram_js_baseline[4]"]


def test_held_out_text_that_is_missing_or_wrong(text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("the cat\non a mat\n")
    pack(tmp_path / "b.txt", tmp_path / "other", workers=1)
    other = load_index(str(tmp_path / "other"))
    assert "pack the text with --held-out 0.1" in refusal(held_out_index, config(tmp_path / "other"), other)
    said = refusal(held_out_index, config(text, held_out=str(text)), load_index(str(text)))
    assert "evaluation.held_out" in said
    pack("builtin:ring", tmp_path / "ring", points=5, workers=1)
    settings = config(text, held_out=str(tmp_path / "ring"))
    assert "holds points" in refusal(held_out_index, settings, load_index(str(text)))
    settings = config(text, held_out=str(tmp_path / "nowhere"))
    assert "nowhere" in refusal(held_out_index, settings, load_index(str(text)))
