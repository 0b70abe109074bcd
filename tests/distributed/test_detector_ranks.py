"""A published detector on real ranks: rank 0 reads its weights, and values do not depend on the ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.suite import Evaluator
from tests.detectors import SMALL, randomized, small_vgg
from tests.labelled_shards import evaluation_config, pictures, write_shards
from tests.ranks import RankPool
from tests.shards import build_index


def evaluation(shards: str, cache: Path, detector: dict[str, str]) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        if detector["detector"] == "vgg16":
            patch.setattr("distgan.evaluation.detectors.vgg16.vgg16", small_vgg)
        else:
            patch.setattr("distgan.evaluation.detectors.dinov2.ARCHITECTURE", SMALL["dinov2"])
        config = evaluation_config(shards, cache, batch_size=8, num_samples=40, metrics=["fid"], detector=detector)
        return Evaluator(config, build_index(shards), Runtime())(lambda numbers: 255 - pictures(40)[numbers])


def refused(shards: str, cache: Path, detector: dict[str, str]) -> str:
    with pytest.raises(UserError) as caught:
        evaluation(shards, cache, detector)
    return str(caught.value)


def test_values_do_not_depend_on_the_ranks(tmp_path: Path, ranks: RankPool) -> None:
    pytest.importorskip("torchvision")
    shards = write_shards(tmp_path / "shards", pictures(40))
    detector = {"detector": "vgg16", "weights": str(tmp_path / "weights.pth")}
    for said in ranks.run(2, refused, shards, tmp_path / "cache", detector):
        assert f"weights in {{detector: vgg16, weights: PATH}} = {tmp_path}/weights.pth: cannot read" in said
    torch.save(randomized(small_vgg()).state_dict(), tmp_path / "weights.pth")
    (expected,) = ranks.run(1, evaluation, shards, tmp_path / "1", detector)
    for found in ranks.run(2, evaluation, shards, tmp_path / "2", detector):
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_values_of_dinov2_do_not_depend_on_the_ranks(tmp_path: Path, ranks: RankPool) -> None:
    """Each rank takes seconds to import transformers."""
    transformers = pytest.importorskip("transformers")
    shards = write_shards(tmp_path / "shards", pictures(40))
    config = transformers.Dinov2Config(**SMALL["dinov2"], image_size=518, patch_size=14)
    randomized(transformers.Dinov2Model(config)).save_pretrained(tmp_path / "weights")
    detector = {"detector": "dinov2", "weights": str(tmp_path / "weights")}
    (expected,) = ranks.run(1, evaluation, shards, tmp_path / "1", detector)
    for found in ranks.run(2, evaluation, shards, tmp_path / "2", detector):
        assert found == pytest.approx(expected, rel=1e-6)
