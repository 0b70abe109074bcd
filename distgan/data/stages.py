"""Turn the members of a sample into the value that is trained on, with WebDataset stages of the user's.

The stages of one sample see only its declared members, whatever else a stranger's tar holds, and WebDataset's own
unpickling and shell commands are turned off. Stages run over a whole batch, lazily, one sample in and one out.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distgan.config import DataConfig
from distgan.config.fields import rgb
from distgan.data.kinds.decoding import SampleFormat, Values
from distgan.data.kinds.staged import put_value
from distgan.data.storage.tar import BLOCK, walk
from distgan.errors import UnreadableSampleError, UserError, described, is_out_of_memory, printable, within_memory
from distgan.extensions import code_digest_of

Members = dict[str, Any]
"""`__key__`, `__url__`, and the contents of a sample's members by extension, as WebDataset has them."""


class Staged(NamedTuple):
    """What the stages made of one sample."""

    data: Any
    others: tuple[Any, ...]


class Stages:
    """The stages of a run, for one process."""

    def __init__(self, config: DataConfig, format: SampleFormat) -> None:
        """Call the user's function. Raises UserError if it fails or does not return a list of stages."""
        assert config.stages is not None
        self.name = config.stages.stages
        self.members: tuple[str, ...] = config.stages.options.members
        self._format, self._background = format, rgb(config.background)
        made = config.stages.build()
        if not isinstance(made, (list, tuple)) or not made or not all(callable(stage) for stage in made):
            raise UserError(
                f"{self.name}: returned {printable(repr(made))[:100]}, expected a list of WebDataset stages, such as "
                "[wds.decode('rgb8'), wds.to_tuple('png')]"
            )
        self._stages = list(made)
        self._checked: set[bool] = set()

    def __call__(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Staged]:
        """Run the stages over samples. Sample i's random numbers are a function of seeds[i].

        Raises:
            UnreadableSampleError: a stage failed or dropped a sample.
            UserError: the stages do not work on each sample alone.
        """
        results = self._run(samples, seeds)
        if (len(samples) > 1) not in self._checked:
            self._check(samples, seeds, results)
        return results

    def put(self, out: Values, data: Any) -> None:
        """Write what the stages made of one sample into `out`; see `put_value`.

        Raises:
            UserError: `data` is not of the kind that the run trains on.
            UnreadableSampleError: its content is invalid.
        """
        with self._failures():  # PIL may decode an image only here
            put_value(out, data, self._format, self._background, self.name)

    def _run(self, samples: Sequence[Members], seeds: Sequence[int]) -> list[Staged]:
        with _isolated():
            flow: Any = _seeded(samples, seeds)
            with within_memory(self.name), self._failures():
                for stage in self._stages:
                    flow = stage(flow)
                results = list(flow)
        if len(results) != len(samples):
            raise UnreadableSampleError(
                f"{self.name}: returned {len(results)} samples for {len(samples)}, expected one for each"
            )
        return [_staged(self.name, result) for result in results]

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Context manager that turns whatever a stage raises, but a lack of memory, into UnreadableSampleError."""
        try:
            yield
        except (UserError, UnreadableSampleError):
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise UnreadableSampleError(f"{self.name}: {described(error)}") from None

    def _check(self, samples: Sequence[Members], seeds: Sequence[int], results: list[Staged]) -> None:
        """Compare the first batch with what each of its samples gives alone.

        Stages that shuffle, mix or remember samples, and random numbers that are not those of the sample, would make a
        resumed run another one.
        """
        for sample, seed, together in zip(samples, seeds, results, strict=True):
            if not _equal(together, self._run([sample], [seed])[0]):
                raise UserError(
                    f"{self.name}: makes another value of a sample alone than in a batch, so that no resume is exact; "
                    "use no stage that shuffles, mixes or remembers samples, and draw random numbers from the default "
                    "generators of Python, NumPy or torch, which are seeded for each sample"
                )
        self._checked.add(len(samples) > 1)


def stages_key(config: DataConfig) -> tuple[str, ...]:
    """Return what the values of `data.stages` depend on: import path, options and code. Empty without stages."""
    if config.stages is None:
        return ()
    return config.stages.stages, config.stages.model_dump_json(), code_digest_of(config.stages.path)


def select_members(span: memoryview, key: bytes, declared: Sequence[str], name: str) -> Members:
    """Return the declared members of one sample by extension.

    Args:
        span: the part of a tar that holds the sample.
        key: WebDataset key of the sample.
        declared: extensions, each with alternatives that are separated by semicolons, as in WebDataset.

    Raises:
        UnreadableSampleError: a member is missing, or the part is not of a tar.
    """
    found: Members = {}
    try:
        for member in walk(_Part(span), name, _NoDigest()):
            if member.name.startswith(key + b".") and member.offset >= member.start:
                extension = member.name[len(key) + 1 :].lower().decode("utf-8", "replace")
                found.setdefault(extension, span[member.offset : member.offset + member.size])
    except UserError as error:
        raise UnreadableSampleError(f"{error}; run `distgan index` again") from None
    chosen: Members = {}
    for alternatives in declared:
        names = [name.strip().removeprefix(".").lower() for name in alternatives.split(";")]
        present = [name for name in names if name in found]
        if not present:
            held = ", ".join(f".{printable(one)[:20]}" for one in list(found)[:8])
            raise UnreadableSampleError(f"has no member .{' or .'.join(names)} beside {held or 'no other'}")
        chosen[present[0]] = bytes(found[present[0]])
    return chosen


def _staged(name: str, result: Any) -> Staged:
    if isinstance(result, dict):
        keys = ", ".join(str(key) for key in result if not str(key).startswith("__"))
        raise UserError(
            f"{name}: ended with a dict of {printable(keys)[:100]}; end with wds.to_tuple, or with a wds.map that "
            "returns the value to train on"
        )
    if isinstance(result, (tuple, list)):
        if not result:
            raise UserError(f"{name}: made an empty tuple, expected the value to train on")
        return Staged(result[0], tuple(result[1:]))
    return Staged(result, ())


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5))
    if isinstance(one, (np.ndarray, Image.Image)):
        pixels, others = np.asarray(one), np.asarray(other)
        return np.array_equal(pixels, others, equal_nan=pixels.dtype.kind in "fc")
    if "__eq__" not in {name for kind in type(one).__mro__[:-1] for name in vars(kind)}:
        return True  # it cannot be compared
    return bool(one == other or (one != one and other != other))


def _seeded(samples: Sequence[Members], seeds: Sequence[int]) -> Iterator[Members]:
    for sample, seed in zip(samples, seeds, strict=True):
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        yield dict(sample)  # stages write to their sample


@contextmanager
def _isolated() -> Iterator[None]:
    """Run stages without WebDataset's unpickling and shell commands, and leave the default generators as they were.

    Both are of the whole process, which without data loader workers is the trainer's.
    """
    from webdataset import utils  # late: only stages need it

    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    secure, utils.enforce_security = utils.enforce_security, True
    try:
        yield
    finally:
        utils.enforce_security = secure
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class _Part:
    """A part of a tar, followed by the end mark that `walk` expects."""

    def __init__(self, span: memoryview) -> None:
        self._data = bytes(span) + bytes(2 * BLOCK)
        self.size = len(self._data)

    def read(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


class _NoDigest:
    def update(self, data: bytes, /) -> None: ...
