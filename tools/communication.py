"""Count the collectives of a recipe's training step, and their bytes, by network, purpose and kind.

Two real processes train the recipe for some steps. The tool counts every collective that torch dispatches, including
those of DDP and DeepSpeed. The calling function determines its purpose. The first step is left out. Bytes are those of
the full tensor that is reduced, gathered or scattered. The tool sets `monitoring.every=1`, so `readings` of scalars
happen in each step. A growing network is counted at its first level. Pass `growth=null` to count the full network.

    python tools/communication.py configs/digits-dcgan.yaml
    python tools/communication.py configs/digits-r3gan.yaml training.batch_size=16 --engine zero2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distgan.errors import UserError
from tools.commands import ENGINES, under_engine

AFTER_A_STEP = ("flags", "readings")
"""Purposes of collectives that the loop starts after it has counted the step."""


class Kind(NamedTuple):
    """One row of the table."""

    player: str
    """`generator` or `discriminator`; `both` for collectives outside of updates."""
    purpose: str
    """`gradients`, `gradient norm`, `weights`, `batch statistics`, `flags`, `readings` or `checkpoint`."""
    collective: str


class Traffic(NamedTuple):
    """Mean number of collectives and bytes per step."""

    number: float
    bytes: float


class Counting(TorchDispatchMode):
    """Context manager that records the collectives of distgan's training loop.

    Attributes:
        found: step, kind and bytes of each collective.
        parameters: player -> number of parameters of its network.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[tuple[int, Kind, int]] = []
        self.parameters: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._note(function._schema.name.removeprefix("c10d::").strip("_"), args)
        return function(*args, **kwargs or {})

    def _note(self, collective: str, args: Sequence[Any]) -> None:
        step, player, names = None, "both", set()
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            name = frame.f_code.co_qualname
            if frame.f_globals.get("__name__", "").startswith("distgan."):
                names.add(name)
                if name == "Player.update":
                    acting = frame.f_locals["self"]
                    player = acting.role
                    self.parameters[player] = sum(weight.numel() for weight in acting.network.parameters())
                elif name == "run" and "progress" in frame.f_locals:
                    step = frame.f_locals["progress"].step
            frame = frame.f_back
        if step is not None:
            self.found.append((step, Kind(player, purpose(names), collective), max(map(size, args))))


def purpose(names: set[str]) -> str:
    """Return the purpose of a collective, given the names of the distgan functions on its call stack."""
    if "save" in names:
        return "checkpoint"
    if "Monitor._fit_statistics" in names:
        return "samples"
    if "Monitor._measure" in names:
        return "readings"
    if "Control.exchange" in names:
        return "flags"
    if "FSDPEngine._sum_over_shards" in names:
        return "gradient norm"
    if "_AllReduceSum.forward" in names:
        return "gradient norm" if "ZeroEngine._before_step" in names else "batch statistics"
    return "gradients" if any(name.endswith("Engine.backward") for name in names) else "weights"


def size(argument: Any) -> int:
    """Return the bytes of the tensors in an argument of a collective."""
    if isinstance(argument, torch.Tensor):
        return argument.nbytes
    return sum(map(size, argument)) if isinstance(argument, (list, tuple)) else 0


def counted(
    recipe: str, settings: Sequence[str], folder: str, steps: int
) -> tuple[dict[Kind, Traffic], dict[str, int]]:
    """Train as one rank. Return the mean traffic per step without the first one, and the parameters of each player."""
    from distgan.config import load_config
    from distgan.training.loop import train

    config = load_config(recipe, [
        *settings, f"run_dir={folder}/run", f"training.steps={steps}", "training.initial_critic_steps=0",
        "training.extra_critic_steps=null", "evaluation.every=0", "monitoring.every=1", "monitoring.tensorboard=false",
        "monitoring.samples_every=1000000", "checkpoint.every=1000000",
    ])  # fmt: skip
    with Counting() as counting:
        train(config)
    numbers, bytes_ = Counter[Kind](), Counter[Kind]()
    for step, kind, amount in counting.found:
        done = step - 1 if kind.purpose in AFTER_A_STEP else step
        # The last step always writes both.
        if done >= 1 and kind.purpose not in ("checkpoint", "samples"):
            numbers[kind] += 1
            bytes_[kind] += amount
    later = steps - 1
    return {kind: Traffic(numbers[kind] / later, bytes_[kind] / later) for kind in numbers}, counting.parameters


def count(
    recipe: str, settings: Sequence[str], *, engine: str = "ddp", processes: int = 2, steps: int = 2
) -> tuple[dict[Kind, Traffic], dict[str, int]]:
    """Start processes, and return what `counted` found on rank 0.

    Raises:
        SystemExit: a process failed; the message is its error or log.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = ["--worker", folder, "--steps", str(steps)]
        command = under_engine(engine, processes, __file__, recipe, *settings, *worker)
        log = Path(folder, "log")
        with open(log, "wb") as output:
            if subprocess.run(command, stdout=output, stderr=output).returncode:
                mistakes = [path.read_text() for path in sorted(Path(folder).glob("mistake-*"))]
                raise SystemExit(mistakes[0] if mistakes else log.read_text())
        found = json.loads(Path(folder, "found.json").read_text())
    return {Kind(*kind): Traffic(*traffic) for kind, traffic in found["traffic"]}, found["parameters"]


def table(traffic: dict[Kind, Traffic], parameters: dict[str, int]) -> str:
    """Return the result as a Markdown table."""
    lines = ["| player | purpose | collective | number per step | bytes per step |", "| --- | --- | --- | --- | --- |"]
    for kind, amount in sorted(traffic.items()):
        lines.append(f"| {' | '.join(kind)} | {amount.number:,.4g} | {amount.bytes:,.0f} |")
    sizes = ", ".join(f"{player} {count:,}" for player, count in sorted(parameters.items()))
    return "\n".join([*lines, "", f"Parameters: {sizes}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="CONFIG")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="overrides of the recipe")
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="engine (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument(
        "--steps",
        type=int,
        default=2,
        help="training steps, the first of which is not counted; raise it for penalties that are not in every step "
        "(default: %(default)s)",
    )
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args()
    if options.worker:
        rank = os.environ["RANK"]
        try:
            traffic, parameters = counted(options.recipe, options.settings, options.worker, options.steps)
        except UserError as error:
            Path(options.worker, f"mistake-{rank}").write_text(str(error))
            raise SystemExit(2) from None
        if rank == "0":
            found = {"traffic": list(traffic.items()), "parameters": parameters}
            Path(options.worker, "found.json").write_text(json.dumps(found))
        return
    print(table(*count(
        options.recipe, options.settings, engine=options.engine, processes=options.processes, steps=options.steps
    )))  # fmt: skip


if __name__ == "__main__":
    main()
