"""Settings of FSDP and of its replicas, from accelerate's config or flags. What distgan does not do is refused.

Accelerate passes settings that only FSDP1 has with their defaults. They are without effect: fsdp_use_orig_params,
fsdp_sync_module_states, fsdp_cpu_ram_efficient_loading, fsdp_backward_prefetch, fsdp_state_dict_type.
"""

from __future__ import annotations

import os

from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env
from torch.distributed.fsdp import CPUOffloadPolicy

from distgan.errors import UserError

_REPLICAS = "PARALLELISM_CONFIG_DP_REPLICATE_SIZE"
_OTHERS = {
    "TP": "tensor parallelism",
    "CP": "context parallelism",
    "SP": "sequence parallelism",
}
"""Kind of parallelism in accelerate's variables -> its name. distgan has none of them."""


def check_fsdp_config() -> None:
    """Check the FSDP settings of the launcher.

    Raises:
        UserError: FSDP cannot read them, or they ask for FSDP1, wrapping of its own, offloading, or other kinds of
            parallelism.
    """
    try:
        plugin = FullyShardedDataParallelPlugin()
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise _refused(f"the FSDP config cannot be used: {' '.join(str(error).split())}") from None
    if plugin.fsdp_version != 2:
        raise _refused(
            f"fsdp_version: {plugin.fsdp_version}: FSDP1 does not support the second derivatives that gradient "
            "penalties need; use fsdp_version: 2"
        )
    if plugin.auto_wrap_policy is not None:
        raise _refused(
            "fsdp_auto_wrap_policy: distgan shards the blocks that a network declares in its attribute blocks; use "
            "NO_WRAP"
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise _refused("fsdp_offload_params: distgan does not support CPU offloading; use false")
    if plugin.activation_checkpointing_offload:
        raise _refused(
            "fsdp_activation_checkpointing_offload: distgan does not offload activations; use false, and "
            "training.activation_checkpointing=true to recompute them"
        )
    if plugin.ignored_modules is not None:
        raise _refused("fsdp_ignored_modules: distgan shards all weights of a player; leave it out")
    for kind, name in _OTHERS.items() if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") else ():
        if (size := _size(f"PARALLELISM_CONFIG_{kind}_SIZE")) > 1:
            raise _refused(f"parallelism_config_{kind.lower()}_size: {size}: distgan has no {name}; set it to 1")
    if parse_flag_from_env("FSDP_FORWARD_PREFETCH"):
        raise _refused("fsdp_forward_prefetch: FSDP2 prefetches by itself; use false")
    strategy = os.environ.get("FSDP_SHARDING_STRATEGY") or "FULL_SHARD"
    if strategy not in ("FULL_SHARD", "1"):
        raise _refused(
            f"fsdp_sharding_strategy: {strategy}: is of FSDP1; leave it out, and for replicas of the shards set "
            "parallelism_config_dp_replicate_size, as launch/accelerate/hsdp.yaml does"
        )


def reshards_after_forward() -> bool:
    """Return whether weights are gathered anew for the backward pass."""
    return bool(parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", True))


def replicas(world_size: int) -> int:
    """Return the number of replicas of the sharded weights: 1, or dp_replicate_size of accelerate's parallelism config.

    Raises:
        UserError: its sizes do not give the number of processes.
    """
    if not parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return 1
    found, shards = _size(_REPLICAS), _size("PARALLELISM_CONFIG_DP_SHARD_SIZE")
    if found * shards != world_size:
        raise _refused(
            f"parallelism_config_dp_replicate_size: {found} times parallelism_config_dp_shard_size: {shards} is "
            f"{found * shards}, but there are {world_size} processes; their product must be the number of processes"
        )
    return found


def _size(variable: str) -> int:
    value = os.environ.get(variable) or "1"
    if not value.isdecimal() or int(value) < 1:
        raise _refused(f"{variable.lower()}: found {value!r}, expected a number from 1")
    return int(value)


def _refused(message: str) -> UserError:
    return UserError(message, everywhere=True)
