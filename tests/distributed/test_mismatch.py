"""Ranks that were given different things are refused at the start, by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.data.packing.pack import pack
from distgan.errors import UserError
from distgan.training import loop, setup, state
from tests.ranks import RankPool
from tests.runs import recipe, status


def refusal(config: str, what: str, other: str) -> str:
    """What training says when the last rank has something else than the rest."""
    changes, patch = [], pytest.MonkeyPatch()
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        if what == "config":
            changes = ["generator.optimizer.learning_rate=0.5"]
        elif what == "code":
            patch.setattr(setup, "code_digest", lambda: "other")
        else:
            patch.setattr(loop, "load_index", lambda *_: load_index(other))
    try:
        with pytest.raises(UserError) as caught:
            loop.train(load_config(config, changes))
    finally:
        patch.undo()
    return str(caught.value)


def resumed_without_a_file(config: str) -> str:
    """What training says when the last rank cannot read a network of the checkpoint."""

    def absent(path: Path, *_: object, **__: object) -> None:
        raise UserError(f"{path}: absent here")

    with pytest.MonkeyPatch.context() as patch:
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            patch.setattr(state, "read_network", absent)
        with pytest.raises(UserError) as caught:
            loop.train(load_config(config, ["training.steps=8"]))
    return str(caught.value)


def test_a_rank_that_cannot_read_a_checkpoint_of_a_grown_network_is_named(
    tmp_path: Path, digits: Path, ranks: RankPool
) -> None:
    network = {"architecture": "progressive", "width": 4, "max_width": 8, "normalization": "none"}
    config = recipe(
        tmp_path, digits, generator=network, discriminator=network,
        objective={"adversarial": "wasserstein", "gradient_penalty": {}, "r1": None},
        training={"steps": 6, "critic_steps": 1}, growth={"stable_kimg": 0.032, "fade_kimg": 0.016},
    )  # fmt: skip
    loop.train(load_config(str(config)))
    for text in ranks.run(2, resumed_without_a_file, str(config)):
        assert text == f"rank 1: {tmp_path}/run/checkpoints/step-00000006: absent here"


@pytest.mark.parametrize(
    ("what", "said"), [("config", "the config"), ("code", "the code"), ("data", "the data's fingerprint")]
)
def test_a_rank_that_differs_is_named(tmp_path: Path, digits: Path, ranks: RankPool, what: str, said: str) -> None:
    other = tmp_path / "other"
    pack("builtin:digits", other, resolution=16, shard_size=500, workers=1, seed=1)
    config = recipe(tmp_path, digits, training={"steps": 2, "batch_size": 18})
    for text in ranks.run(3, refusal, str(config), what, str(other)):
        assert text.startswith(f"{said} of rank 2 differs from rank 0's; ")
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_rank_whose_tar_changed_is_named(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    changed = min(other.glob("*.tar"))
    with open(changed, "ab") as file:
        file.write(b"\0" * 10240)
    config = recipe(tmp_path, digits, training={"steps": 2, "batch_size": 18})
    for text in ranks.run(3, refusal, str(config), "data", str(other)):
        assert text.startswith(f"rank 2: {changed}: the shard changed after indexing: found ")
