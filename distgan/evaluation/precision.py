"""The arithmetic of evaluation, whatever the training around it has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Matrix products and convolutions on CUDA in full float32 inside, whatever `training.mixed_precision` has set.

    cuDNN would otherwise compute convolutions in TF32 (10 bits of mantissa) by default.
    """
    # By the names of torch's newer interface, which can be read whichever of the two others have used.
    cudnn: Any = torch.backends.cudnn
    with _changed(*((part, "fp32_precision", "ieee") for part in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn))):
        yield


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Full float32 by deterministic kernels, without autocast; all settings are put back.

    cuDNN would otherwise choose kernels by racing them.
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
    """A fixed number of threads: sums that are cut among threads then round alike however a process was started."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
