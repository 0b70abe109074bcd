"""The processes of a run: who they are, which engine trains their players, and the few things they tell each other.

Launched by `accelerate launch`, `torchrun` or nothing at all; Accelerate sets the processes up. Tensors on the device
travel over the default group (NCCL or gloo); what the host decides travels over a gloo group of its own, so that it
neither waits for the device nor mixes with gradients.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from distgan.distributed.engines import Engine, chosen_engine
from distgan.distributed.engines.engine import MakeOptimizer
from distgan.distributed.engines.replicated import ReplicatedEngine
from distgan.distributed.interruption import Asked, Check, never
from distgan.distributed.launch import check_world_size, refuse_half_precision
from distgan.errors import Interrupted, UserError

Result = TypeVar("Result")
_POLL_SECONDS = 0.1
_KNOWN = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
    DistributedType.FSDP,
)


class Runtime:
    """The ranks of this run. Every method that talks to other ranks must be called by all of them.

    Args:
        gradients_in_bf16: gradients travel between ranks in bfloat16.
    """

    def __init__(
        self, *, deterministic: bool = False, timeout_minutes: float = 10.0, gradients_in_bf16: bool = False
    ) -> None:
        if deterministic:
            _use_deterministic_kernels()
        refuse_half_precision()
        self._make_engine = chosen_engine()
        self.gradients_in_bf16 = gradients_in_bf16
        self.sharded: dict[nn.Module, FSDPModule] = {}
        """The networks whose weights are divided among ranks, with what can make them whole."""
        timeout = timedelta(minutes=timeout_minutes)
        self.accelerator = Accelerator(
            # Accelerate starts separate one-process jobs when several CPU ranks do not ask for the CPU themselves.
            cpu=not torch.accelerator.is_available(),
            # Precision and compilation are the recipe's, not those of whatever accelerate config is around.
            mixed_precision="no",
            dynamo_backend="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timeout),
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        if self.accelerator.distributed_type not in _KNOWN:
            raise UserError(
                f"the accelerate config asks for {self.accelerator.distributed_type.value}; distgan trains with DDP, "
                "DeepSpeed or FSDP: use --multi_gpu, --use_deepspeed or --use_fsdp, or another --config_file",
                everywhere=True,
            )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        self.is_main = self.rank == 0
        self.step = 0
        """The step that this rank is at, for messages."""
        self._timeout_minutes = timeout_minutes
        check_world_size(self.world_size)
        self._control: Any = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None
        self._others: list[Any] = []
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = not deterministic
            # What the recipe calls float32 is that: TF32 has 10 bits of mantissa, and bf16 is there for speed.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False

    def engine(self, objective: nn.Module, network: nn.Module, make_optimizer: MakeOptimizer) -> Engine:
        """What trains a player's network, chosen at launch. With one process there is nothing to divide."""
        make_engine = self._make_engine if self.world_size > 1 else ReplicatedEngine
        return make_engine(objective, network, make_optimizer, self)

    @contextmanager
    def whole(self, network: nn.Module) -> Iterator[None]:
        """A block in which all of a network's weights are on every rank, for looking at only."""
        sharded = self.sharded.get(network)
        if sharded is None:
            yield
            return
        sharded.unshard()
        try:
            yield
        finally:
            sharded.reshard()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, as a new tensor of the same dtype. On the tensor's own device."""
        total = tensor.detach().clone()
        if self.world_size > 1:
            on_control = total.device.type == "cpu"
            dist.all_reduce(total, group=self._control if on_control else None)
        return total

    def gather_objects(self, value: Any) -> list[Any]:
        """One value of each rank, in order of rank, on every rank. Values are this program's own, never a file's."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def barrier(self) -> None:
        """Wait for all ranks (on the host)."""
        self.gather_objects(None)

    def exchange(self, flags: Sequence[bool]) -> Exchange:
        """Start telling all ranks which flags are up on any rank; see `Exchange`."""
        raised = torch.tensor(flags, dtype=torch.int32)
        if self.world_size == 1:
            return Exchange(raised, None)
        return Exchange(raised, dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._control, async_op=True))

    def main_works(self, work: Callable[[Check], Result], asked: Asked = never) -> Result:
        """What `work` returns on rank 0, on every rank. The others wait for it however long it takes.

        A user error of rank 0's becomes one of all ranks.

        Args:
            work: is given a check to call between its pieces, which raises `Interrupted`.

        Raises:
            Interrupted: on all ranks, when one of them was asked to stop meanwhile.
        """
        leave = threading.Event()

        def check() -> None:
            if leave.is_set():
                raise Interrupted

        outcome: Future[Result] | None = None
        with ThreadPoolExecutor(max_workers=1) as pool:
            if self.is_main:
                outcome = pool.submit(work, check)
            working = True
            # Short exchanges, because one long wait would run into the collectives' time-out.
            while working:
                working, told = self.exchange([outcome is not None and not outcome.done(), asked()]).result()
                if told:
                    leave.set()
                time.sleep(_POLL_SECONDS if working else 0)
        check()
        with self.together():
            result = outcome.result() if outcome is not None else None
        received: Result = self.broadcast_object(result)
        return received

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks one after another on rank 0, and on the others their own.

        What rank 0 holds meanwhile is the rows and no more, whatever the number of ranks.

        Args:
            rows: shape (n, ...) with an n of each rank's own; one that has none may give any empty tensor.
        """
        if self.world_size == 1:
            return rows
        rows = rows.detach()
        described = self.gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
        starts = list(itertools.accumulate((count for count, _, _ in described), initial=0))
        if not self.is_main:
            if len(rows):
                dist.send(rows.cpu().contiguous(), dst=0, group=self._control)
            return rows
        shape, dtype = next(((shape, dtype) for count, shape, dtype in described if count), described[0][1:])
        gathered = torch.empty(starts[-1], *shape, dtype=dtype)
        if len(rows):
            gathered[: len(rows)] = rows
        for rank in range(1, self.world_size):
            if described[rank][0]:
                dist.recv(gathered[starts[rank] : starts[rank + 1]], src=rank, group=self._control)
        return gathered.to(rows.device)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which a user error of one rank becomes the same error on all, so that none is left waiting."""
        mistake = None
        try:
            yield
        except UserError as error:
            mistake = str(error)
        mistakes = self.gather_objects(mistake)
        who = [rank for rank, message in enumerate(mistakes) if message is not None]
        if who:
            where = "" if len(who) == self.world_size else f"rank {', '.join(map(str, who))}: "
            raise UserError(where + mistakes[who[0]], everywhere=True)

    def check_equal(self, name: str, value: Any, fix: str) -> None:
        """Refuse to go on when ranks differ in `value`; the error names the ranks that differ from rank 0."""
        values = self.gather_objects(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise UserError(
                f"{name} of rank {', '.join(map(str, others))} differs from rank 0's; {fix}", everywhere=True
            )

    def wait_at_most(self, minutes: float) -> None:
        """From now on, give up a collective after so many minutes."""
        if self.world_size == 1 or minutes == self._timeout_minutes:
            return
        self._timeout_minutes = minutes
        for group in (None, self._control, *self._others):
            _set_timeout(timedelta(minutes=minutes), group)

    def adopt(self, group: Any) -> None:
        """Have the collectives of a process group that an engine made give up when all others do."""
        if group not in self._others:
            self._others.append(group)
            _set_timeout(timedelta(minutes=self._timeout_minutes), group)

    def lost_contact(self, error: Exception) -> bool:
        """Whether an error means that a collective failed because another rank is gone or silent."""
        signs = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out")
        network = isinstance(error, (dist.DistError, RuntimeError)) and any(sign in str(error) for sign in signs)
        return self.world_size > 1 and network

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Exchange:
    """Flags on their way between ranks, sent at the end of one step and read at the end of the next, so not waited for.

    All ranks read the result of the same exchange at the same step, hence decide alike.
    """

    def __init__(self, raised: Tensor, work: Any) -> None:
        self._raised = raised
        self._work = work

    def result(self) -> list[bool]:
        """For each flag, whether any rank raised it."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [bool(flag) for flag in self._raised.tolist()]


def _set_timeout(timeout: timedelta, group: Any) -> None:
    # Newer torch has a public name for it.
    public = getattr(dist, "set_timeout", None)
    (public or dist.distributed_c10d._set_pg_timeout)(timeout, group)


def _use_deterministic_kernels() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
