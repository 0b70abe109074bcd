"""What happens when numbers, disks and shards go wrong in the middle of training."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.data.order import make_order
from distgan.errors import UserError
from distgan.inference.export import load_generator
from distgan.training.loop import train
from tests.checkpoints import rewrite
from tests.ranks import Job, RankPool
from tests.runs import losses, recipe, rows, status, tensors


def test_non_finite_updates_in_a_row_stop_the_run(tmp_path: Path, digits: Path) -> None:
    # A learning rate that throws the weights out of float32's range.
    config = recipe(
        tmp_path, digits, discriminator={"optimizer": {"learning_rate": 1e30}, "normalization": "none"},
        training={"steps": 200, "batch_size": 16, "max_skipped_updates": 5},
        monitoring={"every": 5}, checkpoint={"every": 1, "keep": 2},
    )  # fmt: skip
    log = tmp_path / "log"
    assert Job(2, ["train", str(config)], log=log).wait() == [2, 2]
    text = log.read_text()
    assert text.count("distgan: error:") == 1
    said = next(line for line in text.splitlines() if "distgan: error:" in line)
    assert "discriminator" in said or "generator" in said
    assert "step " in said
    assert "last good checkpoint" in said
    assert status(tmp_path / "run")["outcome"] == "failed"


def test_an_unreadable_shard_is_replaced_counted_and_survives_a_resume(tmp_path: Path, digits: Path) -> None:
    import shutil

    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    index = load_index(str(shards))
    config = recipe(tmp_path, shards, data={"max_failure_rate": 0.5, "retries": 0}, training={"steps": 20})
    # Overwrite the image of the sample that comes first, and of one that comes in the second half.
    order = make_order(load_config(config).data, 7, index)
    import numpy as np

    chosen = order.samples(np.array([0, 500]))
    for sample in chosen.tolist():
        shard, offset, size, *_ = index.entry(sample)
        with open(index.shards[shard].url, "r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)
    for world_size, name in ((1, "one"), (2, "two")):
        folder = tmp_path / name
        log = tmp_path / f"log-{name}"
        command = ["train", str(config), f"run_dir={folder}"]
        assert Job(world_size, command, log=log).wait() == [0] * world_size
        state = json.loads((folder / "checkpoints" / "step-00000020" / "state.json").read_text())
        assert {entry[0] for entry in state["substitutions"]} == set(chosen.tolist())
        assert rows(folder)[-1]["data/replaced_samples"] == 2
        assert log.read_text().count("unreadable sample replaced") == 2
    # Resumed after the first and before the second failure, it ends as the undisturbed run does.
    again = tmp_path / "again"
    Job(1, ["train", str(config), f"run_dir={again}", "training.steps=6"]).wait()
    Job(1, ["train", str(config), f"run_dir={again}"]).wait()
    one, resumed = tensors(tmp_path / "one", 20), tensors(again, 20)
    assert all(torch.equal(one[name], resumed[name]) for name in one)
    assert losses(tmp_path / "two")[18] == pytest.approx(losses(tmp_path / "one")[18], rel=2e-3, abs=1e-4)


def test_too_many_unreadable_samples_stop_the_run_with_their_names(tmp_path: Path, digits: Path) -> None:
    import shutil

    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    victim = sorted(shards.glob("*.tar"))[1]
    size = victim.stat().st_size
    victim.write_bytes(b"\0" * size)
    config = recipe(tmp_path, shards, data={"retries": 0}, training={"steps": 50})
    log = tmp_path / "log"
    assert Job(2, ["train", str(config)], log=log).wait() == [2, 2]
    said = next(line for line in log.read_text().splitlines() if "distgan: error:" in line)
    assert victim.name in said
    assert "max_failure_rate" in said
    assert status(tmp_path / "run")["outcome"] == "failed"


def test_training_goes_on_when_checkpoints_cannot_be_written(tmp_path: Path, digits: Path) -> None:
    sections = {"training": {"steps": 20, "batch_size": 16}, "checkpoint": {"every": 10}}
    config = recipe(tmp_path, digits, **sections)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    log = tmp_path / "log"
    # To the last step, where leaving without any weights on disk is no success.
    assert Job(2, ["train", str(config)], log=log).wait() == [2, 2]
    assert status(tmp_path / "run")["outcome"] == "failed"
    assert "checkpoints: the final checkpoint of step 20 cannot be written" in log.read_text()
    assert log.read_text().count("distgan: error:") == 1
    assert "checkpoint of step 10 failed" in log.read_text()
    assert "training goes on" in log.read_text()
    failures = {row["step"]: row["checkpoint/failures"] for row in rows(tmp_path / "run")}
    # Told as soon as it is known, not with the next checkpoint.
    assert failures.items() >= {3: 0, 6: 0, 9: 0, 15: 1, 18: 1}.items()


def batches(config_path: str, workers: int, steps: int) -> list[tuple[list[int], list[int]]]:
    """Positions and pixel sums of what this rank reads."""
    from distgan.data.stream import open_rank_stream
    from distgan.distributed.runtime import Runtime

    config = load_config(config_path, [f"data.num_workers={workers}"])
    runtime = Runtime()
    stream = open_rank_stream(
        config.data, config.seed, load_index(config.data.path), start=32, micro_batch=16,
        rank=runtime.rank, world_size=runtime.world_size,
    )  # fmt: skip
    found = []
    for _ in range(steps):
        batch = next(stream)
        found.append((batch.positions.tolist(), batch.data.flatten(1).long().sum(1).tolist()))
    stream.close()
    return found


@pytest.mark.parametrize("order", ["permutation", "lanes"])
def test_ranks_and_workers_see_the_same_batches(tmp_path: Path, digits: Path, ranks: RankPool, order: str) -> None:
    lanes = {"lanes": 3, "shuffle_block": 50} if order == "lanes" else {}
    config = recipe(tmp_path, digits, data={"order": order, "mirror": True, **lanes})
    expected = None
    for world_size in (1, 2, 4):
        for workers in (0, 1, 3):
            by_rank = ranks.run(world_size, batches, str(config), workers, 5)
            whole = []
            for step in range(5):
                pairs = [pair for rank in by_rank for pair in zip(*rank[step], strict=True)]
                whole.append(sorted(pairs))
            expected = expected or whole
            assert whole == expected, (world_size, workers)
    assert expected is not None
    assert [position for step in expected for position, _ in step] == list(range(32, 32 + 5 * 16))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 5))
def test_each_sample_comes_once_an_epoch(digits: Path, seed: int, epoch: int) -> None:
    import numpy as np

    index = load_index(str(digits))
    for order in ("permutation", "lanes"):
        config = load_config_for(digits, order)
        positions = np.arange(epoch * len(index), (epoch + 1) * len(index))
        assert sorted(make_order(config, seed, index).samples(positions).tolist()) == list(range(len(index)))


def load_config_for(shards: Path, order: str):  # type: ignore[no-untyped-def]
    from distgan.config import DataConfig

    lanes = {"lanes": 5, "shuffle_block": 100} if order == "lanes" else {}
    return DataConfig.model_validate({"path": str(shards), "resolution": 16, "order": order, **lanes})


def conditional_run(config_path: str) -> str:
    return train(load_config(config_path)).outcome


def test_plain_batch_norm_without_a_penalty_trains(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    config = recipe(
        tmp_path, digits, generator={"normalization": "batch"}, discriminator={"normalization": "none"},
        objective={"adversarial": "minimax", "r1": None}, training={"steps": 3, "batch_size": 16, "critic_steps": 1},
    )  # fmt: skip
    assert ranks.run(2, conditional_run, str(config)) == ["finished"] * 2
    values = losses(tmp_path / "run")[3]
    # Minimax: the generator's loss is E log(1 - D(G(z))), which is negative.
    assert values["loss/generator"] < 0


def test_a_second_job_in_the_same_folder_is_refused(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1_000_000})
    first = Job(1, ["train", str(config)], log=tmp_path / "first")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert Job(1, ["train", str(config), "--resume", "never"], log=tmp_path / "second").wait() == [2]
    assert f"another job is training there (process {first.processes[0].pid}" in (tmp_path / "second").read_text()
    assert status(tmp_path / "run")["outcome"] == "running"
    first.signal(signal.SIGTERM)
    assert first.wait(30) == [0]
    assert status(tmp_path / "run") | {"outcome": "preempted", "reason": "SIGTERM"} == status(tmp_path / "run")


def test_training_goes_on_when_nobody_reads_its_messages(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, monitoring={"every": 1})
    command = [sys.executable, "-m", "distgan", "train", str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.stderr.close()
        assert process.wait(60) == 0
    assert status(tmp_path / "run")["outcome"] == "finished"
    assert sorted(losses(tmp_path / "run")) == list(range(1, 13))


def test_going_back_sets_the_later_course_aside(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"steps": 8})
    run = tmp_path / "run"
    assert Job(1, ["train", str(config)]).wait() == [0]
    before = tensors(run, 8)
    back = ["train", str(config), "--resume", str(run / "checkpoints" / "step-00000004")]
    assert Job(1, [*back, "training.steps=6", "generator.optimizer.learning_rate=1e-3"]).wait() == [0]
    kept = tensors(run / "previous-1", 8)
    assert all(torch.equal(kept[name], before[name]) for name in before)
    assert json.loads((run / "previous-1" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
    assert not (run / "checkpoints" / "step-00000008").exists()
    assert sorted(losses(run)) == [3, 6]
    # From there to the course that was set aside, which leaves no checkpoint of this one in the way.
    forth = ["train", str(config), "--resume", str(run / "previous-1" / "checkpoints" / "step-00000008")]
    assert Job(1, [*forth, "training.steps=10"]).wait() == [0]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000010"]
    assert (run / "previous-2" / "checkpoints" / "step-00000006").is_dir()
    assert sorted(losses(run)) == [9, 10]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The folder of a config and its run of 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert Job(1, ["train", str(recipe(folder, digits, training={"steps": 2}))]).wait() == [0]
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "many"),
        ("step", -5),
        ("position", 10**30),
        ("data", 5),
        ("config", {}),
        ("statistics", {"generator": 5}),
        ("statistics", {"generator": {"loss/generator": [math.nan, 1.0]}}),
        ("best", {"step": 0, "metric": "fid", "value": math.nan}),
    ],
)
def test_a_description_that_is_wrong_is_one_line(
    tmp_path: Path, digits: Path, finished: Path, key: str, value: object
) -> None:
    config = recipe(tmp_path, digits, training={"steps": 2})
    shutil.copytree(finished / "run", tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000002"
    rewrite(
        checkpoint,
        "state.json",
        json.dumps(json.loads((checkpoint / "state.json").read_text()) | {key: value}).encode(),
    )
    for command in (["train", str(config)], ["sample", str(tmp_path / "run"), "--out", str(tmp_path / "x.png")]):
        log = tmp_path / command[0]
        assert Job(1, command, log=log).wait() == [2]
        assert log.read_text().count("distgan: error:") == 1
        assert "state.json" in log.read_text()
        assert "Traceback" not in log.read_text()


def test_a_strangers_checkpoint_is_refused_in_one_line(tmp_path: Path, digits: Path) -> None:
    config = load_config(recipe(tmp_path, digits, training={"steps": 1}, checkpoint={"every": 1}))
    train(config)
    good = tmp_path / "run" / "checkpoints" / "step-00000001"
    longer = config.model_copy(update={"run_dir": str(tmp_path / "other")})
    wide = {"width": 2**16, "max_width": 2**16, "latent_size": 2**16}

    def spoiled(value: float) -> Callable[[bytes], bytes]:
        return lambda content: safetensors.torch.save(
            {name: torch.full_like(tensor, value) for name, tensor in safetensors.torch.load(content).items()}
        )

    def described(**changes: Any) -> Callable[[bytes], bytes]:
        return lambda content: json.dumps(json.loads(content) | changes).encode()

    generous = config.model_dump(mode="json") | {"generator": wide}
    resumed: Callable[[Path], object] = lambda path: train(longer, resume=str(path))  # noqa: E731
    for name, change, use, part in (
        ("generator", spoiled(math.nan), resumed, "not finite"),
        ("generator_ema", spoiled(math.inf), resumed, "not finite"),
        ("generator_ema", spoiled(math.nan), load_generator, "not finite"),
        ("discriminator_optimizer", spoiled(math.nan), resumed, "holds NaN"),
        ("counters", spoiled(math.nan), resumed, "holds NaN"),
        ("counters", spoiled(math.inf), resumed, "found inf, expected a number from 0"),
        ("counters", spoiled(-1.0), resumed, "found -1.0, expected a number from 0"),
        ("discriminator_optimizer", spoiled(-1.0), resumed, "holds negative numbers"),
        ("discriminator", spoiled(-1.0), resumed, "running_var holds a negative variance, -1"),
        ("generator_ema", spoiled(-1.0), load_generator, "running_var holds a negative variance, -1"),
        ("state.json", described(substitutions=[[1, 2]]), resumed, "state.json: replaced samples"),
        ("state.json", described(vocabulary=["a"]), resumed, "state.json: vocabulary: a vocabulary must have 2 to"),
        ("state.json", described(position=33), resumed, "position: found 33 at step 1, expected 32"),
        ("state.json", described(step=2), resumed, "position: found 32 at step 2, expected 64"),
        ("state.json", described(config=generous), load_generator, "use an older checkpoint"),
    ):
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        file = name if name.endswith(".json") else f"{name}.1-of-1.safetensors"
        rewrite(bad, file, change((bad / file).read_bytes()))
        with pytest.raises(UserError) as caught:
            use(bad)
        assert str(caught.value).startswith(str(bad))
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)
