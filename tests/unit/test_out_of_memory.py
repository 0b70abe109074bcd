"""A device without enough memory: one line that names the key and the fix, and status.json with the same reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from distgan.cli import main
from distgan.config import load_config
from distgan.errors import UserError, within_memory
from distgan.evaluation.suite import Evaluator
from distgan.training.loop import train
from tests.ranks import RankPool
from tests.runs import recipe, rows, status

SAID = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is "
    "free. Including non-PyTorch memory, this process has 78.04 GiB memory in use."
)
"""As CUDA's caching allocator says it."""


def fail_at(call: int) -> Any:
    """A convolution that finds no memory at this call of it and from then on."""
    calls = []
    forward = torch.nn.Conv2d.forward

    def failing(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) >= call:
            raise torch.OutOfMemoryError(SAID)
        return forward(*arguments)

    return failing


def test_training_names_the_batch(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(
        tmp_path, digits, training={"batch_size": 24, "gradient_accumulation_steps": 3}, monitoring={"every": 1}
    )
    monkeypatch.setattr(torch.nn.Conv2d, "forward", fail_at(200))
    with pytest.raises(UserError) as caught:
        train(load_config(config))
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "training.batch_size = 24",
        "training.gradient_accumulation_steps = 3",
        "8 samples",
        "2.00 GiB",
        "bf16",
    ):
        assert part in text
    # What was trained before it is still told.
    assert len(rows(tmp_path / "run")) > 1
    ended = status(tmp_path / "run")
    assert (ended["outcome"], ended["lost_rank"]) == ("failed", False)
    assert "training.batch_size = 24" in ended["reason"]


def test_an_evaluation_names_its_own_batch(tmp_path: Path, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = {"every": 2, "num_samples": 20, "batch_size": 10, "cache_dir": str(tmp_path / "cache")}
    config = recipe(tmp_path, digits, evaluation=evaluation)

    def failing(*_: Any) -> None:
        raise torch.OutOfMemoryError(SAID)

    monkeypatch.setattr(Evaluator, "_add", failing)
    monkeypatch.setattr(Evaluator, "__init__", started)
    with pytest.raises(UserError, match=r"^evaluation\.batch_size = 10: .*2\.00 GiB"):
        train(load_config(config))
    assert "evaluation.batch_size = 10" in status(tmp_path / "run")["reason"]


def started(self: Evaluator, config: Any, index: Any, runtime: Any, asked: Any) -> None:
    """Without a detector, which takes long to train."""
    self.config, self.runtime, self._asked, self.detector, self._metrics = config, runtime, asked, None, []


def command(config: str, log: str) -> int | str | None:
    """`distgan train` on each of two ranks, where convolutions find no memory, with what they print in one file."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.Conv2d, "forward", fail_at(120))
    patch.setattr("distgan.cli.leave", exit_instead)
    kept = os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 2)
    try:
        main(["train", config])
    except SystemExit as ended:
        return ended.code
    finally:
        os.dup2(kept, 2)
        os.close(file)
        patch.undo()
    return 0


def exit_instead(code: int) -> None:
    raise SystemExit(code)


def test_ranks_that_fail_alike_say_so_once(tmp_path: Path, digits: Path, ranks: RankPool) -> None:
    config = recipe(tmp_path, digits)
    log = tmp_path / "log"
    assert ranks.run(2, command, str(config), str(log)) == [2, 2]
    text = log.read_text()
    assert text.count("distgan: error:") == text.count("training.batch_size = 16") == 1
    assert "Traceback" not in text
    assert "8 samples" in text
    assert "2.00 GiB" in status(tmp_path / "run")["reason"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(SAID),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_a_lack_of_memory_looks_like(error: Exception) -> None:
    with pytest.raises(UserError, match=r"^--key: .*; lower it$"), within_memory("--key", "lower it"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^broken$"), within_memory("--key"):
        raise RuntimeError("broken")
