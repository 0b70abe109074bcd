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
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import Metric

from distgan import randomness
from distgan.config import Config, GeneratorConfig, MetricConfig
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors import vgg16
from distgan.evaluation.detectors.features import evaluation_folder
from distgan.evaluation.metrics import perceptual_path_length as ppl
from distgan.evaluation.names import value_name
from distgan.evaluation.suite import Evaluator
from distgan.inference.generation import SampleGenerator
from distgan.inference.latents import LatentSource
from distgan.losses.lpips import load_lpips
from distgan.networks import build_generator
from distgan.networks.shape import SampleShape
from distgan.published_weights import PublishedFile, Weights
from distgan.training.setup import validate_evaluation
from tests.image_metrics import write_vgg16
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


def evaluation(tmp_path: Path, config: GeneratorConfig, **options: Any) -> Config:
    weights = write_vgg16(tmp_path / "vgg16.safetensors")
    made = evaluation_config(
        "unused", tmp_path, num_samples=7, batch_size=4, metrics=[{"metric": "ppl", "weights": weights, **options}]
    )
    return made.model_copy(update={"generator": config})


class WithoutSamples(SampleGenerator):
    def __call__(self, positions: Tensor) -> Tensor:
        pytest.fail("makes samples that no metric takes")


@pytest.mark.parametrize(
    ("architecture", "options", "name"),
    [("stylegan2", {}, "w,end"), ("dcgan", {"space": "z", "sampling": "full"}, "z,full")],
)
@torch.no_grad()
def test_an_evaluation_measures_paths(
    architecture: str, options: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, shape = stylegan2()
    if architecture == "dcgan":
        config = GeneratorConfig(architecture="dcgan", latent_size=8, width=8)
    settings = evaluation(tmp_path, config, **options)
    generator = evaluated(config, shape)
    found = Evaluator(settings, INDEX, Runtime())(WithoutSamples(*vars(generator).values()))
    assert list(found) == [f"ppl[vgg16,{name}]"]
    distance = load_lpips(load_file(tmp_path / "vgg16.safetensors"))
    lengths = []
    for number in range(7):
        (start, label), (end, _) = (generator.draw("path length", torch.tensor([2 * number + i])) for i in (0, 1))
        share = (
            torch.zeros(1) if name == "w,end" else randomness.uniform(0, "path length/share", torch.tensor([number]))
        )
        one, other = (
            ppl.images_on_paths(generator.network, name[0], start, end, label, share.double() + step)
            for step in (0, 1e-4)
        )
        lengths.append(distance(one, other).double() / 1e-8)
    assert found[f"ppl[vgg16,{name}]"] == pytest.approx(ppl.trimmed_mean(torch.cat(lengths)).item(), rel=1e-3)


class Counted(Metric):
    """Number of samples that it gets, of a user's."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.count: Tensor

    def update(self, samples: Tensor) -> None:
        self.count += len(samples)

    def compute(self) -> Tensor:
        return self.count


@torch.no_grad()
def test_samples_are_made_while_another_metric_takes_them(tmp_path: Path) -> None:
    config, shape = stylegan2()
    settings = evaluation(tmp_path, config)
    (paths,) = settings.metrics
    counted = MetricConfig(metric=f"{__name__}:Counted", samples=3)
    both = settings.evaluation.model_copy(update={"metrics": [paths, counted]})
    generator = evaluated(config, shape)
    asked: list[int] = []

    class Asked(SampleGenerator):
        def __call__(self, positions: Tensor) -> Tensor:
            asked.extend(positions.tolist())
            return super().__call__(positions)

    evaluator = Evaluator(settings.model_copy(update={"evaluation": both}), INDEX, Runtime())
    found = evaluator(Asked(*vars(generator).values()))
    assert asked == [0, 1, 2, 3]  # the first batch of two
    alone = Evaluator(settings, INDEX, Runtime())(generator)
    assert found == {**alone, "Counted": 3}


@torch.no_grad()
def test_weights_are_downloaded_once_for_lpips_and_the_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the cache folder of evaluations, where the detector `vgg16` looks too."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    config, shape = stylegan2()
    with_weights = evaluation(tmp_path, config)
    expected = Evaluator(with_weights, INDEX, Runtime())(evaluated(config, shape))
    calls: list[str] = []

    def fetch(file: PublishedFile, to: Path) -> None:
        calls.append(file.address)
        torch.save(load_file(tmp_path / "vgg16.safetensors"), to)

    monkeypatch.setattr(PublishedFile, "_fetch", fetch)
    without = evaluation(tmp_path, config, weights=None)
    for _ in range(2):
        assert Evaluator(without, INDEX, Runtime())(evaluated(config, shape)) == expected
    assert calls == ["https://download.pytorch.org/models/vgg16-397923af.pth"]
    file = vgg16.PUBLISHED.path(None, evaluation_folder(without.evaluation))
    assert file.is_file()
    assert file.name == "vgg16-397923af.pth"


def refusal(config: Config) -> str:
    due = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 1})})
    with pytest.raises(UserError) as caught:
        validate_evaluation(due, INDEX)
    with pytest.raises(UserError) as late:
        Evaluator(config, INDEX, Runtime())
    assert str(caught.value) == str(late.value)
    return str(caught.value)


def test_refusals_come_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dcgan = evaluation(tmp_path, GeneratorConfig(architecture="dcgan"))
    assert refusal(dcgan).startswith(
        "ppl[vgg16,w,end]: space = w needs a generator with a mapping network; dcgan has no"
    )
    assert "set space: z" in refusal(dcgan)
    styled = evaluation(tmp_path, stylegan2()[0], crop=True)
    assert "data.resolution = 16: VGG16 needs 16 pixels per side after cropping" in refusal(styled)
    missing = evaluation(tmp_path, stylegan2()[0], weights="none.pth")
    assert "ppl[vgg16,w,end]: weights = none.pth: no such file" in refusal(missing)
    with pytest.raises(UserError, match="a generator with a mapping network; Linear has no method styles"):
        ppl.images_on_paths(nn.Linear(1, 1), "w", *(torch.zeros(1, 1),) * 2, None, torch.zeros(1))


class Demanding(Counted):
    """A user's metric that needs so many real samples."""

    def __init__(self, *, least: int) -> None:
        super().__init__()

    @staticmethod
    def validate(index: Any, name: str, least: int) -> None:
        if len(index.sources) < least:
            raise UserError(f"{name}: found {len(index.sources)}, expected {least}")
        raise KeyError("a mistake in the code")


def test_a_metric_of_a_user_refuses_a_run_before_the_training(tmp_path: Path) -> None:
    for least, said in ((1, "^mine: found 0, expected 1$"), (0, "Demanding: validate failed: KeyError: 'a mistake in")):
        config = evaluation_config("unused", tmp_path)
        metrics = [MetricConfig(metric=f"{__name__}:Demanding", name="mine", least=least)]
        due, never = (
            config.model_copy(
                update={"evaluation": config.evaluation.model_copy(update={"metrics": metrics, "every": every})}
            )
            for every in (1, 0)
        )
        with pytest.raises(UserError, match=said):
            validate_evaluation(due, INDEX)
        validate_evaluation(never, INDEX)


def test_names_tell_what_is_measured() -> None:
    for options, name in (
        ({}, "ppl[vgg16,w,end]"),
        ({"space": "z", "sampling": "full", "crop": True}, "ppl[vgg16,z,full,crop]"),
        ({"metric": "ppl2_wend"}, "ppl2_wend[vgg16,w,end]"),
        ({"epsilon": 1e-3, "name": "mine"}, "mine[vgg16,w,end,epsilon=0.001]"),
    ):
        assert value_name(MetricConfig(**{"metric": "ppl", **options})) == name
