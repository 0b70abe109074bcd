"""What a user runs first on a new cluster: everything that training will need, looked at and measured."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from distgan.config import Config
from distgan.distributed.runtime import Runtime
from distgan.doctor import dry_run, machine, network, storage
from distgan.doctor.finding import Finding, merge, summary
from distgan.errors import UserError

_TIMEOUT_MINUTES = 3.0


def examine(config: Config | None, say: Callable[[str], None]) -> bool:
    """Look at machine, processes, network and folders, and with a config at its data, detector and some steps.

    Every rank calls it; `say` gets the lines, on rank 0.

    Returns:
        Whether nothing FAILED, as far as this rank knows.
    """
    try:
        runtime = Runtime(timeout_minutes=_TIMEOUT_MINUTES)
    except UserError:
        raise
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        text = (
            f"the processes do not find each other: {reason}; let every node reach MASTER_ADDR at MASTER_PORT, and "
            "name the interface between them with GLOO_SOCKET_IFNAME"
        )
        say(str(Finding("FAILED", "network", text)))
        return False
    findings: list[Finding] = []

    def note(*found: Finding) -> None:
        """Every rank calls it alike."""
        tell(*merge(runtime.gather_objects(found)))

    def tell(*found: Finding) -> None:
        findings.extend(found)
        for finding in found if runtime.is_main else ():
            say(str(finding))

    note(machine.versions(runtime))
    note(machine.packages())
    note(machine.processes(runtime))
    note(
        machine.device(runtime),
        machine.cores(runtime, config.data.num_workers if config else 0),
        machine.shared_memory(),
    )
    note(*network.sums(runtime))
    note(network.clocks(runtime))
    folder: Path = runtime.broadcast_object(storage.nearest_folder(Path(config.run_dir if config else ".")))
    probe = f".distgan-doctor-{runtime.broadcast_object(secrets.token_hex(4))}"
    try:
        note(*storage.shared_folder(runtime, folder, probe))
        if config is None:
            note(storage.room(folder))
        else:
            rate = _look_at_data(config, runtime, note)
            if not _failed(findings):
                # Not `note`: after a failure that rank 0 tells of, other ranks may not be there to be asked.
                tell(*dry_run.training(config, runtime, folder / probe / "run", rate))
    finally:
        if runtime.is_main:
            shutil.rmtree(folder / probe, ignore_errors=True)
    if runtime.is_main:
        say(summary(findings))
    return not _failed(findings)


def _look_at_data(config: Config, runtime: Runtime, note: Callable[..., None]) -> float:
    """Returns the samples a second that can be read."""
    note(dry_run.detector(config))
    index, found = dry_run.index(config, runtime)
    note(found)
    if index is None:
        return 0.0
    if index.any_remote:
        note(storage.shard_cache(config))
    rate, read = dry_run.reading(config, index, runtime)
    note(read)
    return rate


def _failed(findings: list[Finding]) -> bool:
    return any(finding.verdict == "FAILED" for finding in findings)
