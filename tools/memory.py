"""Measure the bytes per rank of a large transformer under each engine, against theory.

Processes under `accelerate launch` train one GAT network, by default a discriminator of 302 million parameters and then
a generator of 403, against a tiny one. R1 and R2 are finite differences, and each rank has one sample. The tool counts
the storage of the network's tensors in the last update, on the rank with more, just before the optimizer step.
*Activations* are the growth of resident memory from the start of an update to the end of its forward pass, and *extra
peak* that to the largest memory in it, divided by the bytes of the float32 weights. The extra peak has all that an
update adds: gathered weights, gradients, activations and temporary copies.

    python tools/memory.py
    python tools/memory.py --depth 8 --width 768 --engines ddp fsdp --ranks 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.commands import distgan, under_engine

UPDATES = 3
KINDS = ("weights", "gradients", "masters", "moments", "average")
PLAYERS = ("discriminator", "generator")


def expected(engine: str, ranks: int, player: str) -> list[float]:
    """Return the bytes per parameter of each kind in KINDS on each rank. Everything is float32."""
    zero, fsdp = engine.startswith("zero"), engine == "fsdp"
    return [
        4 / ranks if fsdp else 4,
        4 / ranks if fsdp or engine == "zero2" else 4,
        4 / ranks if zero else 0,
        8 / ranks if fsdp or zero else 8,
        0 if player == "discriminator" else 4 / ranks if fsdp else 4,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=24, help="blocks, a multiple of 4 (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="numbers of processes (default: 2 4)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "fsdp"], help="(default: ddp fsdp)")
    parser.add_argument("--players", nargs="+", choices=PLAYERS, default=PLAYERS, help="(default: both)")
    parser.add_argument(
        "--checkpointing", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="(default: both)"
    )
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "PLAYER", "CHECKPOINTING"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, player, checkpointing = options.worker
        work(Path(folder), player, options.width, options.depth, checkpointing == "True")
        return
    columns = ["engine", "ranks", "player", "parameters, M", "checkpointing", *KINDS]
    columns += ["together", "expected", "activations", "extra peak"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    with tempfile.TemporaryDirectory() as folder:
        distgan("pack", "builtin:digits", f"{folder}/digits", "--resolution", "16")
        for ranks in options.ranks:
            for engine in options.engines:
                check_room(engine, ranks, options.width, options.depth, options.players)
                for player in options.players:
                    for checkpointing in (chosen == "yes" for chosen in options.checkpointing):
                        found = measure(engine, ranks, folder, player, options.width, options.depth, checkpointing)
                        print(row(engine, ranks, player, found, checkpointing), flush=True)


def check_room(engine: str, ranks: int, width: int, depth: int, players: Sequence[str]) -> None:
    """Exit with a message unless the ranks fit into the free memory. Each of them builds the networks whole."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    parameters = (16 if "generator" in players else 12) * depth * width**2
    each = 8 + 16 / ranks if engine == "fsdp" else 28
    free, needed = int(memory["MemAvailable"].split()[0]) * 1024, ranks * (each * parameters + 6e8)
    if free < needed:
        raise SystemExit(f"memory: found {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB; lower --width")


def measure(
    engine: str, ranks: int, folder: str, player: str, width: int, depth: int, checkpointing: bool
) -> dict[str, Any]:
    """Start the ranks, and return what `work` counted on the rank with more.

    Raises:
        SystemExit: a rank failed; the message is the log.
    """
    sizes = ("--width", str(width), "--depth", str(depth))
    command = under_engine(engine, ranks, __file__, "--worker", folder, player, str(checkpointing), *sizes)
    log = Path(folder, "log")
    # Freed memory goes back to the system, so that resident memory is what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with open(log, "wb") as output:
        if subprocess.run(command, stdout=output, stderr=output, env=environment).returncode:
            raise SystemExit(f"{engine}:\n{log.read_text()}")
    found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def row(engine: str, ranks: int, player: str, found: dict[str, Any], checkpointing: bool) -> str:
    """Return one row of the table: bytes per parameter, then parts of the weights' float32 bytes."""
    parameters = found["parameters"]
    measured = [found[kind] / parameters for kind in KINDS]
    numbers = [*measured, sum(measured), sum(expected(engine, ranks, player))]
    numbers += [found["forward"] / parameters / 4, found["peak"] / parameters / 4]
    head = [found["engine"], ranks, player, round(parameters / 1e6), "yes" if checkpointing else "no"]
    return f"| {' | '.join(map(str, head))} | {' | '.join(f'{value:.2f}' for value in numbers)} |"


def recipe(folder: Path, player: str, width: int, depth: int, checkpointing: bool) -> dict[str, Any]:
    """Return a config in which one player has many weights, and few tokens."""
    tiny = {"architecture": "gat", "patch_size": 4, "width": 32, "depth": 4, "heads": 2}
    large = {**tiny, "width": width, "depth": depth, "heads": width // 64}
    difference = {"gamma": 1.0, "method": "finite_difference"}
    players = {role: dict(large if role == player else tiny) for role in PLAYERS}
    players["generator"] |= {"latent_size": 64, "latent_distribution": "normal"}
    players["discriminator"] |= {"projection_size": 64}
    return {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "digits"), "resolution": 16, "channels": 1},
        **players,
        "objective": {"adversarial": "relativistic_paired", "r1": difference, "r2": difference},
        "training": {"steps": UPDATES, "batch_size": 12, "activation_checkpointing": checkpointing},
    }


def work(folder: Path, role: str, width: int, depth: int, checkpointing: bool) -> None:
    """Train as one rank, and write the bytes that it counted to `folder`/found.json."""
    from distgan.config import parse_config
    from distgan.data.index.loading import load_index
    from distgan.distributed.runtime import Runtime, leave_process_group
    from distgan.players.samples import blank_batch
    from distgan.training.setup import assemble

    config = parse_config(recipe(folder, role, width, depth, checkpointing))
    runtime = Runtime()
    state = assemble(config, load_index(config.data.path, config.data.cache_dir), runtime)
    player, average = getattr(state, role), state.average
    batch = blank_batch(1, config, state.shape, runtime.device)
    found: dict[str, int] = {}
    backward = player.engine.backward

    def after_forward(loss: Any) -> None:
        found["forward"] = resident() - found["before"]
        backward(loss)

    def before_step() -> None:
        found.update(held(player, average.network))

    player.engine.backward = after_forward
    for step in range(UPDATES):
        found["before"] = resident(forget_peak=True)
        applied = player.update([batch], (step, step), {"lr": 1e-4}, before_change=before_step)
        if role == "generator":
            average.update(0.5, applied)
        found["peak"] = resident(peak=True) - found["before"]
    ranks = runtime.gather_objects(found)
    parameters = sum(parameter.numel() for parameter in player.network.parameters())
    if runtime.is_main:
        greater: dict[str, Any] = {kind: max(rank[kind] for rank in ranks) for kind in found}
        (folder / "found.json").write_text(
            json.dumps(greater | {"parameters": parameters, "engine": player.engine.name})
        )
    leave_process_group()


def held(player: Any, average: Any) -> dict[str, int]:
    """Return the bytes of each kind. A storage that several tensors share counts once, for the first kind with it."""
    weights = list(player.network.parameters())
    optimizer = player.engine.optimizer
    shares = [share for group in optimizer.param_groups for share in group["params"]]
    # DeepSpeed stores the gradients of a rank's shard here between the backward pass and the step.
    kept = getattr(getattr(player.engine.module, "optimizer", None), "averaged_gradients", {})
    averaged = [gradient for group in kept.values() for gradient in group or ()]
    gradients = [*averaged, *(tensor.grad for tensor in (*weights, *shares))]
    moments = [value for state in optimizer.state.values() for value in state.values()]
    kinds: dict[str, Iterable[Any]] = {
        "weights": weights, "gradients": gradients, "masters": shares, "moments": moments,
        "average": average.parameters() if player.role == "generator" else (),
    }  # fmt: skip
    return _sizes(kinds)


def _sizes(kinds: dict[str, Iterable[Any]]) -> dict[str, int]:
    import torch

    from distgan.distributed.parts import local

    seen: set[int] = set()
    sizes = dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = local(tensor).untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def resident(*, peak: bool = False, forget_peak: bool = False) -> int:
    """Return the resident memory of this process in bytes, or its peak since it was last forgotten."""
    if forget_peak:
        Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


ENGINES = ("ddp", "zero1", "zero2", "fsdp")

if __name__ == "__main__":
    main()
