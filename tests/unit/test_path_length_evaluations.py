"""Perceptual path length as a metric of evaluations, with random weights of VGG16; and refusals before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics import Metric

from distgan import randomness
from distgan.config import Config, GeneratorConfig, MetricConfig
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.detectors import vgg16
from distgan.evaluation.detectors.features import evaluation_folder
from distgan.evaluation.metrics import perceptual_path_length as ppl
from distgan.evaluation.names import value_name
from distgan.evaluation.suite import Evaluator
from distgan.inference.generation import SampleGenerator
from distgan.losses.lpips import load_lpips
from distgan.published_weights import PublishedFile
from distgan.training.setup import validate_evaluation
from tests.image_metrics import write_vgg16
from tests.labelled_shards import evaluation_config
from tests.unit.test_perceptual_path_length import INDEX, evaluated, stylegan2


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
