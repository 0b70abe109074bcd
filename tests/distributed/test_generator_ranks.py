"""A trained generator with batch norm, loaded and evaluated by the ranks of a job."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml

import distgan
from distgan.data.packing.pack import pack
from distgan.inference.export import export
from distgan.training.monitor import Monitor
from tests.ranks import RankPool


def train(config: Path, *overrides: str) -> str:
    return distgan.train(distgan.load_config(config, overrides)).outcome


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, ranks: RankPool) -> Path:
    """The folder of a finished run on points, whose generator has batch norm."""
    folder = tmp_path_factory.mktemp("points")
    pack("builtin:ring", folder / "shards", points=200, workers=1)
    network = {"architecture": "mlp", "width": 8, "depth": 1}
    values = {
        "run_dir": str(folder / "run"),
        "data": {"kind": "points", "path": str(folder / "shards"), "num_workers": 0},
        "generator": {**network, "latent_size": 4},
        "discriminator": {**network, "normalization": "none"},
        "training": {"steps": 2, "batch_size": 16},
        "ema": {"statistics_samples": 64},
        "monitoring": {"tensorboard": False},
        "evaluation": {"num_samples": 64, "batch_size": 16, "cache_dir": str(folder / "cache")},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert ranks.run(2, train, folder / "recipe.yaml") == ["finished"] * 2
    return folder / "run"


def statistics(run: Path) -> dict[str, torch.Tensor]:
    return batch_statistics(distgan.load_generator(run).network)


def batch_statistics(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = network.state_dict()
    return {name: value for name, value in state.items() if "running_" in name}


def statistics_in_training(config: Path, folder: Path) -> dict[str, torch.Tensor]:
    found = {}

    def close(observer: Monitor) -> None:
        found.update(copy.deepcopy(batch_statistics(observer.state.average.network)))
        finish(observer)

    finish = Monitor.close
    with patch.object(Monitor, "close", close):
        train(config, f"run_dir={folder}", "monitoring.samples_every=1")
    return found


def test_training_an_export_and_a_run_have_the_same_statistics(run: Path, ranks: RankPool, tmp_path: Path) -> None:
    expected = statistics(run)
    torch.testing.assert_close(statistics(export(run, tmp_path / "exported")), expected)
    for found in ranks.run(2, statistics_in_training, run.parent / "recipe.yaml", tmp_path / "again"):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def statistics_of_one_rank(run: Path) -> dict[str, torch.Tensor]:
    # As on several GPUs, where NCCL carries tensors on the device, and nothing those on the CPU.
    dist.init_process_group("cuda:gloo")
    return statistics(run) if dist.get_rank() == 0 else {}


def test_a_rank_loads_a_generator_without_the_others(run: Path, ranks: RankPool) -> None:
    expected = statistics(run)
    assert len(expected) == 2
    assert all(value.std() > 0 for value in expected.values()), "they are recomputed, and not what a layer starts with"
    found, nothing = ranks.run(2, statistics_of_one_rank, run)
    assert not nothing
    torch.testing.assert_close(found, expected)


def test_ranks_evaluate_as_one_process_does(run: Path, ranks: RankPool) -> None:
    assert ranks.run(2, distgan.evaluate, run) == [pytest.approx(distgan.evaluate(run))] * 2


def train_and_evaluate(config: Path, folder: Path) -> tuple[int, dict[str, float]]:
    assert train(config, f"run_dir={folder}") == "finished"
    return dist.get_world_size(), distgan.evaluate(folder)


def test_one_process_trains_and_then_evaluates(run: Path, ranks: RankPool, tmp_path: Path) -> None:
    found = ranks.run(2, train_and_evaluate, run.parent / "recipe.yaml", tmp_path / "again")
    assert found[0] == found[1]
    assert found[0][0] == 2
