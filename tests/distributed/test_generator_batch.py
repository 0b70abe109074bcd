"""Generator updates with a batch of their own: trained and resumed on other numbers of ranks, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distgan.config import load_config, parse_config
from distgan.data.index.loading import load_index
from distgan.errors import UserError
from distgan.training import loop
from distgan.training.setup import batch_memory, validate_run
from tests.ranks import RankPool
from tests.runs import losses, recipe, tensors

DAMPED = {"learning_rate": 1e-2, "eps": 1e-2}
"""Adam whose steps do not blow up the rounding of gradients that are 0, such as that of a relativistic logit's bias."""


def train(config: str, changes: list[str], resume: str = "auto") -> None:
    loop.train(load_config(config, changes), resume=resume)


def test_ranks_do_not_matter_and_may_change(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    """One rank, two, and two that go on from the one's second step, with reals and statistics of both batch sizes."""
    config = str(
        recipe(
            tmp_path, digits, generator={"normalization": "synchronized", "optimizer": DAMPED},
            discriminator={"normalization": "none", "minibatch_stddev": {"group_size": 4}, "optimizer": DAMPED},
            objective={"adversarial": "relativistic_average", "r1": None},
            training={"steps": 4, "generator_batch_size": 24, "gradient_accumulation_steps": 2},
            monitoring={"every": 1},
        )
    )  # fmt: skip
    runs = {name: tmp_path / name for name in ("one", "two", "changed")}
    for world_size, name, more in ((1, "one", {}), (2, "two", {}), (2, "changed", {"resume": "one"})):
        resume = {key: str(runs[run] / "checkpoints" / "step-00000002") for key, run in more.items()}
        ranks.run(world_size, train, config, [f"run_dir={runs[name]}"], **resume)
    alone = tensors(runs["one"], 4)
    for name in ("two", "changed"):
        found = tensors(runs[name], 4)
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            torch.testing.assert_close(found[key], value, rtol=2e-3, atol=2e-5, msg=f"{name}: {key}")
        for step in (3, 4):
            assert losses(runs[name])[step]["loss/generator"] == pytest.approx(
                losses(runs["one"])[step]["loss/generator"], rel=1e-4
            )


def test_it_divides_among_ranks_and_micro_batches(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"generator_batch_size": 24, "gradient_accumulation_steps": 2})
    index = load_index(str(digits))
    validate_run(load_config(config), index, 4)
    with pytest.raises(UserError, match=r"training\.generator_batch_size = 24 .* among 8 .* a multiple of 16"):
        validate_run(load_config(config), index, 8)
    with pytest.raises(UserError, match=r"training\.generator_batch_size: 23 does not divide .*steps=2"):
        load_config(config, ["training.generator_batch_size=23"])
    with (
        pytest.raises(UserError, match=r"generator_batch_size = 24, .*: up to 6 samples per process"),
        batch_memory(load_config(config), 2),
    ):
        torch.empty(1 << 60)


def test_reals_of_another_batch_are_refused() -> None:
    sections = {
        "run_dir": "unused", "data": {"path": "unused", "resolution": 8},
        "objective": {"adversarial": "relativistic_paired"},
        "training": {"steps": 1, "batch_size": 8, "generator_batch_size": 16, "generator_reals": "last"},
    }  # fmt: skip
    with pytest.raises(UserError, match=r"training\.generator_reals: last: .* 8 real .* is 16; .*generator_reals=own"):
        parse_config(sections)
    parse_config(sections, ["training.generator_batch_size=8"])
    hinge = "objective.adversarial=hinge"  # which looks at none
    parse_config(sections, [hinge])
    with pytest.raises(UserError, match=r"training\.generator_latents: last: .* are 8, .* is 16; .*latents=own"):
        parse_config(sections, [hinge, "training.generator_latents=last"])
    both = ["generator.architecture=progressive", "discriminator.architecture=progressive"]
    none = ["generator.normalization=none", "discriminator.normalization=none", "training.generator_reals=own"]
    for size in (16, 8):  # 8 is training.batch_size
        with pytest.raises(UserError, match=rf"generator_batch_size: {size}: growth\.batch_sizes .*leave one of them"):
            parse_config(sections, [
                *both, *none, "growth={batch_sizes: {8: 4}}", f"training.generator_batch_size={size}"
            ])  # fmt: skip
    with pytest.raises(UserError, match=r"group_size: 3 does not divide the micro-batch of 8"):
        parse_config(sections, [
            "objective.adversarial=hinge", "discriminator.minibatch_stddev={group_size: 3}", "training.batch_size=6",
            "training.generator_batch_size=8", "discriminator.normalization=none",
        ])  # fmt: skip
