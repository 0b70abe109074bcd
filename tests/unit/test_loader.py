"""The loader for other trainers: every sample once an epoch, exact resume on any number of ranks, and mistakes."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from distgan.data import Loader
from distgan.data.index.rebuild import write_index
from distgan.errors import UserError
from tests.ranks import RankPool
from tests.shards import numbers_of, write_numbered, write_tar

COUNTS = [13, 7, 20, 11]
SAMPLES = sum(COUNTS)


def loader(folder: Path | str, **changes: Any) -> Loader:
    return Loader(str(folder), **{"batch_size": 12, "resolution": 8, "num_workers": 0, "seed": 3, **changes})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = write_numbered(tmp_path / "shards", COUNTS, classes=5)
    write_index(str(folder))
    return folder


def seen(batches: Any) -> list[list[int]]:
    return [numbers_of(batch.data.numpy()) for batch in batches]


def test_each_sample_comes_once_an_epoch_with_its_label(shards: Path) -> None:
    with loader(shards) as batches:
        numbers: list[int] = []
        for epoch in range(3):
            assert batches.epoch == epoch
            for batch in batches:
                found = numbers_of(batch.data.numpy())
                assert [number % 5 for number in found] == batch.labels.tolist()
                numbers += found
        for epoch in range(3):
            assert Counter(numbers[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == Counter(range(SAMPLES))
        assert numbers[:SAMPLES] != sorted(numbers[:SAMPLES])


@pytest.mark.parametrize("order", ["permutation", "lanes"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_the_batches_of_one(shards: Path, order: str, num_workers: int) -> None:
    settings = {"order": order, **({"lanes": 4, "shuffle_block": 8} if order == "lanes" else {})}
    with loader(shards, **settings) as whole:
        expected = [sorted(batch) for batch in seen(itertools.islice(whole, 4))]
    parts = []
    for rank in range(3):
        with loader(shards, rank=rank, world_size=3, num_workers=num_workers, **settings) as part:
            parts.append(seen(itertools.islice(part, 4)))
    assert [sorted(itertools.chain(*shares)) for shares in zip(*parts, strict=True)] == expected


def test_a_state_continues_on_another_number_of_ranks(shards: Path) -> None:
    with loader(shards) as whole:
        expected = seen(itertools.islice(itertools.chain(whole, whole), 8))
    with loader(shards) as first:
        assert seen(itertools.islice(first, 3)) == expected[:3]
        state = json.loads(json.dumps(first.state_dict()))
    parts = []
    for rank in range(2):
        with loader(shards, rank=rank, world_size=2) as part:
            part.load_state_dict(state)
            assert part.position == 36
            parts.append(seen(itertools.islice(itertools.chain(part, part), 5)))
    found = [sorted(itertools.chain(*shares)) for shares in zip(*parts, strict=True)]
    assert found == [sorted(batch) for batch in expected[3:]]


def epochs_of(folder: str, epochs: int) -> tuple[list[list[int]], dict[str, Any]]:
    with pytest.raises(UserError, match=r"torch\.distributed is not initialized"):
        loader(folder)
    dist.init_process_group("gloo")
    with loader(folder, max_failure_rate=1) as batches:
        assert (batches.rank, batches.world_size) == (dist.get_rank(), dist.get_world_size())
        found = [batch for _ in range(epochs) for batch in seen(batches)]
        state = batches.state_dict()
    dist.destroy_process_group()
    return found, state


def state_of_one_rank(folder: str) -> dict[str, Any] | None:
    dist.init_process_group("gloo")
    with loader(folder) as batches:
        seen(itertools.islice(batches, 2))
        state = batches.state_dict() if dist.get_rank() == 0 else None
        dist.barrier()
    dist.destroy_process_group()
    return state


def test_one_rank_alone_may_ask_for_the_state(shards: Path, ranks: RankPool) -> None:
    state, nothing = ranks.run(2, state_of_one_rank, str(shards))
    assert nothing is None
    assert state is not None
    assert state["position"] == 24


def test_real_ranks_replace_alike_what_cannot_be_read(shards: Path, ranks: RankPool) -> None:
    write_tar(shards / "004.tar", {"0000.png": b"not an image", "0000.cls": b"1"})
    write_index(str(shards))
    (one, state), (other, same) = ranks.run(2, epochs_of, str(shards), 2)
    assert state == same
    [[sample, replacement, _, reason]] = state["substitutions"]
    assert sample == SAMPLES
    assert replacement < SAMPLES
    assert "004.tar" in reason
    together = list(itertools.chain(*one, *other))
    assert len(together) == state["position"]
    assert Counter(together)[replacement] >= 4, "itself and in place of the other, in both epochs"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"batch_size": 5, "world_size": 2, "rank": 0},
            "batch_size = 5: expected a multiple",
        ),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"batch_size": "4"}, "batch_size = '4'"),
        ({"seed": 1.5}, "seed = 1.5"),
        ({"world_size": 2, "rank": -1}, "rank = -1"),
        ({"world_size": 2}, "pass both"),
        ({"world_size": 2, "rank": 5}, "rank = 5, world_size = 2"),
        ({"resolution": 2}, "resolution: 2 is below 4 pixels"),
        ({"resolutoin": 8}, "did you mean 'resolution'"),
        ({"order": "random"}, "order = 'random'"),
    ],
)
def test_mistakes_are_one_line(shards: Path, changes: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as caught:
        loader(shards, **changes)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"fingerprint": "other"}, "fingerprint of the state"),
        ({"seed": 4}, "seed of the state: found 4, expected 3"),
        ({"version": 2}, "version"),
        (None, "NoneType"),
        ({"position": -1}, "position of the state: found -1"),
        ({"position": True}, "position"),
        ({"substitutions": [[0, 10**6, 0, "x"]]}, "replaced samples"),
    ],
)
def test_a_state_of_another_loader_is_refused(shards: Path, change: dict[str, Any] | None, part: str) -> None:
    with loader(shards) as batches:
        state = {**batches.state_dict(), **change} if change is not None else None
        with pytest.raises(UserError, match=part):
            batches.load_state_dict(state)  # type: ignore[arg-type]
        assert batches.position == 0


def test_the_program_of_the_documentation(shards: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    [program] = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Loader(" in block]
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(program.replace("datasets/digits", str(shards)), found)
    assert found["images"].shape == (64, 1, 20, 20)
    assert found["loader"].epoch == 2
