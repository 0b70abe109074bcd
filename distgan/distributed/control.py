"""What ranks tell each other on the host: over a group of its own, so that it neither waits for the device nor mixes
with gradients."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distgan.errors import Interrupted, UserError

Result = TypeVar("Result")
Asked = Callable[[], bool]
"""Return True once this rank was asked to stop."""
Check = Callable[[], None]
"""Called between pieces of work: raises `Interrupted`."""
_POLL_SECONDS = 0.1


def never() -> bool:
    """Return False: for work that nobody can ask to stop."""
    return False


class Control:
    """The ranks of this run as they talk on the host. Every method must be called by all of them."""

    def __init__(self, timeout: timedelta) -> None:
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.world_size: int = dist.get_world_size() if dist.is_initialized() else 1
        self.is_main = self.rank == 0
        self._control: Any = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None

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

    def run_on_main(self, work: Callable[[Check], Result], asked: Asked = never) -> Result:
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
            try:
                # Short exchanges, because one long wait would run into the collectives' time-out.
                while working:
                    working, told = self.exchange([outcome is not None and not outcome.done(), asked()]).result()
                    if told:
                        leave.set()
                    time.sleep(_POLL_SECONDS if working else 0)
            except BaseException:
                leave.set()
                raise
        check()
        with self.raise_on_all_ranks():
            result = outcome.result() if outcome is not None else None
        received: Result = self.broadcast_object(result)
        return received

    @contextmanager
    def interruptible(self, asked: Asked, rounds: int) -> Iterator[Check]:
        """Work in pieces, of which every rank has at least `rounds`. Collective: call on every rank.

        The yielded check, called before each piece, raises `Interrupted` on all ranks before the same piece, one piece
        after a rank was asked: what they tell each other is read one piece later, so that no piece waits for it.
        """
        told = self.exchange([False])
        left = rounds

        def check() -> None:
            nonlocal told, left
            if left > 0:
                left -= 1
                if told.result()[0]:
                    raise Interrupted
                told = self.exchange([asked()])

        try:
            yield check
        except UserError:
            # The other ranks do not know yet: they go on asking until they are through.
            while left > 0:
                check()
            raise
        finally:
            told.result()

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
    def raise_on_all_ranks(self) -> Iterator[None]:
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
