"""Arithmetic of evaluation, independent of the training's settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Compute CUDA matrix products and convolutions in full float32 inside, for any `training.mixed_precision`.

    By default cuDNN computes convolutions in TF32 (10 bits of mantissa).
    """
    # Torch's newer interface is readable even if other code used the older one.
    cudnn: Any = torch.backends.cudnn
    with _changed(*((part, "fp32_precision", "ieee") for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn))):
        yield


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Compute in full float32 with deterministic kernels and without autocast inside; restore all settings after.

    With its benchmark mode cuDNN chooses kernels by timing them.
    """
    cudnn = torch.backends.cudnn
    with (
        ieee_float32(),
        _changed((cudnn, "benchmark", False), (cudnn, "deterministic", True)),
        torch.autocast(device.type, enabled=False),
    ):
        yield


@contextmanager
def _changed(*settings: tuple[Any, str, Any]) -> Iterator[None]:
    before = [getattr(module, name) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(settings, before, strict=True):
            setattr(module, name, value)


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Fix the number of CPU threads inside, so that sums split among threads round the same in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
