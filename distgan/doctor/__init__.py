"""`distgan doctor`: check and measure everything that training needs on a machine or cluster."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from distgan.config import Config
from distgan.distributed.runtime import Runtime
from distgan.doctor import dry_run, machine, network, storage
from distgan.doctor.finding import Finding, announcement, merge, summary
from distgan.errors import UserError

_TIMEOUT_MINUTES = 3.0


def examine(config: Config | None, say: Callable[[str], None]) -> bool:
    """Check machine, processes, network and folders; with a config also its data, its detector and some steps.

    Collective: call on every rank. Rank 0 passes each line of the report to `say`.

    Returns:
        True if no check FAILED, as far as this rank knows.
    """
    try:
        runtime = Runtime(timeout_minutes=_TIMEOUT_MINUTES)
    except UserError:
        raise
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        text = (
            f"the processes cannot connect to each other: {reason}; make MASTER_ADDR:MASTER_PORT reachable from every "
            "node, and set GLOO_SOCKET_IFNAME to the network interface between the nodes"
        )
        say(str(Finding("FAILED", "network", text)))
        return False
    findings: list[Finding] = []

    def note(*found: Finding) -> None:
        """Collective: call on every rank."""
        tell(*merge(runtime.gather_objects(found)))

    def tell(*found: Finding) -> None:
        findings.extend(found)
        for finding in found if runtime.is_main else ():
            say(str(finding))

    def announce(subject: str, text: str) -> None:
        if runtime.is_main:
            say(announcement(subject, text))

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
    folder: Path = runtime.broadcast_object(storage.nearest_folder(config.run_folder if config else Path(".")))
    probe = f".distgan-doctor-{runtime.broadcast_object(secrets.token_hex(4))}"
    try:
        if config is not None and config.run_url is not None:
            note(*(storage.object_store(config.run_url, probe) if runtime.is_main else ()))
        else:
            note(*storage.shared_folder(runtime, folder, probe))
        if config is None:
            note(storage.room(folder))
        else:
            config, launcher = dry_run.launcher(config)
            note(launcher)
            rate = _look_at_data(config, runtime, note, tell, announce)
            if not _failed(findings):
                announce("training", f"{dry_run.STEPS} steps in a folder that is removed; minutes if they are slow")
                # Not `note`, which is collective: after a failure on rank 0, other ranks may have exited.
                tell(*dry_run.training(config, runtime, f"{config.run_url or folder}/{probe}/run", rate))
    finally:
        if runtime.is_main:
            shutil.rmtree(folder / probe, ignore_errors=True)
    if runtime.is_main:
        say(summary(findings))
    return not _failed(findings)


def _look_at_data(
    config: Config,
    runtime: Runtime,
    note: Callable[..., None],
    tell: Callable[..., None],
    announce: Callable[[str, str], None],
) -> float:
    """Check the data and return its reading rate in samples/s. Collective: call on every rank."""
    note(*(dry_run.trackers(config) if runtime.is_main else ()))
    index, found = dry_run.index(config, runtime)
    note(found)
    if index is None:
        return 0.0
    for finding in dry_run.detectors(config):
        note(finding)
    if index.any_remote:
        note(storage.shard_cache(config))
    announce("reading", "samples of the shards; remote shards are fetched first")
    rate, read = dry_run.reading(config, index, runtime)
    note(read)
    tell(*dry_run.warnings(config, index, runtime))
    return rate


def _failed(findings: list[Finding]) -> bool:
    return any(finding.verdict == "FAILED" for finding in findings)
