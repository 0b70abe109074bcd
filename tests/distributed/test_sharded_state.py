"""The state of every engine in a checkpoint, exact under any other engine and number of ranks; one folder for all."""

from __future__ import annotations

import os
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distgan.checkpoint.layout import read_layout, read_sets
from distgan.checkpoint.loading import load_sets
from distgan.checkpoint.writer import CheckpointWriter
from distgan.distributed.runtime import Runtime
from distgan.players.player import Player
from distgan.runs import shared
from tests.distributed.test_engines import PENALISED
from tests.distributed.test_players import build, small_config
from tests.engines import LAUNCHED, needs, stored, under, whole
from tests.ranks import Job, RankPool
from tests.runs import recipe, status

State = dict[str, dict[str, Tensor]]


def make_player(runtime: Runtime) -> Player:
    return build(small_config(**PENALISED | {"generator": {"width": 16}}), runtime, torch.float32)[0]


@pytest.fixture(scope="module")
def state() -> State:
    player = make_player(Runtime())
    moments = {
        f"{name}/{quantity}": torch.tensor(7.0) if quantity == "step" else torch.rand_like(weight)
        for name, weight in player.network.named_parameters()
        for quantity in player.quantities or ()
    }
    weights = {name: torch.rand_like(value) for name, value in player.network.state_dict().items()}
    return {"weights": weights, "moments": moments}


def save_state(state: State, folder: Path) -> None:
    runtime = Runtime()
    engine = make_player(runtime).engine
    engine.load_weights(stored(state["weights"]))
    engine.load_optimizer_state(stored(state["moments"]))
    with closing(CheckpointWriter(folder, keep=1, ranks=runtime, background=runtime.background)) as writer:
        sets = {"weights": engine.weights(), "moments": engine.optimizer_state()}
        assert writer.save(1, sets, {}, blocking=True)


def load_state(path: Path) -> State:
    engine = make_player(Runtime()).engine
    sets = read_sets(path, ["weights", "moments"])
    engine.load_weights(sets["weights"])
    engine.load_optimizer_state(sets["moments"])
    return {"weights": whole(engine.weights()), "moments": whole(engine.optimizer_state())}


def assert_same(found: State, expected: State) -> None:
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], value) for key, value in tensors.items())


@pytest.mark.parametrize(
    ("engine", "world_size", "then", "then_size"),
    [
        ("ddp", 2, "ddp", 1), ("ddp", 4, "fsdp", 2), ("fsdp", 2, "ddp", 1), ("fsdp", 3, "hsdp", 4),
        ("hsdp", 4, "fsdp", 2),
        pytest.param("fsdp", 2, "zero1", 3, marks=needs("zero1").marks),
        pytest.param("zero2", 4, "fsdp", 2, marks=needs("zero2").marks),
        pytest.param("zero1", 2, "zero2", 2, marks=needs("zero1").marks),
    ],
)  # fmt: skip
def test_a_state_is_exact_under_any_engine_and_number_of_ranks(
    tmp_path: Path, ranks: RankPool, state: State, engine: str, world_size: int, then: str, then_size: int
) -> None:
    ranks.run(world_size, under, LAUNCHED[engine], save_state, state, tmp_path)
    path = tmp_path / "step-00000001"
    assert_same(load_sets(path, ["weights", "moments"]), state)
    written = {number for of in read_layout(path).sets.values() for tensor in of.values() for number, _ in tensor.parts}
    writers = 2 if engine == "hsdp" else world_size
    assert written == set(range(1, writers + 1)), "each rank writes a part, of the first replica"
    sizes = [sum(file.stat().st_size for file in path.glob(f"*.{number}-of-*")) for number in written]
    assert max(sizes) < 1.5 * sum(sizes) / writers
    assert_same(ranks.run(then_size, under, LAUNCHED[then], load_state, path)[0], state)


def in_a_folder_of_its_own(folder: Path) -> None:
    own = folder / os.environ["RANK"]
    own.mkdir()
    os.chdir(own)
    shared._PATIENCE_SECONDS = 0.5


def test_ranks_that_do_not_see_one_folder_are_refused(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, run_dir="run", training={"steps": 1})
    job = Job(2, ["train", str(config)], log=tmp_path / "log", before=partial(in_a_folder_of_its_own, tmp_path))
    assert job.wait() == [2, 2]
    said = [line for line in (tmp_path / "log").read_text().splitlines() if "distgan: error:" in line]
    (line,) = said
    assert "run_dir = run: rank 1 on " in line
    assert "does not see the files of rank 0" in line
    assert "storage that all nodes mount" in line
    assert status(tmp_path / "0" / "run")["outcome"] == "failed"
    assert not list((tmp_path / "0" / "run").glob(".shared-*"))
