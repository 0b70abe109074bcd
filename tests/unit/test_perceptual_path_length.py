"""Perceptual path length by hand, of linear generators, StyleGAN2 and DCGAN."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan import randomness
from distgan.config import GeneratorConfig
from distgan.distributed.runtime import Runtime
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.metrics import perceptual_path_length as ppl
from distgan.inference.generation import SampleGenerator
from distgan.inference.latents import LatentSource
from distgan.networks import build_generator
from distgan.networks.shape import SampleShape
from distgan.published_weights import PublishedFile, Weights
from tests.labelled_shards import evaluation_config

INDEX: Any = SimpleNamespace(fingerprint="unused", sources=())


class Styled(nn.Module):
    """Images (n, 1, 1, 2) that are a function of styles (n, 1, 2), which are the latents."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def styles(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        return latents[:, None]

    def synthesize(self, styles: Tensor, latents: Tensor) -> Tensor:
        return self.function(styles)[:, None]


class Drawn(NamedTuple):
    """Paths that all lead from one latent to another one."""

    network: nn.Module
    start: list[float]
    end: list[float]

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, None]:
        return torch.where(positions[:, None] % 2 == 0, torch.tensor(self.start), torch.tensor(self.end)), None


def squared_distance(images: Tensor, others: Tensor) -> Tensor:
    return (images - others).square().flatten(1).sum(1)


def context(tmp_path: Path) -> EvaluationContext:
    config = evaluation_config("unused", tmp_path, batch_size=6)
    generator = GeneratorConfig(architecture="stylegan2", latent_distribution="normal")
    return EvaluationContext(config.model_copy(update={"generator": generator}), INDEX, Runtime(), name="ppl")


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ppl.PerceptualPathLength]:
    """A metric with the squared L2 distance in place of LPIPS."""
    monkeypatch.setattr(ppl, "load_lpips", lambda _: squared_distance)
    monkeypatch.setattr(PublishedFile, "read", lambda *_: Weights({}, ""))
    return lambda **options: ppl.PerceptualPathLength(context(tmp_path), **options)


def test_squared_length_of_a_line_by_hand(metric: Callable[..., ppl.PerceptualPathLength]) -> None:
    """From (0, 0) to (3, 4): |epsilon (3, 4)|^2 / epsilon^2 = 25, anywhere on the line."""
    for sampling in ("end", "full"):
        measured = metric(sampling=sampling)
        measured.update(Drawn(Styled(nn.Identity()), [0.0, 0.0], [3.0, 4.0]), torch.arange(10))
        assert measured.compute().item() == pytest.approx(25, rel=1e-6 if sampling == "end" else 5e-3)


def test_places_on_a_line(metric: Callable[..., ppl.PerceptualPathLength]) -> None:
    """With images of squared styles on the way from 0 to 1, ((t + e)^2 - t^2)^2 / e^2 = (2 t + e)^2."""
    generator = Drawn(Styled(torch.square), [0.0, 0.0], [1.0, 0.0])
    places = randomness.uniform(0, "path length/share", torch.arange(300)).double().numpy()
    assert 0.3 < places.mean() < 0.7
    expected = np.sort((2 * places + 0.01) ** 2)[2:298]  # of the places 0 to 299, 2.99 and 296.01 are rounded outward
    for sampling, value in (("end", 1e-4), ("full", expected.mean())):
        measured = metric(sampling=sampling, epsilon=0.01)
        measured.update(generator, torch.arange(300))
        assert measured.compute().item() == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 100, 101, 102, 10_000, 50_000])
def test_outliers_do_not_count(count: int) -> None:
    values = np.random.default_rng(count).lognormal(size=count).round(2)
    low, high = np.percentile(values, 1, method="lower"), np.percentile(values, 99, method="higher")
    expected = values[(values >= low) & (values <= high)].mean()
    assert ppl.trimmed_mean(torch.from_numpy(values)).item() == pytest.approx(expected, rel=1e-12)


def test_outliers_by_hand() -> None:
    """The 1 % quantile of 101 values is the second lowest, the 99 % quantile the second highest."""
    values = torch.arange(101.0)
    values[[0, 100]] = torch.tensor([-1e9, 1e9])
    assert ppl.trimmed_mean(values[torch.randperm(101)]).item() == 50
    # Of 102 values, place 1.01 is rounded down and place 99.99 up.
    assert ppl.trimmed_mean(torch.cat((values, torch.tensor([2e9])))).item() == pytest.approx((99 * 50 + 1e9) / 100)
    values[3] = math.nan
    assert ppl.trimmed_mean(values).isnan()


def test_arcs_keep_the_length_of_their_start() -> None:
    """sin((1 - t) w) / sin w of the start, and sin(t w) / sin w of the end as long as the start."""
    halfway = ppl.arcs(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([0.5]).double())
    torch.testing.assert_close(halfway, torch.tensor([[math.sqrt(2), math.sqrt(2)]]))
    starts, ends = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    shares = [0.0, 1e-4, 0.3, 0.75, 1.0]
    found = ppl.arcs(starts, ends, torch.tensor(shares, dtype=torch.float64))
    for a, b, t, point in zip(starts.tolist(), ends.tolist(), shares, found.tolist(), strict=True):
        w = math.acos(sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))
        at_start = math.sin((1 - t) * w) / math.sin(w)
        at_end = math.sin(t * w) / math.sin(w) * math.hypot(*a) / math.hypot(*b)
        assert point == pytest.approx([at_start * x + at_end * y for x, y in zip(a, b, strict=True)], abs=1e-12)
    torch.testing.assert_close(ppl.arcs(starts, starts, torch.tensor(shares, dtype=torch.float64)), starts)


def stylegan2() -> tuple[GeneratorConfig, SampleShape]:
    options = {"width": 4, "max_width": 8, "style_size": 8, "mapping_layers": 2}
    config = GeneratorConfig(architecture="stylegan2", latent_size=8, latent_distribution="normal", **options)
    return config, SampleShape(resolution=16, channels=1, num_classes=3)


def evaluated(config: GeneratorConfig, shape: SampleShape) -> SampleGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_generator(config, shape).eval()
        for weights in network.parameters():
            if weights.ndim == 4:
                nn.init.kaiming_normal_(weights)  # DCGAN's own would make images that are nearly gray
    return SampleGenerator(network, shape, LatentSource(config, 0, class_counts=[3, 4, 5]), "evaluation")


@pytest.mark.parametrize("space", ["w", "z"])
@torch.no_grad()
def test_both_images_of_a_path_have_the_same_noise(space: str, metric: Callable[..., ppl.PerceptualPathLength]) -> None:
    """With equal styles of all samples, which truncation makes, only the noise tells images apart."""
    generator = evaluated(*stylegan2())
    network: Any = generator.network
    for layer in network.layers:
        layer.noise_strength.fill_(1.0)
    numbers = torch.arange(4)
    lengths = metric(space=space)._measure(generator, numbers)
    assert (lengths > 0).all()
    network.style_truncation = 0.0
    assert metric(space=space)._measure(generator, numbers).tolist() == [0, 0, 0, 0]
    starts, labels = generator.draw("path length", 2 * numbers)
    images = ppl.images_on_paths(network, space, starts, starts, labels, torch.zeros(4).double())
    assert not torch.isclose(images[0], images[1:]).all(dim=-1).any()


@torch.no_grad()
def test_paths_in_z_are_those_of_the_released_code() -> None:
    """Arcs between unit vectors, because the mapping network normalizes its latents; the label is that of the start."""
    generator = evaluated(*stylegan2())
    network: Any = generator.network
    (starts, labels), (ends, _) = (generator.draw("z", torch.arange(5) + first) for first in (0, 5))
    shares = torch.linspace(0, 1, 5).double()
    found = ppl.images_on_paths(network, "z", starts, ends, labels, shares)
    a, b = F.normalize(starts.double()), F.normalize(ends.double())
    d = (a * b).sum(1, keepdim=True)
    p = shares[:, None] * d.acos()
    latents = a * p.cos() + F.normalize(b - d * a) * p.sin()
    expected = network.synthesize(network.mapping(latents.float(), labels)[:, None].expand(-1, 8, -1), starts)
    torch.testing.assert_close(found, expected)
    again = ppl.images_on_paths(network, "w", starts, ends, labels, torch.cat((shares * 0, shares * 0 + 1)))
    torch.testing.assert_close(again[:5], network(starts, labels))
    styles = network.styles(ends, labels)
    torch.testing.assert_close(again[5:], network.synthesize(styles, starts))


def test_large_images_are_averaged_to_256_pixels(metric: Callable[..., ppl.PerceptualPathLength]) -> None:
    picture = torch.rand(1, 1, 512, 512, generator=torch.Generator().manual_seed(0))

    class Fixed(Styled):
        def synthesize(self, styles: Tensor, latents: Tensor) -> Tensor:
            return picture.expand(len(styles), -1, -1, -1)

    averaged = picture.view(1, 1, 256, 2, 256, 2).mean((3, 5))
    for crop, expected in ((False, averaged), (True, averaged[:, :, 96:224, 64:192])):
        seen = []
        measured = metric()
        measured.crop = crop
        measured.distance = lambda images, _, seen=seen: (seen.append(images), torch.zeros(len(images)))[1]
        measured.update(Drawn(Fixed(nn.Identity()), [0.0], [1.0]), torch.arange(1))
        torch.testing.assert_close(seen[0], expected.expand(3, -1, -1, -1))
