"""Processes of a run: setup, device, process groups, and the engine that trains the players.

`accelerate launch`, `torchrun` or the user starts the processes, and Accelerate sets them up. Device tensors use the
default process group (NCCL or gloo). Host decisions use a separate gloo group (`Control`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs, patch_environment
from torch import Tensor, nn

from distgan.distributed.control import Control
from distgan.distributed.engines.base import Engine, MakeOptimizer
from distgan.distributed.engines.choice import chosen_engine
from distgan.distributed.engines.ddp import DDPEngine
from distgan.distributed.engines.fsdp import FSDPEngine, ShardedNetwork
from distgan.distributed.launch import check_world_size, natural
from distgan.distributed.launcher_settings import check_launcher_settings
from distgan.distributed.parts import gathered
from distgan.errors import UserError

logger = logging.getLogger("distgan")

_KNOWN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


class Runtime(Control):
    """This process as one rank of a run, with its device and collectives. Collective: create it on every rank.

    The process group outlives this object, so that one process can train and evaluate in turn. See
    `leave_process_group`.

    Args:
        deterministic: use deterministic kernels only.
        timeout_minutes: timeout of collectives, in minutes.
        gradients_in_bf16: if True, all-reduce gradients in bfloat16.
        tf32: if True, float32 matrix products and convolutions on CUDA round their inputs to TF32 (10 bits of
            mantissa). If False, they use full float32.

    Raises:
        UserError: the launcher's settings cannot train, or its processes do not form one process group.
    """

    def __init__(
        self,
        *,
        deterministic: bool = False,
        timeout_minutes: float = 10.0,
        gradients_in_bf16: bool = False,
        tf32: bool = False,
    ) -> None:
        if deterministic:
            _use_deterministic_kernels()
        check_launcher_settings()
        self._make_engine = chosen_engine()
        self.gradients_in_bf16 = gradients_in_bf16
        self.sharded: dict[nn.Module, ShardedNetwork] = {}
        """Networks with sharded weights -> what gathers them."""
        self.mesh: Any = None
        """Device mesh that weights are sharded over; None before the first engine that shards them."""
        timeout = timedelta(minutes=timeout_minutes)
        inherited = dist.is_initialized()
        sharing = ranks_share_a_gpu()
        # The engine reads accelerate's parallelism config itself.
        with patch_environment(accelerate_use_parallelism_config="false"):
            self.accelerator = Accelerator(
                # Without cpu=True, Accelerate makes each of several CPU ranks an independent one-process job.
                cpu=not torch.accelerator.is_available(),
                # The config decides precision and compilation, after with_launcher_settings.
                mixed_precision="no",
                dynamo_backend="no",
                kwargs_handlers=[
                    InitProcessGroupKwargs(backend="gloo" if sharing else "nccl", timeout=timeout),
                    DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
                ],
            )
        if self.accelerator.distributed_type not in _KNOWN:
            raise UserError(
                f"accelerate config: found {self.accelerator.distributed_type.value}, expected DDP, DeepSpeed or FSDP; "
                "use --multi_gpu, --use_deepspeed or --use_fsdp, or another --config_file",
                everywhere=True,
            )
        self.device: torch.device = self.accelerator.device
        self.step = 0
        """Current step of this rank, for messages."""
        self._timeout_minutes = timeout_minutes
        check_world_size(self.accelerator.num_processes)
        super().__init__(timeout)
        if self.world_size != self.accelerator.num_processes:
            raise UserError(
                f"this process was one of {self.accelerator.num_processes} and has left their process group, so it "
                "cannot join again; call destroy_process_group only after the last training or evaluation",
                everywhere=True,
            )
        if inherited and self.world_size > 1:
            _set_timeout(timeout, None)
        self._others: list[Any] = []
        if sharing and self.is_main:
            logger.warning(
                "%s processes share %d GPU(s) on this node, so they communicate over gloo, which is slow; start one "
                "process per GPU",
                os.environ["LOCAL_WORLD_SIZE"], torch.cuda.device_count(),
            )  # fmt: skip
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not deterministic
            # The older interface, because torch.compile reads it and raises if only the newer one is set.
            torch.backends.cuda.matmul.allow_tf32 = tf32
            torch.backends.cudnn.allow_tf32 = tf32

    @property
    def shards_weights(self) -> bool:
        """True if the engine shards weights."""
        return self.world_size > 1 and self._make_engine is FSDPEngine

    def engine(
        self,
        objective: nn.Module,
        network: nn.Module,
        make_optimizer: MakeOptimizer,
        blocks: Sequence[nn.Module] = (),
    ) -> Engine:
        """Return the engine, chosen at launch, that trains a player's network. One process always uses DDPEngine.

        Args:
            blocks: parts of the network that may be sharded one by one. Without them the objective may use weights
                outside of the network's forward pass.
        """
        if self.shards_weights:
            return FSDPEngine(objective, network, make_optimizer, self, blocks)
        make_engine = self._make_engine if self.world_size > 1 else DDPEngine
        return make_engine(objective, network, make_optimizer, self)

    @contextmanager
    def full_params(self, network: nn.Module) -> Iterator[None]:
        """Context manager that gathers all weights of a network on every rank. Do not change them in the block.

        Collective: call on every rank.
        """
        sharded = self.sharded.get(network)
        if sharded is None:
            with gathered(network):
                yield
            return
        sharded.unshard()
        try:
            yield
        finally:
            sharded.reshard()

    @contextmanager
    def passing(self, network: nn.Module, opponent: nn.Module, *, twice: bool) -> Iterator[None]:
        """Context manager for the forward and backward passes of an update of `network`.

        Inside, both networks can be called. A network that is not sharded by block has all its weights there.

        Args:
            twice: second derivatives of the networks are taken.
        """
        sharded, other = (self.sharded.get(each) for each in (network, opponent))
        with ExitStack() as held:
            if other is not None and not other.by_block:
                held.enter_context(self.full_params(opponent))
            for each in (sharded, other):
                if each is not None:
                    held.enter_context(each.passing(twice=twice))
            yield

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks as a new tensor of the same dtype and device. Collective: call on every rank."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            on_control = total.device.type == "cpu"
            dist.all_reduce(total, group=self._control if on_control else None)
        return total

    def set_timeout(self, minutes: float) -> None:
        """Set the timeout of all process groups, in minutes. Collective: call on every rank."""
        if self.world_size == 1 or minutes == self._timeout_minutes:
            return
        self._timeout_minutes = minutes
        for group in (None, self._control, *self._others):
            _set_timeout(timedelta(minutes=minutes), group)

    def register_group(self, group: Any) -> None:
        """Apply the run's timeout to a process group that an engine created."""
        if group not in self._others:
            self._others.append(group)
            _set_timeout(timedelta(minutes=self._timeout_minutes), group)

    @cached_property
    def background(self) -> Control:
        """Communication of a background thread, on a process group of its own. Collective: use it on every rank."""
        control = Control(timedelta(minutes=self._timeout_minutes))
        if self.world_size > 1:
            self.register_group(control._control)
        return control

    def lost_contact(self, error: Exception) -> bool:
        """Return True if a collective failed with this error because another rank is gone or silent."""
        signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out")
        network = isinstance(error, (dist.DistError, RuntimeError)) and any(sign in str(error) for sign in signs)
        return self.world_size > 1 and network


def ranks_share_a_gpu() -> bool:
    """Return True if this node has GPUs, but fewer than processes. NCCL refuses to share a GPU; gloo does not."""
    return torch.cuda.is_available() and ranks_per_gpu() > 1


def ranks_per_gpu() -> int:
    """Return the number of ranks on each GPU of this node, rounded up; 1 without GPUs."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return -(-(natural("LOCAL_WORLD_SIZE") or 1) // devices) if devices else 1


def leave_process_group() -> None:
    """Destroy the process group before a successful exit. Without this call torch logs a warning.

    The process cannot join again, because torchrun's store keeps the addresses of the first group.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _set_timeout(timeout: timedelta, group: Any) -> None:
    # Newer torch versions have a public function.
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, group)


def _use_deterministic_kernels() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
