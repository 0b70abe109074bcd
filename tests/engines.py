"""Engines as `accelerate launch` chooses them, for one task of the pool of ranks."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor

from distgan.distributed.parts import Held, Part, Stored

LAUNCHED: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero1": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "fsdp": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "hsdp": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    },
}  # fmt: skip
"""What the launcher puts into the environment. HSDP is of four ranks."""


def deepspeed_is_there() -> bool:
    return all(map(importlib.util.find_spec, ("deepspeed", "transformers")))


def whole(tensors: Mapping[str, Held]) -> dict[str, Tensor]:
    """Copies of tensors that engines keep in parts. Every rank must call it."""
    gathered: list[Any] = [tensors]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, dict(tensors))
    found = {}
    for name, held in tensors.items():
        if isinstance(held, Part):
            first = [of[name] for of in gathered if of[name].replica == 0]
            parts = sorted(((part.start, part.values) for part in first), key=itemgetter(0))
            found[name] = Stored(held.values.dtype, held.shape, parts).whole()
        else:
            found[name] = held.clone()
    return found


def stored(tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Tensors as a checkpoint gives them to an engine."""
    return {name: Stored.of(tensor) for name, tensor in tensors.items()}


def needs(engine: str) -> Any:
    """An engine as a test's parameter, skipped where its library is missing."""
    missing = engine.startswith("zero") and not deepspeed_is_there()
    return pytest.param(engine, marks=pytest.mark.skipif(missing, reason="needs distgan[deepspeed]"))


def under(environment: Mapping[str, str], function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Call a function as the launcher would with this environment."""
    os.environ.update(environment)
    try:
        return function(*arguments, **named)
    finally:
        for name in environment:
            del os.environ[name]
        communication = sys.modules.get("deepspeed.comm.comm")
        if communication is not None and communication.cdb is not None:
            communication.destroy_process_group()
            communication.cdb = None
