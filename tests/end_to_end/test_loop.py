"""What the training loop asks of its parts, in a run of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from distgan.config import load_config
from distgan.distributed.runtime import Runtime
from distgan.players.player import Player
from distgan.training import loop
from tests.runs import differing, recipe, tensors


def test_micro_batches_are_drawn_while_they_are_trained_on(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list of them would hold the whole batch on the device."""
    update, given = Player.update, []

    def watched(self: Player, micro_batches: Any, *arguments: Any, **options: Any) -> Any:
        given.append((self.role, isinstance(micro_batches, Iterator)))
        return update(self, micro_batches, *arguments, **options)

    monkeypatch.setattr(Player, "update", watched)
    config = recipe(tmp_path, digits, training={"steps": 1, "critic_steps": 1, "gradient_accumulation_steps": 4})
    assert loop.train(load_config(config)).outcome == "finished"
    assert given == [("discriminator", True), ("generator", True)]


def test_the_last_step_has_samples_and_the_weights_do_not_know(tmp_path: Path, digits: Path) -> None:
    """Neither those of its checkpoint nor those that a run with more steps ends with."""
    for name in ("more", "less"):
        (tmp_path / name).mkdir()
    sections: dict[str, Any] = {"checkpoint": {"every": 3}, "monitoring": {"samples_every": 4}}
    more = recipe(tmp_path / "more", digits, training={"steps": 8}, **sections)
    less = recipe(tmp_path / "less", digits, training={"steps": 6}, **sections)
    outcomes = [loop.train(load_config(config)).outcome for config in (more, less)]
    assert outcomes == ["finished", "finished"]
    drawn = {
        name: sorted(path.name for path in (tmp_path / name / "run" / "samples").iterdir()) for name in ("more", "less")
    }
    grids = [f"step-{step:08d}.png" for step in (0, 4, 6, 8)]
    assert drawn == {"more": [grids[0], grids[1], grids[3]], "less": grids[:3]}
    assert differing(tensors(tmp_path / "less" / "run", 6), tensors(tmp_path / "more" / "run", 6)) == []
    assert loop.train(load_config(less, ["training.steps=8"])).outcome == "finished"
    assert differing(tensors(tmp_path / "less" / "run", 8), tensors(tmp_path / "more" / "run", 8)) == []


@pytest.mark.parametrize("precision", ["no", "tf32"])
def test_tf32_is_asked_for_and_said_to_be_absent_from_a_cpu(
    tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    asked = []

    def runtime(**options: Any) -> Runtime:
        asked.append(options["tf32"])
        return Runtime(**options)

    monkeypatch.setattr(loop, "Runtime", runtime)
    config = recipe(tmp_path, digits, training={"steps": 1, "mixed_precision": precision})
    assert loop.train(load_config(config)).outcome == "finished"
    assert asked == [precision == "tf32"]
    if Runtime().device.type != "cuda":
        assert ("training.mixed_precision = tf32" in caplog.text) == (precision == "tf32")
