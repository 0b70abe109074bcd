"""Measure the bytes per rank of a large generator under each engine, against theory.

Two processes under `accelerate launch` train an R3GAN generator of 308 million parameters against a tiny discriminator
on a batch of two. The tool counts the storage of every reachable tensor in the generator's last update, on the rank
with more. It counts by kind before the optimizer step, and in total when the backward pass reaches the first layer.
The peak is the growth of resident memory since before the networks were built, including temporary copies and
activations.

    python tools/memory.py
    python tools/memory.py --width 256 --engines ddp zero2
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.commands import distgan, under_engine

UPDATES = 3
BATCH = 2
KINDS = ("weights", "gradients", "masters", "moments", "average")
BYTES: dict[str, tuple[float, ...]] = {
    "ddp": (4, 4, 0, 8, 4),
    "zero1": (4, 4, 4 / 2, 8 / 2, 4),
    "zero2": (4, 4 / 2, 4 / 2, 8 / 2, 4),
    "fsdp": (4 / 2, 4 / 2, 0, 8 / 2, 4),
}
"""Engine -> expected bytes per parameter of each kind in KINDS, on each of two ranks. Everything is float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--width", type=int, default=3584, help="generator width, a multiple of 16 (default: %(default)s)"
    )
    parser.add_argument("--engines", nargs="+", choices=BYTES, default=list(BYTES), help="engines (default: all)")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(Path(options.worker), options.width)
        return
    check_room(options.width)
    print(
        f"| bytes per parameter | {' | '.join(KINDS)} | together | expected | in the backward pass | peak, GB |\n"
        f"|{' --- |' * (len(KINDS) + 5)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        distgan("pack", "builtin:digits", f"{folder}/digits", "--resolution", "16")
        for engine in options.engines:
            print(row(engine, measure(engine, folder, options.width)), flush=True)


def check_room(width: int) -> None:
    """Exit with a message unless two DDP ranks fit into the free memory at their peak."""
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, needed = int(memory["MemAvailable"].split()[0]) * 1024, 2 * 28 * 24 * width**2 + 2e9
    if free < needed:
        raise SystemExit(f"memory: found {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB; lower --width")


def measure(engine: str, folder: str, width: int) -> dict[str, Any]:
    """Start two ranks, and return the bytes of each kind on the rank with more, and the generator's `parameters`.

    Raises:
        SystemExit: a rank failed; the message is the log.
    """
    command = under_engine(engine, 2, __file__, "--worker", folder, "--width", str(width))
    log = Path(folder, "log")
    with open(log, "wb") as output:
        if subprocess.run(command, stdout=output, stderr=output).returncode:
            raise SystemExit(f"{engine}:\n{log.read_text()}")
    found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
    return found


def row(engine: str, found: dict[str, Any]) -> str:
    """Return one row of the table."""
    measured = [found[kind] / found["parameters"] for kind in KINDS]
    columns = [*measured, sum(measured), sum(BYTES[engine]), found["backward"] / found["parameters"]]
    return f"| {found['engine']} | {' | '.join(f'{value:.2f}' for value in columns)} | {found['peak'] / 1e9:.1f} |"


def recipe(folder: Path, width: int) -> dict[str, Any]:
    """Return a config whose generator has many weights and small activations, of at most 16x16 pixels."""
    r3gan = {"architecture": "r3gan", "normalization": "none", "optimizer": {"betas": (0.0, 0.99)}}
    return {
        "run_dir": str(folder / "run"),
        "data": {"path": str(folder / "digits"), "resolution": 16, "channels": 1},
        "generator": {**r3gan, "width": width, "max_width": width, "latent_size": 64},
        "discriminator": {**r3gan, "width": 16, "max_width": 16},
        "objective": {"adversarial": "relativistic_paired", "r1": {"gamma": 1.0}, "r2": {"gamma": 1.0}},
        "training": {"steps": UPDATES, "batch_size": BATCH},
    }


def work(folder: Path, width: int) -> None:
    """Train as one rank, and write the bytes that it counted to `folder`/found.json."""
    from distgan.config import parse_config
    from distgan.data.index.loading import load_index
    from distgan.distributed.runtime import Runtime, leave_process_group
    from distgan.players.samples import blank_batch
    from distgan.training.setup import assemble

    config = parse_config(recipe(folder, width))
    runtime = Runtime()
    before = resident()
    state = assemble(config, load_index(config.data.path, config.data.cache_dir), runtime)
    player, average = state.generator, state.average
    parameters = sum(parameter.numel() for parameter in player.network.parameters())
    batch = blank_batch(BATCH // runtime.world_size, config, state.shape, runtime.device)
    found: dict[str, int] = {}

    def count_in_backward(_: Any) -> None:
        found["backward"] = sum(held(player, average.network).values())

    def count_before_step() -> None:
        found.update(held(player, average.network))

    def watch_backward(_module: Any, _inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(count_in_backward)

    player.network.get_submodule("stages.0.0.scale").register_forward_hook(watch_backward)
    for step in range(UPDATES):
        state.discriminator.update([batch], (step, step), {"lr": 1e-4})
        applied = player.update([batch], (step,), {"lr": 1e-4}, before_change=count_before_step)
        with runtime.full_params(player.network):
            average.update(0.5, applied)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    ranks = runtime.gather_objects(found)
    if runtime.is_main:
        greater: dict[str, Any] = {kind: max(rank[kind] for rank in ranks) for kind in found}
        greater |= {"parameters": parameters, "engine": player.engine.name}
        (folder / "found.json").write_text(json.dumps(greater))
    leave_process_group()


def held(player: Any, average: Any) -> dict[str, int]:
    """Return the bytes of each kind. A storage that several tensors share counts once, for the first kind with it."""
    import torch

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
        "average": average.parameters(),
        "buffers": [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)],
    }  # fmt: skip
    seen: set[int] = set()
    sizes = dict.fromkeys(kinds, 0)
    for kind, tensors in kinds.items():
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard
            storage = local.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[kind] += storage.nbytes()
    return sizes


def resident() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
