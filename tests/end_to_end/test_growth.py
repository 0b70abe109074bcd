"""Progressive growing as a user runs it: killed in the middle of a fade, on several ranks, sampled while it grows."""

from __future__ import annotations

import json
import random
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distgan import schedule
from distgan.cli import main
from distgan.config import load_config
from distgan.data.index.loading import load_index
from distgan.data.stream import open_rank_stream
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.inference.export import export, load_generator
from distgan.training.inputs import Feed
from distgan.training.setup import assemble, validate_run
from distgan.training.trace import trace
from tests.ranks import Job
from tests.runs import differing, losses, recipe, rows, tensors

STEPS = 14
STABLE, FADE = 64, 96
# By the paper's rule, with two critic steps of 16 images, and of 8 from 16 pixels on: 64 images of 4x4, a fade of 96,
# 64 more of 8x8, a fade of 96, 16x16. A step trains as its first image says.
POSITIONS = [0, 32, 64, 96, 128, 160, 192, 224, 256, 272, 288, 304, 320, 336]
LEVELS = [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
RATES = [1.0e-3, 1.5e-3, 5.0e-4]
FADES = [1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1, 1]


def make_recipe(folder: Path, shards: Path, **sections: Any) -> Path:
    network = {"architecture": "progressive", "normalization": "none", "width": 4, "max_width": 8}
    # With a large eps, the rounding of gradients near 0 makes no whole steps, by which ranks would differ.
    adam = {"learning_rate": 1.0e-3, "betas": [0.0, 0.99], "eps": 1.0e-3}
    return recipe(
        folder,
        shards,
        generator={**network, "optimizer": adam},
        discriminator={**network, "optimizer": adam, "minibatch_stddev": {"group_size": 2}},
        objective={"adversarial": "wasserstein", "r1": None, "gradient_penalty": {}, "drift": 0.001},
        growth={
            "stable_kimg": STABLE / 1000,
            "fade_kimg": FADE / 1000,
            "batch_sizes": {16: 8},
            "learning_rates": {8: 1.5e-3, 16: 5.0e-4},
        },
        **{"training": {"steps": STEPS}, "monitoring": {"every": 1, "samples_every": 4}} | sections,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> dict[int, Path]:
    """The run folders of uninterrupted runs by world size."""
    runs = {}
    for world_size in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"grown-{world_size}")
        log = folder / "log"
        assert Job(world_size, ["train", str(make_recipe(folder, digits))], log=log).wait() == [0] * world_size, (
            log.read_text()
        )
        runs[world_size] = folder / "run"
    return runs


@pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_killed_in_the_middle_of_fades(
    tmp_path: Path, digits: Path, undisturbed: dict[int, Path], world_size: int
) -> None:
    config = make_recipe(tmp_path, digits, data={"num_workers": 1 if world_size == 2 else 0})
    # Those of steps 4 and 10 lie inside a fade; the one of step 8 where a fade and another batch size have just begun.
    after = {1: 8, 2: 4, 4: 10}[world_size]
    job = Job(world_size, ["train", str(config)])
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "checkpoints" / f"step-{after:08d}").exists():
        assert time.monotonic() < deadline
        assert job.running(), "the job ended by itself"
        time.sleep(0.005)
    job.kill(random.Random(world_size).randrange(world_size))
    assert Job(world_size, ["train", str(config)]).wait() == [0] * world_size
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed[world_size], STEPS)) == []
    for step, values in losses(undisturbed[world_size]).items():
        assert losses(tmp_path / "run")[step] == pytest.approx(values, rel=1e-12, abs=1e-15)


def test_losses_do_not_depend_on_the_ranks(undisturbed: dict[int, Path]) -> None:
    alone = losses(undisturbed[1])
    for world_size in (2, 4):
        for step, values in losses(undisturbed[world_size]).items():
            # float32, and differences grow with the steps.
            assert values == pytest.approx(alone[step], rel=2e-3, abs=1e-4)


def test_growth_is_recorded(undisturbed: dict[int, Path]) -> None:
    for row in rows(undisturbed[1])[:-1]:
        step = row["step"]
        assert row["images"] == POSITIONS[step]
        assert row["growth/level"] == LEVELS[step]
        assert row["growth/fade"] == pytest.approx(FADES[step])
        assert row["growth/resolution"] == 4 * 2 ** LEVELS[step]
        for player in ("generator", "discriminator"):
            assert row[f"learning_rate/{player}"] == RATES[LEVELS[step - 1]], "that of the last step"
    state = json.loads((undisturbed[1] / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    assert state["position"] == POSITIONS[-1] + 16


def blocks(pixels: torch.Tensor) -> int:
    """The side of the largest squares of equal pixels that images (..., r, r) consist of."""
    return max(
        side
        for side in (1, 2, 4, 8)
        if torch.equal(
            pixels, pixels[..., ::side, ::side].repeat_interleave(side, dim=-2).repeat_interleave(side, dim=-1)
        )
    )


def test_pictures_have_one_size(undisturbed: dict[int, Path]) -> None:
    for step, side in ((0, 4), (4, 2), (8, 1)):
        with Image.open(undisturbed[1] / "samples" / f"step-{step:08d}.png") as picture:
            assert picture.size == (2 * 16 + 2, 2 * 16 + 2)
            first = torch.tensor(list(picture.crop((0, 0, 16, 16)).getdata())).view(16, 16)
        assert blocks(first) == side


@pytest.mark.parametrize(("step", "side"), [(2, 4), (4, 2), (8, 1), (14, 1)])
def test_an_export_of_a_growing_generator(tmp_path: Path, undisturbed: dict[int, Path], step: int, side: int) -> None:
    checkpoint = undisturbed[1] / "checkpoints" / f"step-{step:08d}"
    growth = {"level": LEVELS[min(step, STEPS - 1)], "fade": pytest.approx(FADES[min(step, STEPS - 1)])}
    exported = load_generator(export(checkpoint, tmp_path / "exported"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["growth"] == growth
    from_run = load_generator(checkpoint)
    latents = exported.latents(4)
    assert torch.equal(exported(latents), from_run(latents))
    assert exported(latents).shape == (4, 1, 16, 16)
    assert blocks(exported(latents)) == side


def test_samples_and_metrics_of_a_growing_generator(
    tmp_path: Path, undisturbed: dict[int, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(undisturbed[1] / "checkpoints" / "step-00000004")
    main(["sample", checkpoint, "--num", "3", "--out", str(tmp_path / "images")])
    with Image.open(tmp_path / "images" / "000002.png") as picture:
        assert picture.size == (16, 16)
    main(["evaluate", checkpoint, "evaluation.num_samples=64", f"evaluation.cache_dir={tmp_path}"])
    assert "fid[classifier]" in capsys.readouterr().out


def boxes(images: np.ndarray[Any, Any], factor: int) -> np.ndarray[Any, Any]:
    count, channels, side, _ = images.shape
    return images.reshape(count, channels, side // factor, factor, side // factor, factor).mean((3, 5))


def test_reals_are_shrunk_and_faded_and_follow_the_batches(tmp_path: Path, digits: Path) -> None:
    """From the middle of a fade over the step where the batch size changes, against the images as they were read."""
    config, index = load_config(make_recipe(tmp_path, digits)), load_index(str(digits))
    with closing(
        open_rank_stream(config.data, config.seed, index, start=0, micro_batch=352, rank=0, world_size=1)
    ) as whole:
        pixels = next(whole).data.numpy() / 127.5 - 1
    runtime = Runtime()
    state = assemble(config, index, runtime)
    state.progress.position = state.progress.images = POSITIONS[4]
    state.grow()
    with closing(Feed(state, runtime)) as feed:
        for step in range(4, STEPS):
            for update in schedule.discriminator_updates(config, step, schedule.Used(POSITIONS[step], POSITIONS[step])):
                (batch,) = feed.discriminator_inputs(update)
                expected = boxes(pixels[update.start : update.start + update.batch_size], 4 >> LEVELS[step])
                old = boxes(expected, 2).repeat(2, axis=2).repeat(2, axis=3)
                expected = FADES[step] * expected + (1 - FADES[step]) * old
                assert batch.reals is not None
                np.testing.assert_allclose(batch.reals.numpy(), expected, atol=1e-6)
                assert batch.addresses.tolist() == list(range(update.start, update.start + update.batch_size))
            (generated,) = feed.generator_inputs(step)
            assert generated.addresses.tolist() == [16 * step + number for number in range(len(batch.reals))]
            if step + 1 < STEPS:
                state.progress.position = state.progress.images = POSITIONS[step + 1]
                state.grow()


def test_every_batch_divides_among_the_ranks(tmp_path: Path, digits: Path) -> None:
    config, index = load_config(make_recipe(tmp_path, digits)), load_index(str(digits))
    validate_run(config, index, 8)
    with pytest.raises(UserError, match=r"growth\.batch_sizes\.16 = 8 .* does not divide among 16 processes"):
        validate_run(config, index, 16)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_traces_follow_the_batches(tmp_path: Path, digits: Path, world_size: int) -> None:
    config = load_config(make_recipe(tmp_path, digits))
    records = list(trace(config, 0, STEPS, world_size))
    assert records == [record for step in range(STEPS) for record in trace(config, step, step + 1, world_size)]
    for step in range(STEPS):
        found = [record for record in records if record["step"] == step]
        batch = 8 if LEVELS[step] == 2 else 16
        assert sorted({record["update"] for record in found}) == [2 * step, 2 * step + 1]
        ranks = [record["rank"] for record in found]
        assert [ranks.count(rank) for rank in range(world_size)] == [2 * batch // world_size] * world_size
    seen = [(record["shard"], record["key"]) for record in records]
    assert len(set(seen)) == len(seen) == POSITIONS[-1] + 16, "each sample once an epoch"
