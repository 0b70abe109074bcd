"""Arithmetic that detectors run in, whatever the training around them has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Convolutions in full float32 by deterministic kernels, without autocast; all settings are put back.

    cuDNN would otherwise compute them in TF32 (10 bits of mantissa) by default, and choose kernels by racing them.
    """
    settings = (
        (torch.backends.cudnn, "benchmark", False),
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    )
    before = [getattr(module, name) for module, name, _ in settings]
    try:
        for module, name, value in settings:
            setattr(module, name, value)
        with torch.autocast(device.type, enabled=False):
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
