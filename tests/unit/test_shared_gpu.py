"""More processes than GPUs on a node: NCCL refuses two ranks on one device, so they communicate over gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distgan.distributed import runtime


class Asked(Exception):
    """What Accelerate was asked for."""


def backend(patch: pytest.MonkeyPatch, devices: int, processes: str | None) -> str:
    """The backend that a runtime asks for on a node of so many GPUs and processes."""

    def accelerator(*, kwargs_handlers: list[Any], **_: Any) -> None:
        raise Asked(kwargs_handlers[0].backend)

    patch.setattr(runtime, "Accelerator", accelerator)
    patch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    patch.setattr(torch.cuda, "device_count", lambda: devices)
    patch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        patch.setenv("LOCAL_WORLD_SIZE", processes)
    with pytest.raises(Asked) as asked:
        runtime.Runtime()
    return str(asked.value)


def test_the_backend_follows_from_the_number_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend(monkeypatch, 1, "2") == "gloo"
    assert backend(monkeypatch, 4, "8") == "gloo"
    assert backend(monkeypatch, 8, "8") == "nccl"
    assert backend(monkeypatch, 8, "2") == "nccl"
    assert backend(monkeypatch, 1, None) == "nccl"
