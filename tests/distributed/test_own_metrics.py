"""Metrics and a detector of a stranger's in the one pass of an evaluation, on one rank and on several."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distgan.config import parse_config
from distgan.data.index.loading import load_index
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.names import criterion
from distgan.evaluation.samples import read_reals
from distgan.evaluation.suite import evaluate
from tests.ranks import RankPool

PLUGINS = str(Path(__file__).parents[1] / "plugins")
METRICS = [{"metric": "lab.metrics:Sharpness", "power": 2}, "lab.metrics:Recall", "fid"]


BROKEN = """
import torch
from torchmetrics import Metric

class Stateless(Metric):
    def update(self, images): self.total = images.sum()
    def compute(self): return self.total

class Text(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
    def update(self, images): pass
    def compute(self): return "many"

class Raises(Text):
    def update(self, images): 1 / 0

class InPlace(Text):
    higher_is_better = True
    takes = "features"
    def update(self, features): features.sub_(features.mean(0))

class Statistic(Text):
    def update(self, images): raise KeyError("b")

class Reals(Text):
    real_statistic = Statistic
    def __init__(self, reals): super().__init__()

class NoStatistic(Text):
    real_statistic = lambda context: {}
    def __init__(self, reals): super().__init__()
"""


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


def test_detectors_and_samples_of_their_own_on_any_number_of_ranks(
    digits: Path, tmp_path: Path, ranks: RankPool
) -> None:
    """Of three ranks the last has none of the two samples of Recall."""
    wide = {"detector": "lab.metrics:Means", "cells": 4}
    metrics = [
        "fid",
        {"metric": "lab.metrics:Recall", "samples": 2},
        {"metric": "kid", "detector": wide, "samples": 37},
    ]
    (alone,) = ranks.run(1, measured, str(digits), str(tmp_path / "1"), metrics=metrics)
    assert alone["Recall_samples[Means]"] == 2
    assert alone["fid[Means]"] == measured(str(digits), str(tmp_path / "1"), metrics=["fid"])["fid[Means]"]
    narrow = measured(str(digits), str(tmp_path / "1"), metrics=["kid"], num_samples=37)
    assert alone["kid[Means]"] != narrow["kid[Means]"]
    for world_size in (2, 3):
        for values in ranks.run(world_size, measured, str(digits), str(tmp_path / str(world_size)), metrics=metrics):
            assert values == pytest.approx(alone, rel=1e-6)


OWN_KID = {"metric": "distgan.evaluation.metrics.kid:KID", "name": "own-kid"}
OWN_FID = {"metric": "distgan.evaluation.metrics.frechet:FID", "name": "own-fid"}


def test_a_built_in_metric_is_one_that_anyone_could_have_written(digits: Path, tmp_path: Path) -> None:
    """Named by their import paths, distgan's own metrics and detector do the same, from the same cached files."""
    found = measured(
        str(digits),
        str(tmp_path),
        metrics=["fid", OWN_FID, "kid", OWN_KID, "inception_score"],
        detector="distgan.evaluation.detectors.configured:TrainedClassifier",
    )
    label = "[TrainedClassifier]"
    for name in ("fid", "kid", "kid_std"):
        assert found[f"own-{name}{label}"] == found[f"{name}{label}"]
    files = {path.name for path in tmp_path.rglob("real-*")}
    assert len(files) == 2
    own = measured(str(digits), str(tmp_path), metrics=["fid", "kid", "inception_score"], detector="classifier")
    assert {f"{name.partition('[')[0]}{label}": value for name, value in own.items()}.items() <= found.items()
    assert {path.name for path in tmp_path.rglob("real-*")} == files


PIXELS = [{"metric": "lab.metrics:PixelDistance"}, {"metric": "lab.metrics:PixelDistance", "bins": 2, "name": "halves"}]


def test_a_statistic_of_the_reals_of_ones_own(digits: Path, tmp_path: Path, ranks: RankPool) -> None:
    """Against numpy's histograms; one class twice, with other options, told apart by name and in the cache."""
    index = load_index(str(digits))
    config = parse_config({"run_dir": "r", "data": {"path": str(digits), "resolution": 16, "channels": 1},
                           "training": {"steps": 1, "batch_size": 2}})  # fmt: skip
    reals = torch.cat([part.samples for part in read_reals(config.data, index, torch.arange(len(index)).split(64))])
    expected = {}
    for name, bins in (("PixelDistance", 16), ("halves", 2)):
        shares = [np.histogram(part, bins, (0, 256))[0] / part.numel() for part in (generate(torch.arange(50)), reals)]
        expected[name] = float(abs(shares[0] - shares[1]).sum() / 2)
    assert expected["halves"] > 0.01
    for world_size in (1, 3):
        cache = tmp_path / str(world_size)
        for found in ranks.run(world_size, measured, str(digits), str(cache), metrics=PIXELS):
            assert found == pytest.approx(expected, rel=1e-12)
        assert len(list(cache.rglob("PixelShares-*"))) == 2


def test_more_ranks_than_samples(digits: Path, tmp_path: Path, ranks: RankPool) -> None:
    """The last rank has no sample, and its metrics no rows."""
    settings: dict[str, Any] = {"metrics": METRICS[:2], "num_samples": 2}
    alone = measured(str(digits), str(tmp_path), **settings)
    for found in ranks.run(3, measured, str(digits), str(tmp_path), **settings):
        assert found == pytest.approx(alone, rel=1e-12)


STATES = """
import torch
from torchmetrics import Metric, MeanMetric

class States(Metric):
    takes = ("samples", "numbers")
    def __init__(self):
        super().__init__()
        for name, reduction in (("least", "min"), ("most", "max"), ("ranks", None)):
            self.add_state(name, torch.tensor(7.0), dist_reduce_fx=reduction)
        self.add_state("loose", [], dist_reduce_fx=None)
        self.mean = MeanMetric()
    def update(self, images, numbers):
        self.least, self.most = torch.minimum(self.least, numbers.min()), torch.maximum(self.most, numbers.max())
        self.mean.update(numbers.float())
        self.loose.append(numbers)
    def compute(self):
        loose = torch.cat([*self.loose]).sort().values
        return {"least": self.least, "most": self.most, "mean": self.mean.compute(), "ranks": self.ranks.numel(),
                "all": torch.equal(loose, torch.arange(len(loose))) * len(loose)}
    def reset(self):
        super().reset()
        self.mean.reset()

class Ragged(Metric):
    takes = ("samples", "numbers")
    def __init__(self):
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")
    def update(self, images, numbers):
        self.rows.append(torch.zeros(2, 1 + int(numbers[0] > 8) * int(numbers[0] % 2)))  # on rank 1 alone
    def compute(self):
        return 0.0
"""


def measured_with(folder: str, shards: str, metric: str) -> dict[str, float] | str:
    sys.path.insert(0, folder)
    try:
        return measured(shards, f"{folder}/cache", metrics=["fid", metric])
    except UserError as error:
        return str(error)
    finally:
        sys.path.remove(folder)


def test_states_of_all_kinds_and_metrics_inside_a_metric(digits: Path, tmp_path: Path, ranks: RankPool) -> None:
    (tmp_path / "kinds_of_states.py").write_text(STATES)
    for world_size in (1, 2):
        for found in ranks.run(world_size, measured_with, str(tmp_path), str(digits), "kinds_of_states:States"):
            assert isinstance(found, dict)
            values = {name.removeprefix("States_"): value for name, value in found.items() if "States" in name}
            assert values == {"least": 0, "most": 49, "mean": 24.5, "ranks": world_size, "all": 50}
    for said in ranks.run(2, measured_with, str(tmp_path), str(digits), "kinds_of_states:Ragged"):
        assert "rank 1: Ragged: its state rows cannot be concatenated" in said


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
        ({"metrics": ["fid", "fid"]}, ["evaluation.metrics", "fid[Means] is named twice"]),
        ({"metrics": ["fid", METRICS[0], "lab.metrics:Sharpness"]}, ["Sharpness is named twice", "name: Sharpness-2}"]),
        (
            {"metrics": ["fid", {"metric": "kid", "name": "a/b"}]},
            ["evaluation.metrics.1.name: 'a/b' cannot name a value"],
        ),
        ({"metrics": ["fid", {"metric": "kid", "name": "step"}]}, ["metrics.jsonl has another 'step'"]),
        (
            {"metrics": ["lab.metrics:Recall", {"metric": "fid", "name": "Recall_share"}]},
            ["two values are named Recall_share[Means]", "name:"],
        ),
        ({"metrics": ["fid", "broken:Raises"]}, ["broken:Raises: update failed: ZeroDivisionError", "broken.py:"]),
        ({"metrics": ["fid", "broken:Stateless"]}, ["broken:Stateless has no state", "add_state"]),
        ({"metrics": ["fid", "broken:Text"]}, ["broken:Text: compute returned str, expected a number"]),
        ({"metrics": ["fid", "broken:Reals"]}, ["broken:Reals: update of its real_statistic failed: KeyError"]),
        ({"metrics": ["broken:InPlace", "fid"]}, ["broken:InPlace: update changes its input in place", "clone it"]),
        ({"metrics": ["fid", "broken:NoStatistic"]}, ["real_statistic made dict, expected a torchmetrics.Metric"]),
        ({"detector": "lab.losses:Margin"}, ["detector lab.losses:Margin", "torch.nn.Module"]),
        ({"metrics": ["inception_score"]}, ["inception_score needs logits", "Means"]),
        ({"detector": "resnet"}, ["evaluation.detector", "'resnet' is not known", "inception"]),
    ],
)
def test_mistakes_are_one_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: dict[str, Any], parts: list[str]
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    with pytest.raises(UserError) as caught:
        measured(str(digits), str(tmp_path / "cache"), **evaluation)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


WIDENED = """
import torch
from torchmetrics import Metric

class Widened(Metric):
    def __init__(self):
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
    def update(self, images): self.total = self.total + images.double().mean((0, 1, 3))
    def compute(self): return self.total.sum()
"""


def widened(folder: str, shards: str, cache: str) -> str:
    sys.path.insert(0, folder)
    try:
        measured(shards, cache, metrics=["fid", "widened:Widened"], num_samples=2)
    except UserError as error:
        return str(error)
    return ""


def test_a_sum_that_changes_its_shape_is_refused_on_all_ranks(digits: Path, tmp_path: Path, ranks: RankPool) -> None:
    """The third rank has no sample, and so the default state."""
    (tmp_path / "widened.py").write_text(WIDENED)
    found = ranks.run(3, widened, str(tmp_path), str(digits), str(tmp_path / "cache"))
    assert all("Widened: its state total" in said and "in place" in said for said in found), found
