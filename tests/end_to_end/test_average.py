"""The average of the generator's weights over a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

import distgan
from distgan.checkpoint.averages import snapshots
from distgan.cli import main
from distgan.errors import UserError
from distgan.inference.post_hoc import average
from distgan.schedule import power_decay
from tests.engines import LAUNCHED
from tests.ranks import Job
from tests.runs import differing, recipe, rows, tensors, wait_for_checkpoint

PROFILES = {"profiles": [0.05, 0.1], "snapshot_kimg": 0.064}  # every other step of two updates of 16


def test_a_long_critic_phase_weighs_no_more_than_a_plain_step(tmp_path: Path, digits: Path) -> None:
    extra = {"updates": 5, "first": 1, "every": 2}
    config = recipe(
        tmp_path, digits,
        training={"steps": 4, "initial_critic_steps": 3, "critic_steps": 2, "extra_critic_steps": extra},
        ema={"half_life_kimg": 0.1}, monitoring={"every": 1},
    )  # fmt: skip
    distgan.train(distgan.load_config(config))
    # Two updates of 16 images, whose half-life is 100; ten more updates were made before and between.
    assert [row["ema/decay"] for row in rows(tmp_path / "run") if row["step"]] == pytest.approx([0.5**0.32] * 4)
    assert rows(tmp_path / "run")[-1]["progress/kimg"] > 4 * 2 * 16 / 1000


def test_schedules_are_written_at_the_images_of_their_row(tmp_path: Path, digits: Path) -> None:
    curve = {"start": 1.0, "end": 0.2, "over": 0.064}
    optimizer = {"learning_rate": {"start": 1e-3, "end": 5e-4}, "betas": [0, curve | {"start": 0.5}]}
    config = recipe(
        tmp_path, digits,
        discriminator={"optimizer": optimizer}, objective={"r1": {"gamma": curve}},
        training={"steps": None, "kimg": 0.1, "critic_steps": 1}, monitoring={"every": 1},
    )  # fmt: skip
    outcome = distgan.train(distgan.load_config(config))
    assert (outcome.outcome, outcome.step) == ("finished", 7), "7 steps of 16 images are the first 100"
    found = {row["images"]: row for row in rows(tmp_path / "run") if row["step"]}
    for images, gamma, beta in ((16, 0.8, 0.425), (32, 0.6, 0.35), (64, 0.2, 0.2), (96, 0.2, 0.2)):
        assert found[images]["schedule/objective.r1.gamma"] == pytest.approx(gamma)
        assert found[images]["schedule/discriminator.optimizer.betas.1"] == pytest.approx(beta)
    # Rates are those of the row's step: 96 images were before the last one, of 112.
    assert found[112]["learning_rate/discriminator"] == pytest.approx(1e-3 - 5e-4 * 96 / 112)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """A run of 12 steps with snapshots."""
    folder = tmp_path_factory.mktemp("profiles")
    distgan.train(distgan.load_config(recipe(folder, digits, ema=PROFILES, checkpoint={"every": 1})))
    return folder / "run"


def test_profiles_are_what_the_formula_makes_of_the_weights(run: Path) -> None:
    assert list(snapshots(run)) == [64, 128, 192, 256, 320, 384]
    for std in (0.05, 0.1):
        expected: dict[str, torch.Tensor] = {}
        for step in range(1, 13):
            file = run / "checkpoints" / f"step-{step:08d}" / "generator.1-of-1.safetensors"
            decay = power_decay(std, 32 * (step - 1), 32)
            for name, value in safetensors.torch.load_file(file).items():
                expected[name] = decay * expected.get(name, torch.zeros(())) + (1 - decay) * value.double()
        saved = safetensors.torch.load_file(run / "checkpoints" / "step-00000012" / "profiles.1-of-1.safetensors")
        names = [key.partition("/")[2] for key in saved if key.startswith(f"{std}/")]
        assert names
        for name in names:
            torch.testing.assert_close(saved[f"{std}/{name}"].double(), expected[name], rtol=1e-4, atol=1e-6)


def test_an_average_of_any_width_is_evaluated_sampled_and_exported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTGAN_CACHE", str(tmp_path / "cache"))
    main(["average", str(run), "--std", "0.1", "--out", str(tmp_path / "same")])
    assert "from 6 snapshots; 0.0% off" in capsys.readouterr().out
    made = safetensors.torch.load_file(tmp_path / "same" / "generator_ema.1-of-1.safetensors")
    kept = safetensors.torch.load_file(run / "checkpoints" / "step-00000012" / "profiles.1-of-1.safetensors")
    for key, value in kept.items():
        std, _, name = key.partition("/")
        if std == "0.1":
            torch.testing.assert_close(made[name], value, rtol=1e-6, atol=1e-7)
    other = average(run, 0.2).path
    assert other == run / "averages" / "std-0.2-step-00000012"
    main(["evaluate", str(other), "evaluation.num_samples=32"])
    assert json.loads(capsys.readouterr().out)["fid[classifier]"] > 0
    main(["export", str(other), str(tmp_path / "exported")])
    generator = distgan.load_generator(tmp_path / "exported")
    assert generator(generator.latents(2)).shape == (2, 1, 16, 16)
    with pytest.raises(UserError, match="exists; remove it"):
        average(run, 0.2)
    with pytest.raises(UserError, match="run folder, which has the snapshots"):
        average(other, 0.2)


@pytest.mark.parametrize("std", [0.0, 0.3, float("nan")])
def test_a_width_out_of_range_is_refused(run: Path, std: float) -> None:
    with pytest.raises(UserError, match="--std"):
        average(run, std)


def test_a_width_that_the_snapshots_cannot_make_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match=r"--std 0.01: the closest average of 6 snapshots is \d+% off"):
        average(run, 0.01)


def test_a_damaged_snapshot_is_named(run: Path, tmp_path: Path) -> None:
    path = snapshots(run)[128]
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"{path.name}: not a readable snapshot"):
            average(run, 0.15, tmp_path / "out")
    finally:
        path.write_bytes(content)
    assert not (tmp_path / "out").exists()


def test_a_run_without_profiles_says_which_key_keeps_them(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, training={"steps": 1})
    distgan.train(distgan.load_config(config))
    with pytest.raises(UserError, match=r"ema\.profiles=\[0\.05,0\.1\]"):
        average(tmp_path / "run", 0.1)
    with pytest.raises(UserError, match=r"found no averages.* leave ema\.profiles out"):
        distgan.train(distgan.load_config(config, ["ema.profiles=[0.1]", "training.steps=2"]))


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_snapshots_are_bitwise_those_of_a_run_that_was_never_killed(tmp_path: Path, digits: Path, engine: str) -> None:
    config = str(recipe(tmp_path, digits, ema=PROFILES))
    environment = LAUNCHED[engine]
    assert Job(2, ["train", config, f"run_dir={tmp_path / 'whole'}"], environment=environment).wait() == [0, 0]
    job = Job(2, ["train", config], environment=environment)
    wait_for_checkpoint(tmp_path / "run", 6, job)
    job.kill(1)
    assert Job(2, ["train", config], environment=environment).wait() == [0, 0]
    assert differing(tensors(tmp_path / "run", 12), tensors(tmp_path / "whole", 12)) == []
    found, expected = snapshots(tmp_path / "run"), snapshots(tmp_path / "whole")
    assert list(found) == list(expected) == [64, 128, 192, 256, 320, 384]
    for images, path in found.items():
        assert path.read_bytes() == expected[images].read_bytes()


def test_going_back_sets_later_snapshots_aside(tmp_path: Path, digits: Path) -> None:
    config = recipe(tmp_path, digits, ema=PROFILES, training={"steps": 6})
    distgan.train(distgan.load_config(config))
    back = str(tmp_path / "run" / "checkpoints" / "step-00000002")
    distgan.train(distgan.load_config(config, ["training.steps=4"]), resume=back)
    assert list(snapshots(tmp_path / "run")) == [64, 128]
    assert list(snapshots(tmp_path / "run" / "previous-1")) == [64, 128, 192]


def test_snapshots_of_an_attempt_that_saved_no_checkpoint_are_not_used(tmp_path: Path, digits: Path) -> None:
    """They are of other weights if the next attempt has another seed."""
    config = recipe(tmp_path, digits, ema=PROFILES, training={"steps": 2})
    (tmp_path / "run" / "averages").mkdir(parents=True)
    (tmp_path / "run" / "averages" / "snapshot-000000000032.safetensors").write_bytes(b"of an earlier start")
    distgan.train(distgan.load_config(config))
    assert list(snapshots(tmp_path / "run")) == [64]
    assert list(snapshots(tmp_path / "run" / "previous-1")) == [32]
