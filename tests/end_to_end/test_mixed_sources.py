"""A run on two weighted sources, killed, resumed on other numbers of ranks, and with other weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import distgan
from tests.commands import mistake, output
from tests.ranks import Job
from tests.runs import differing, losses, recipe, tensors, wait_for_checkpoint

STEPS = 8


def make_recipe(folder: Path, digits: Path, weight: float = 3) -> Path:
    """Source 0 is the first of four shards with three quarters of the samples, source 1 are the others."""
    folder.mkdir(exist_ok=True)
    first, *others = [str(shard) for shard in sorted(digits.glob("*.tar"))]
    sources = [{"path": first, "weight": weight}, {"path": others, "weight": 1}]
    return recipe(
        folder, digits, data={"path": sources, "labels": True, "order": "lanes", "shuffle_block": 64},
        training={"steps": STEPS},
    )  # fmt: skip


def test_mixed_sources_resume_bitwise_on_any_number_of_ranks(
    tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, killed = make_recipe(tmp_path / "undisturbed", digits), make_recipe(tmp_path / "killed", digits)
    assert Job(2, ["train", str(undisturbed)]).wait() == [0, 0]
    job = Job(2, ["train", str(killed), "data.num_workers=1"])
    wait_for_checkpoint(tmp_path / "killed" / "run", 2, job)
    job.kill()
    assert Job(2, ["train", str(killed)]).wait() == [0, 0]
    expected = tensors(tmp_path / "undisturbed" / "run", STEPS)
    assert differing(tensors(tmp_path / "killed" / "run", STEPS), expected) == []

    alone = make_recipe(tmp_path / "alone", digits)
    distgan.train(distgan.load_config(alone))
    theirs, own = losses(tmp_path / "undisturbed" / "run"), losses(tmp_path / "alone" / "run")
    assert theirs.keys() == own.keys()
    for step, values in theirs.items():
        assert own[step] == pytest.approx(values, rel=1e-3, abs=1e-4)

    rows = [json.loads(line) for line in output(capsys, "trace", str(alone), "--steps", "0:8").splitlines()]
    drawn = [row["source"] for row in rows]
    assert len(drawn) == STEPS * 2 * 16
    assert drawn.count(0) == 192
    assert output(capsys, "trace", str(alone), "--steps", "0:8", "--world-size", "2").count('"source": 0') == 192

    # The checkpoint knows the sources and their weights.
    changed = make_recipe(tmp_path / "alone", digits, weight=1)
    told = mistake(capsys, "train", str(changed), "training.steps=10")
    assert "saved with data of fingerprint" in told
    assert "weight: 3" in told
    assert "--accept data" in told
    distgan.train(distgan.load_config(changed, ["training.steps=10"]), accept=["data"])
    assert "step-00000010" in {path.name for path in (tmp_path / "alone" / "run" / "checkpoints").iterdir()}
