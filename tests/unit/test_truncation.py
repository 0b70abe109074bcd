"""Truncated latents: their distribution, and the batch-norm statistics of generators that draw them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from torch import Tensor

from distgan import randomness
from distgan.cli import main
from distgan.config import GeneratorConfig
from distgan.errors import UserError
from distgan.inference.evaluate import _value_name
from distgan.inference.export import load_generator
from distgan.inference.latents import LatentSource, truncate
from distgan.inference.sample import sample, sample_paths
from distgan.networks.layers.normalization import BatchNorm
from tests.unit.test_export import DESCRIPTION, write

NORMAL: dict[str, Any] = {
    **DESCRIPTION,
    "generator": {**DESCRIPTION["generator"], "latent_distribution": "normal"},
}


def drawn(count: int) -> Tensor:
    return randomness.normal(0, "test", torch.arange(count))


@pytest.mark.parametrize("threshold", [0.02, 0.5, 1.0, 2.0])
def test_truncated_latents_are_distributed_as_the_papers(threshold: float) -> None:
    """As if numbers beyond the threshold were drawn again, which is scipy's truncated normal distribution."""
    latents = truncate(drawn(20_000), threshold)
    assert stats.kstest(latents.numpy(), stats.truncnorm(-threshold, threshold).cdf).pvalue > 0.01
    again = np.random.default_rng(0).normal(size=2_000_000)
    again = again[np.abs(again) <= threshold][:20_000]
    assert stats.ks_2samp(latents.numpy(), again).pvalue > 0.01


def test_the_variance_at_a_threshold_of_one_by_hand() -> None:
    """1 - 2 phi(1) / (Phi(1) - Phi(-1)), with phi(1) = 0.24197 and Phi(1) - Phi(-1) = 0.68269."""
    assert truncate(drawn(200_000), 1.0).var().item() == pytest.approx(1 - 2 * 0.24197 / 0.68269, rel=0.01)


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=8), st.floats(1e-6, 100))
def test_no_number_is_beyond_the_threshold_or_changes_its_side(values: list[float], threshold: float) -> None:
    latents = torch.tensor(values)
    found = truncate(latents, threshold)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert (found.double().abs() <= threshold * (1 + 1e-7)).all()
    assert (found * latents >= 0).all()


def test_order_is_kept_and_a_large_threshold_changes_nothing() -> None:
    latents = drawn(10_000).sort().values
    for threshold in (0.1, 1.0, 3.0):
        assert (truncate(latents, threshold).diff() >= 0).all()
    torch.testing.assert_close(truncate(latents, 9.0), latents, rtol=1e-6, atol=1e-6)


def test_truncated_latents_are_addressed_and_labels_stay() -> None:
    config = GeneratorConfig(latent_size=3, latent_distribution="normal")
    plain, source = (LatentSource(config, 4, class_counts=[2, 3], truncation=t) for t in (None, 0.5))
    positions = torch.tensor([7, 2, 30])
    latents, labels = source.draw("samples", positions)
    assert torch.equal(latents, truncate(plain.draw("samples", positions)[0], 0.5))
    assert torch.equal(latents[1:], source.draw("samples", positions[1:])[0])
    assert torch.equal(labels, plain.draw("samples", positions)[1])


def test_a_generator_draws_what_it_was_loaded_for(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", NORMAL, weights_of=NORMAL)
    plain, truncated = load_generator(folder), load_generator(folder, truncation=0.5)
    assert plain.latents(9).abs().max() > 1
    assert torch.equal(truncated.latents(9), truncate(plain.latents(9), 0.5))
    assert torch.equal(plain.latents(9, truncation=0.5), truncated.latents(9))
    assert torch.equal(truncated.latents(9, truncation=0.1), plain.latents(9, truncation=0.1))
    assert torch.equal(truncated.latents(9, seed=3), truncate(plain.latents(9, seed=3), 0.5))


@contextmanager
def recorded(layer: torch.nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    yield seen
    handle.remove()


def test_batch_norm_has_the_statistics_of_truncated_latents(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", NORMAL, weights_of=NORMAL)
    plain, truncated = load_generator(folder), load_generator(folder, truncation=0.5)
    norms = [module for module in truncated.network.modules() if isinstance(module, BatchNorm)]
    first = next(module for module in plain.network.modules() if isinstance(module, BatchNorm))
    assert torch.equal(first.running_var, torch.ones_like(first.running_var)), "an export keeps its own"
    # What comes to the first norm does not depend on any; these are the 2,048 of the statistics.
    with recorded(norms[0]) as seen, torch.no_grad():
        truncated(*truncated.source(0, 0.5).draw("batch statistics", torch.arange(2048)))
    variance, mean = torch.var_mean(seen[0].double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(norms[0].running_mean.double(), mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(norms[0].running_var.double(), variance, rtol=1e-4, atol=1e-6)


def test_samples_and_paths_are_of_truncated_latents(tmp_path: Path) -> None:
    folder = write(tmp_path / "export", NORMAL, weights_of=NORMAL)
    generator = load_generator(folder, truncation=0.3)
    images = generator(generator.latents(2), torch.zeros(2, dtype=torch.int64))
    expected = ((images[:, 0] + 1) * 127.5).round().numpy()
    main(["sample", str(folder), "--truncation", "0.3", "--num", "2", "--labels", "a", "--out", str(tmp_path / "out")])
    for number in range(2):
        found = np.asarray(Image.open(tmp_path / "out" / f"{number:06d}.png"))
        assert np.abs(found - expected[number]).max() <= 1
    path = sample_paths(folder, tmp_path / "a.png", steps=2, number=1, labels=["a"], truncation=0.3)
    row = np.asarray(Image.open(path)).astype(float)
    assert np.abs(row[:, :16] - expected[0]).max() <= 1
    assert np.abs(row[:, -16:] - expected[1]).max() <= 1


@pytest.mark.parametrize("truncation", [0.0, -1.0, math.nan, math.inf])
def test_a_truncation_that_is_none(tmp_path: Path, truncation: float) -> None:
    folder = write(tmp_path / "export", NORMAL, weights_of=NORMAL)
    with pytest.raises(UserError, match=f"truncation = {truncation}: expected a number above 0"):
        sample(folder, tmp_path / "a.png", truncation=truncation)
    with pytest.raises(UserError, match=f"truncation = {truncation}: expected a number above 0"):
        load_generator(folder).latents(3, truncation=truncation)
    assert not (tmp_path / "a.png").exists()


def test_uniform_latents_have_no_truncation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "export")
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(folder), "--truncation", "0.5", "--out", str(tmp_path / "a.png")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "truncation = 0.5: is for latents of N(0, 1), found generator.latent_distribution = uniform" in said
    assert "Traceback" not in said


def test_names_of_values_say_that_they_are_truncated() -> None:
    names = ("fid[classifier]", "modes", "ngram_js[4]")
    assert [_value_name(name, None) for name in names] == [*names]
    assert [_value_name(name, 0.5) for name in names] == [
        "fid[classifier,truncation=0.5]", "modes[truncation=0.5]", "ngram_js[4,truncation=0.5]",
    ]  # fmt: skip
    assert _value_name("fid[inception]", 2) == "fid[inception,truncation=2.0]"
    assert _value_name("fid[inception]", 0.1234567) == "fid[inception,truncation=0.1234567]"
