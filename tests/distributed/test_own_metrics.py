"""Metrics and a detector of a stranger's in the one pass of an evaluation, on one rank and on several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distgan.config import parse_config
from distgan.data.index.loading import load_index
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.names import criterion
from distgan.evaluation.suite import evaluate
from tests.ranks import RankPool

PLUGINS = str(Path(__file__).parents[1] / "plugins")
METRICS = [{"metric": "lab.metrics:Sharpness", "power": 2}, "lab.metrics:Recall", "fid"]


def generate(numbers: Tensor) -> Tensor:
    """Image i is a function of i."""
    draws = [torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(int(number))) for number in numbers]
    return (255 * torch.stack(draws)).to(torch.uint8)


def measured(shards: str, cache: str, **evaluation: Any) -> dict[str, float]:
    if PLUGINS not in sys.path:
        sys.path.insert(0, PLUGINS)
    config = parse_config(
        {
            "run_dir": "r",
            "data": {"path": shards, "resolution": 16, "channels": 1},
            "training": {"steps": 1, "batch_size": 2},
            "evaluation": {
                "num_samples": 50, "batch_size": 8, "cache_dir": cache, "metrics": METRICS,
                "detector": {"detector": "lab.metrics:Means", "cells": 2}, **evaluation,
            },
        },
        trust=True,
    )  # fmt: skip
    first = criterion(config)
    if evaluation == {}:
        assert (first.name, first.higher_is_better) == ("Sharpness", True)
    return evaluate(generate, config, load_index(shards), Runtime())


def test_values_are_those_of_plain_torch_on_any_number_of_ranks(digits: Path, tmp_path: Path, ranks: RankPool) -> None:
    alone = measured(str(digits), str(tmp_path / "cache"))
    images = generate(torch.arange(50)).double()
    assert alone["Sharpness"] == pytest.approx(float((images[..., 1:] - images[..., :-1]).square().mean()))
    assert alone["Recall_samples[Means]"] == 50
    assert 0 <= alone["Recall_share[Means]"] <= 1
    assert alone["fid[Means]"] > 0
    for world_size in (2, 3):
        found = ranks.run(world_size, measured, str(digits), str(tmp_path / f"cache{world_size}"))
        for values in found:
            assert values == pytest.approx(alone, rel=1e-6)


def test_options_of_a_detector_are_told_apart_by_the_cache(digits: Path, tmp_path: Path) -> None:
    """The same weights, none, and other features: cached statistics of one are not those of the other."""
    cache = str(tmp_path / "cache")
    for cells in (2, 3, 2):
        found = measured(str(digits), cache, detector={"detector": "lab.metrics:Means", "cells": cells})
        alone = measured(
            str(digits), str(tmp_path / f"{cells}"), detector={"detector": "lab.metrics:Means", "cells": cells}
        )
        assert found == alone


@pytest.mark.parametrize(
    ("evaluation", "parts"),
    [
        ({"metrics": ["torch.nn:Identity"]}, ["evaluation.metrics", "torch.nn:Identity", "higher is better"]),
        ({"metrics": ["fid", "torch.nn:Identity"]}, ["torch.nn:Identity returned Identity", "torchmetrics.Metric"]),
        ({"metrics": ["fid", "fid"]}, ["evaluation.metrics", "fid is named twice"]),
        ({"detector": "lab.losses:Margin"}, ["evaluation.detector = lab.losses:Margin", "torch.nn.Module"]),
        ({"metrics": ["inception_score"]}, ["inception_score needs logits", "Means"]),
        ({"detector": "resnet"}, ["evaluation.detector", "'resnet' is not known", "classifier, inception"]),
    ],
)
def test_mistakes_are_one_line(digits: Path, tmp_path: Path, evaluation: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        measured(str(digits), str(tmp_path / "cache"), **evaluation)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)
