"""The n-gram divergence on real ranks: the same number however many there are, also when some generate nothing."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest

from distgan import randomness
from distgan.config import parse_config
from distgan.data.index.loading import load_index
from distgan.data.packing.pack import pack
from distgan.distributed.runtime import Runtime
from distgan.evaluation.suite import Evaluator
from tests.ranks import RankPool


def evaluation(folder: str, num_samples: int) -> dict[str, float]:
    networks = {"architecture": "characters", "normalization": "none"}
    settings = {
        "run_dir": "unused",
        "data": {"kind": "text", "path": folder, "length": 10, "num_workers": 0},
        "generator": networks,
        "discriminator": networks,
        "training": {"steps": 1, "batch_size": 4},
        "evaluation": {"num_samples": num_samples, "batch_size": 8, "cache_dir": f"{folder}/cache"},
    }
    index = load_index(folder)
    characters = len(index.vocabulary or ())
    evaluator = Evaluator(parse_config(settings), index, Runtime())
    # torchmetrics' own way would bring the lines of all ranks to each.
    with patch("torchmetrics.metric.gather_all_tensors", side_effect=AssertionError("an all-gather was called")):
        return evaluator(lambda numbers: randomness.integers(0, "lines", numbers, characters, (10,)))


@pytest.mark.parametrize("num_samples", [2, 45])
def test_any_number_of_ranks_finds_the_same(ranks: RankPool, tmp_path: Path, num_samples: int) -> None:
    (tmp_path / "a.txt").write_text("\n".join(f"line {i * i} of {i % 7}" for i in range(200)))
    pack(tmp_path / "a.txt", tmp_path / "shards", held_out=0.3, workers=1)
    (expected,) = ranks.run(1, evaluation, str(tmp_path / "shards"), num_samples)
    assert 0 < expected["ngram_js[1]"] < 1
    for world_size in (2, 3):
        assert ranks.run(world_size, evaluation, str(tmp_path / "shards"), num_samples) == [expected] * world_size
