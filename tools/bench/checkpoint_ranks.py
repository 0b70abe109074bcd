"""Measure a checkpoint of FSDP2 ranks: a part written by each rank, against all of it gathered and written by rank 0.

The state is the weights of a network and two moments, sharded over the ranks, and an average that each rank has whole.
Each measurement is one checkpoint in fresh processes: extra peak memory of rank 0 (anonymous pages, sampled), seconds
until training may change the tensors, and seconds until the checkpoint is published. The variants alternate.

    python tools/bench/checkpoint_ranks.py --parameters 200 --ranks 2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import tempfile
import threading
import time
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from distgan.checkpoint.writer import CheckpointWriter
from distgan.distributed.control import Control
from distgan.distributed.parts import local_part

_WIDTH = 2048
"""Rows and columns of each weight: 4.2 million parameters."""


def make_sets(millions: int) -> dict[str, dict[str, torch.Tensor]]:
    """Sharded weights and moments, and a whole average, of a network of so many million parameters."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = max(1, round(millions * 1e6 / _WIDTH**2))
    rows = _WIDTH // dist.get_world_size()

    def sharded() -> DTensor:
        return DTensor.from_local(torch.randn(rows, _WIDTH), mesh, [Shard(0)])

    names = [f"layer{number}.weight" for number in range(layers)]
    return {
        "generator": {name: sharded() for name in names},
        "generator_optimizer": {f"{name}/{kind}": sharded() for name in names for kind in ("exp_avg", "exp_avg_sq")},
        "generator_ema": {name: torch.randn(_WIDTH, _WIDTH) for name in names},
    }


class PeakMemory:
    """Largest anonymous memory of this process beyond that at the start, in bytes."""

    def __init__(self) -> None:
        self._first = self._largest = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self._largest - self._first

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self._largest = max(self._largest, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(rank: int, world_size: int, port: int, variant: str, millions: int, folder: str, out: str) -> None:
    """Write one checkpoint on one rank. Rank 0 writes its figures to the file `out`."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = [Control(timedelta(minutes=30)) for _ in range(2)]
    sets = make_sets(millions)
    groups[0].barrier()
    memory, started = PeakMemory(), time.perf_counter()
    if variant == "part per rank":
        held = {name: {key: local_part(tensor) for key, tensor in of.items()} for name, of in sets.items()}
        with closing(CheckpointWriter(Path(folder), keep=1, ranks=groups[0], background=groups[1])) as writer:
            writer.save(1, held, {})
            writer.copied()
            stall = time.perf_counter() - started
    else:
        whole = {name: {key: gathered(tensor) for key, tensor in of.items()} for name, of in sets.items()}
        stall = time.perf_counter() - started
        if rank == 0:
            with closing(CheckpointWriter(Path(folder), keep=1)) as writer:
                writer.save(1, whole, {})
                writer.copied()
                stall = time.perf_counter() - started
    if rank == 0:
        assert writer.last_good is not None
        figures = {"extra": memory.end(), "stall": stall, "total": time.perf_counter() - started}
        Path(out).write_text(json.dumps(figures))
    groups[0].barrier()


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor on rank 0. Other ranks get an empty one."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole if dist.get_rank() == 0 else whole.new_empty(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=200, help="parameters in millions (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="checkpoints of each variant (default: %(default)s)")
    parser.add_argument("--folder", help="folder to write to (default: a temporary folder)")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    variants = ["gathered on rank 0", "part per rank"]
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for number in range(options.rounds):
        for variant in sorted(variants, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder, socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
                probe.close()
                given = options.ranks, port, variant, options.parameters, f"{folder}/checkpoints", f"{folder}/figures"
                ranks = [spawn.Process(target=measure, args=(rank, *given)) for rank in range(options.ranks)]
                for process in ranks:
                    process.start()
                for process in ranks:
                    process.join()
                found[variant].append(json.loads(Path(folder, "figures").read_text()))
    print(
        f"{options.parameters} M parameters on {options.ranks} ranks, {options.rounds} rounds, {os.cpu_count()} cores, "
        f"torch {torch.__version__}. Medians.\n\n"
        "| | extra memory of rank 0 | ratio | stall | total | ratio |\n| --- | --- | --- | --- | --- | --- |"
    )
    middle = {
        variant: {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        for variant, rounds in found.items()
    }
    first = middle[variants[0]]
    for variant, figures in middle.items():
        print(
            f"| {variant} | {figures['extra'] / 1e9:.2f} GB | {figures['extra'] / first['extra']:.2f} "
            f"| {figures['stall']:.1f} s | {figures['total']:.1f} s | {figures['total'] / first['total']:.2f} |"
        )


if __name__ == "__main__":
    main()
