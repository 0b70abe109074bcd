"""Selection of the engine by the accelerate config or the flags of `accelerate launch`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from accelerate.utils import parse_flag_from_env

from distgan.distributed.engines.base import Engine
from distgan.distributed.engines.ddp import DDPEngine
from distgan.distributed.engines.deepspeed_config import read_deepspeed_config
from distgan.distributed.engines.fsdp import FSDPEngine
from distgan.distributed.engines.fsdp_config import check_fsdp_config
from distgan.distributed.engines.zero import ZeroEngine

MakeEngine = Callable[..., Engine]


def chosen_engine() -> MakeEngine:
    """Return the constructor of the engine that the launcher chose; DDP by default.

    Raises:
        UserError: the settings of the engine cannot train.
    """
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return functools.partial(ZeroEngine, config=read_deepspeed_config())
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        check_fsdp_config()
        return FSDPEngine
    return DDPEngine
