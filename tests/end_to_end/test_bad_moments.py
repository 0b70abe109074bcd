"""A signal in the middle of something: the run saves and leaves, and ends as if it had never been asked."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan.checkpoint import directory, writer
from distgan.config import load_config
from distgan.training.loop import train
from tests.ranks import Job, RankPool
from tests.runs import differing, recipe, status, tensors

STEPS = 12


def train_signaled_in(moment: str, config: str) -> str:
    """Train, with one SIGUSR1 to one rank: in the middle of the first step, or of writing a checkpoint."""
    patch = pytest.MonkeyPatch()

    def signalling(original: Any) -> Any:
        def once(*arguments: Any) -> Any:
            if not sent:
                sent.append(True)
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(*arguments)

        return once

    sent: list[bool] = []
    if moment == "first step" and os.environ["RANK"] == "1":
        patch.setattr(torch.optim.Adam, "step", signalling(torch.optim.Adam.step))
    if moment == "checkpoint" and os.environ["RANK"] == "0":
        patch.setattr(writer, "write_file", signalling(writer.write_file))
    # Processes of the pool are deaf to it otherwise.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    try:
        return train(load_config(config)).outcome
    finally:
        patch.undo()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


@pytest.mark.parametrize(("moment", "latest"), [("first step", 3), ("checkpoint", 5)])
def test_no_step_is_lost(tmp_path: Path, digits: Path, ranks: RankPool, moment: str, latest: int) -> None:
    config = recipe(tmp_path, digits, training={"steps": STEPS}, checkpoint={"every": 2})
    assert ranks.run(2, train_signaled_in, moment, str(config)) == ["preempted", "preempted"]
    found = status(tmp_path / "run")
    assert (found["outcome"], found["reason"]) == ("preempted", "SIGUSR1")
    assert found["step"] <= latest
    newest = directory.newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{found['step']:08d}"
    undisturbed = tmp_path / "undisturbed"
    for arguments in ([], [f"run_dir={undisturbed}"]):
        assert Job(2, ["train", str(config), *arguments]).wait() == [0, 0]
    assert differing(tensors(tmp_path / "run", STEPS), tensors(undisturbed, STEPS)) == []
