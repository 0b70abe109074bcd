"""Perceptual path length over several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distgan.config import GeneratorConfig
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.suite import Evaluator
from tests.image_metrics import write_vgg16
from tests.labelled_shards import evaluation_config
from tests.ranks import RankPool
from tests.unit.test_perceptual_path_length import INDEX, evaluated, stylegan2

PATHS = [{"metric": "ppl"}, {"metric": "ppl", "space": "z", "sampling": "full", "name": "arcs"}]


def measured(weights: str, cache: str, architecture: str, metrics: list[dict[str, Any]]) -> dict[str, float]:
    """Values of a generator with random weights, over 11 paths in batches of 3."""
    config, shape = stylegan2()
    if architecture == "dcgan":
        config = GeneratorConfig(architecture="dcgan", latent_size=8, width=8)
    metrics = [{**metric, "weights": weights} for metric in metrics]
    settings = evaluation_config("unused", Path(cache), num_samples=11, batch_size=7, metrics=metrics)
    with torch.no_grad():
        generator = evaluated(config, shape)
    return Evaluator(settings.model_copy(update={"generator": config}), INDEX, Runtime())(generator)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vgg16(tmp_path_factory.mktemp("weights") / "vgg16.safetensors")


@pytest.mark.parametrize(("architecture", "metrics"), [("stylegan2", PATHS), ("dcgan", PATHS[1:])])
def test_lengths_do_not_depend_on_the_ranks(
    architecture: str, metrics: list[dict[str, Any]], weights: str, tmp_path: Path, ranks: RankPool
) -> None:
    (expected,) = ranks.run(1, measured, weights, str(tmp_path), architecture, metrics)
    assert all(value > 0 for value in expected.values())
    for found in ranks.run(2, measured, weights, str(tmp_path), architecture, metrics):
        # Kernels round by the number of threads, which differs with that of ranks, and a step of 1e-4 magnifies it.
        assert found == pytest.approx(expected, rel=0, abs=1e-4)


def refused(weights: str, cache: str) -> str:
    with pytest.raises(UserError) as caught:
        measured(weights, cache, "dcgan", PATHS[:1])
    return str(caught.value)


def test_no_rank_waits_for_paths_that_a_generator_does_not_have(weights: str, tmp_path: Path, ranks: RankPool) -> None:
    for message in ranks.run(2, refused, weights, str(tmp_path)):
        assert "space = w needs a generator with a mapping network" in message
