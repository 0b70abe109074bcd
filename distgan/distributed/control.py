"""Communication of host values between ranks, over a separate gloo process group.

It does not wait for the device, and it is independent of the collectives for gradients.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distgan.errors import Interrupted, UserError
from distgan.files import reason

Result = TypeVar("Result")
Asked = Callable[[], bool]
"""Return True once this rank has received a stop request."""
Check = Callable[[], None]
"""Call it between pieces of work; it raises `Interrupted` after a stop request."""
_POLL_SECONDS = 0.1


class WorkError(Exception):
    """Work failed on some rank. The text is one line: ranks and cause."""


def never() -> bool:
    """Return False, for work that ignores stop requests."""
    return False


class Control:
    """Host communication between the ranks of this run. Every method is collective: call it on every rank."""

    def __init__(self, timeout: timedelta | None) -> None:
        """Create the group of all ranks, or without a timeout that of this process alone."""
        among_ranks = timeout is not None and dist.is_initialized()
        self.rank: int = dist.get_rank() if among_ranks else 0
        self.world_size: int = dist.get_world_size() if among_ranks else 1
        self.is_main = self.rank == 0
        self._control: Any = dist.new_group(backend="gloo", timeout=timeout) if self.world_size > 1 else None

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather one value per rank, in rank order, on every rank. Values are pickled: never pass untrusted data."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value, group=self._control)
        return gathered

    def broadcast_object(self, value: Any) -> Any:
        """Return the value of rank 0 on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def barrier(self) -> None:
        """Wait on the host for all ranks."""
        self.gather_objects(None)

    def exchange(self, flags: Sequence[bool]) -> Exchange:
        """Start an all-reduce of flags: each result is True if the flag is set on any rank. See `Exchange`."""
        raised = torch.tensor(flags, dtype=torch.int32)
        if self.world_size == 1:
            return Exchange(raised, None)
        return Exchange(raised, dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._control, async_op=True))

    def gather_on_main(self, value: Any) -> list[Any]:
        """Gather one value per rank, in rank order, on rank 0. Other ranks get an empty list. Values are pickled."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, gathered, dst=0, group=self._control)
        return gathered or []

    def run_on_all(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which must not use this group, on every rank. They wait for each other without a timeout.

        Raises:
            WorkError: on all ranks, if `work` raised an exception on one of them.
        """
        with ThreadPoolExecutor(max_workers=1) as pool:
            outcome = pool.submit(work)
            # Many short exchanges, because one long wait would exceed the timeout of collectives.
            while self.exchange([not outcome.done()]).result()[0]:
                wait([outcome], timeout=_POLL_SECONDS)
        error = outcome.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        messages = self.gather_objects(None if error is None else reason(error))
        failed = [rank for rank, message in enumerate(messages) if message is not None]
        if failed:
            where = f"rank {', '.join(map(str, failed))}: " if self.world_size > 1 else ""
            raise WorkError(where + messages[failed[0]]) from error
        return outcome.result()

    def run_on_main(self, work: Callable[[Check], Result], asked: Asked = never) -> Result:
        """Run `work` on rank 0 and broadcast its result. The other ranks wait for it without a timeout.

        Args:
            work: receives a check. It must call the check between its pieces, which raises `Interrupted` after a stop
                request.
            asked: returns True once this rank has received a stop request.

        Raises:
            UserError: on all ranks, if `work` raises it on rank 0.
            Interrupted: on all ranks, if one of them received a stop request.
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
                # Many short exchanges, because one long wait would exceed the timeout of collectives.
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
        """Context manager that makes work in pieces interruptible. Collective: call on every rank.

        Call the yielded check before each piece. After a stop request on any rank, it raises `Interrupted` on all ranks
        before the same piece. The flags are read one piece later, so that no piece waits for the all-reduce.

        Args:
            asked: returns True once this rank has received a stop request.
            rounds: number of pieces that every rank has at least. Later checks do nothing.
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
            # The other ranks do not know about the error yet, so take part in their remaining exchanges.
            while left > 0:
                check()
            raise
        finally:
            told.result()

    def gather_rows(self, rows: Tensor, everywhere: bool = False) -> Tensor:
        """Concatenate the rows of all ranks, in rank order, on rank 0. Other ranks get their own rows back.

        Rank 0 holds the concatenated rows once, for any number of ranks.

        Args:
            rows: shape (n, ...). n may differ between ranks; a rank without rows may pass any empty tensor.
            everywhere: if True, every rank gets the concatenated rows.

        Raises:
            UserError: the rows of two ranks differ in shape or dtype.
        """
        if self.world_size == 1:
            return rows
        rows = rows.detach()
        described = self.gather_objects((len(rows), tuple(rows.shape[1:]), rows.dtype))
        kinds = {(shape, str(dtype)): rank for rank, (count, shape, dtype) in enumerate(described) if count}
        if len(kinds) > 1:
            found = " and ".join(f"{dtype} of shape (n, {', '.join(map(str, shape))})" for shape, dtype in kinds)
            ranks = ", ".join(map(str, kinds.values()))
            raise UserError(f"rows of ranks {ranks} differ: found {found}, expected one kind", everywhere=True)
        starts = list(itertools.accumulate((count for count, _, _ in described), initial=0))
        if not self.is_main:
            if len(rows):
                dist.send(rows.cpu().contiguous(), dst=0, group=self._control)
            if not everywhere:
                return rows
        shape, dtype = next(((shape, dtype) for count, shape, dtype in described if count), described[0][1:])
        gathered = torch.empty(starts[-1], *shape, dtype=dtype)
        if not self.is_main:
            dist.broadcast(gathered, src=0, group=self._control)
            return gathered.to(rows.device)
        if len(rows):
            gathered[: len(rows)] = rows
        for rank in range(1, self.world_size):
            if described[rank][0]:
                dist.recv(gathered[starts[rank] : starts[rank + 1]], src=rank, group=self._control)
        if everywhere:
            dist.broadcast(gathered, src=0, group=self._control)
        return gathered.to(rows.device)

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context manager that raises the UserError of one rank on all ranks, so that no rank keeps waiting."""
        mistake = None
        try:
            yield
        except UserError as error:
            if error.everywhere:  # no rank gets to the exchange below
                raise
            mistake = str(error)
        mistakes = self.gather_objects(mistake)
        who = [rank for rank, message in enumerate(mistakes) if message is not None]
        if who:
            where = "" if len(who) == self.world_size else f"rank {', '.join(map(str, who))}: "
            raise UserError(where + mistakes[who[0]], everywhere=True)

    def check_equal(self, name: str, value: Any, fix: str) -> None:
        """Raise UserError if `value` differs between ranks. The message names the ranks that differ from rank 0.

        Args:
            name: noun with article that the message begins with, such as `the config`.
            value: picklable value of this rank.
            fix: imperative that ends the message.
        """
        values = self.gather_objects(value)
        others = [rank for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise UserError(
                f"{name} of rank {', '.join(map(str, others))} differs from rank 0's; {fix}", everywhere=True
            )


class Exchange:
    """Pending all-reduce of flags: started after one step and read after the next, so that no step waits for it.

    All ranks read the same exchange at the same step, so they decide alike.
    """

    def __init__(self, raised: Tensor, work: Any) -> None:
        self._raised = raised
        self._work = work

    def result(self) -> list[bool]:
        """Return for each flag True if it is set on any rank."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [bool(flag) for flag in self._raised.tolist()]
