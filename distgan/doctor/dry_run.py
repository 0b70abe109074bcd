"""Dry run of a recipe: read its data, find its detector, and train some steps in a temporary folder."""

from __future__ import annotations

import json
import logging
import shutil
import time
from contextlib import suppress
from pathlib import Path

from distgan.config import Config, DetectorConfig, parse_config
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.storage.objects import ObjectFolder
from distgan.data.stream import open_rank_stream
from distgan.distributed.launcher_settings import filled_keys, with_launcher_settings
from distgan.distributed.runtime import Runtime
from distgan.doctor.finding import Finding
from distgan.doctor.storage import room
from distgan.errors import LostRankError, UserError, counted
from distgan.monitoring.trackers import check_installed
from distgan.training.setup import validate_evaluation, validate_run
from distgan.training.warnings import run_warnings

_READ_SECONDS = 2.0
STEPS = 20
"""Number of steps that the doctor trains."""
_AMPLE = 1.2
"""Smallest ratio of reading rate to training rate without a warning."""


def index(config: Config, runtime: Runtime) -> tuple[Index | None, Finding]:
    """Load the index and check that all ranks load the same one. Collective: call on every rank."""
    found, mistake = None, None
    try:
        found = load_index(config.data.path, config.data.cache_dir)
        validate_run(config, found, runtime.world_size)
        validate_evaluation(config, found)
    except UserError as error:
        mistake = str(error)
    answers = runtime.gather_objects((mistake, found.fingerprint if found else None))
    wrong = [rank for rank, (text, _) in enumerate(answers) if text]
    if wrong:
        where = "" if len(wrong) == runtime.world_size else f"rank {', '.join(map(str, wrong))}: "
        return None, Finding("FAILED", "data", f"{where}{answers[wrong[0]][0]}")
    others = [rank for rank, answer in enumerate(answers) if answer != answers[0]]
    if others:
        text = f"rank {', '.join(map(str, others))}: shards differ from those of rank 0"
        return None, Finding("FAILED", "data", f"{text}; copy the same shards and index to every node")
    assert found is not None
    samples, shards = counted(len(found), "sample"), counted(len(found.shards), "shard")
    return found, Finding("ok", "data", f"{samples} in {shards}, fingerprint {found.fingerprint[:12]}")


def warnings(config: Config, found: Index, runtime: Runtime) -> list[Finding]:
    """Return what a run would warn of at its start, on rank 0."""
    if not runtime.is_main:
        return []
    return [Finding("warning", "recipe", text) for text in run_warnings(config, found, runtime.device)]


def reading(config: Config, found: Index, runtime: Runtime) -> tuple[float, Finding]:
    """Measure the samples/s that all ranks together read and decode. Collective: call on every rank."""
    failures, count, mistake = [], 0, None
    seconds = 1.0
    try:
        stream = open_rank_stream(
            config.data, config.seed, found, start=0, micro_batch=config.micro_batch,
            rank=runtime.rank, world_size=runtime.world_size,
        )  # fmt: skip
        try:
            failures += next(stream).failures
            started = time.perf_counter()
            while (seconds := time.perf_counter() - started) < _READ_SECONDS:
                batch = next(stream)
                failures += batch.failures
                count += len(batch.positions)
        finally:
            stream.close()
    except UserError as error:
        mistake = str(error)
    mistakes = [text for text in runtime.gather_objects(mistake) if text]
    if mistakes:
        return 0.0, Finding("FAILED", "reading", mistakes[0])
    rate = sum(runtime.gather_objects(count / seconds))
    unreadable = [failure for some in runtime.gather_objects(failures) for failure in some]
    if unreadable:
        fix = "find the damaged shards with `distgan index --verify`"
        text = f"{counted(len(unreadable), 'sample')} cannot be read; the first one: {unreadable[0].reason}; {fix}"
        return rate, Finding("FAILED", "reading", text)
    workers = f"data.num_workers = {config.data.num_workers}"
    return rate, Finding("ok", "reading", f"{rate:,.0f} samples/s over all ranks with {workers}")


def detectors(config: Config) -> list[Finding]:
    """Check that the detectors of evaluations are available."""
    if not config.evaluation.every:
        return [Finding("ok", "detector", "not needed while training: evaluation.every is 0")]
    if not config.detectors:
        labels = ", ".join(metric.label for metric in config.metrics)
        return [Finding("ok", "detector", f"not needed by evaluation.metrics = {labels}")]
    return [_detector(section, config) for section in config.detectors]


def _detector(section: DetectorConfig, config: Config) -> Finding:
    if section.is_trained_on_labels:
        return Finding("ok", "detector", f"{section.detector}; the first evaluation trains it on the shards")
    if not section.is_built_in:
        return Finding("ok", "detector", f"{section.detector}, a detector of your own")
    from distgan.evaluation.detectors.features import evaluation_folder
    from distgan.evaluation.detectors.published import implementation, in_config

    name, weights, wording = section.detector, section.arguments["weights"], in_config(section.detector)
    try:
        published = implementation(name, wording).PUBLISHED
    except UserError as error:
        return Finding("FAILED", "detector", str(error))
    file = published.path(weights, evaluation_folder(config.evaluation))
    if file is not None and file.is_file():
        return Finding("ok", "detector", f"found the weights of {name}: {file}")
    if weights:
        return Finding("FAILED", "detector", f"detector {name}: weights = {file}: no such file; correct the path")
    text = f"no weights of {name} yet; the first evaluation downloads {published.address}"
    fix = f"without internet, copy that file to this machine and set {wording.weights}"
    return Finding("warning", "detector", f"{text}; {fix}")


def launcher(config: Config) -> tuple[Config, Finding]:
    """Return the config as training gets it from this launcher, and whether the two agree."""
    try:
        launched = with_launcher_settings(config)
    except UserError as error:
        return config, Finding("FAILED", "launcher", str(error))
    filled = ", ".join(f"{key} = {str(value).lower()}" for key, value in filled_keys(config, launched).items())
    return launched, Finding("ok", "launcher", f"sets {filled}" if filled else "sets no key of the config")


def trackers(config: Config) -> list[Finding]:
    """Check that the packages of the experiment trackers are installed. Only rank 0 needs them."""
    try:
        check_installed(config.monitoring.trackers)
    except UserError as error:
        return [Finding("FAILED", "trackers", str(error))]
    return []


def training(config: Config, runtime: Runtime, place: str, read_rate: float) -> list[Finding]:
    """Train some steps. Collective: call on every rank.

    Args:
        place: temporary run folder, or its URL, whose objects and local copies are removed.

    Returns:
        Rank 0's findings, or the failure of this rank.
    """
    short = parse_config(config.model_dump(mode="json"), [
        f"run_dir={place}", f"training.steps={STEPS}", "training.initial_critic_steps=0", "evaluation.every=0",
        f"monitoring.every={STEPS // 2}", "monitoring.samples_every=1000000", "monitoring.tensorboard=false",
        "monitoring.trackers=[]", "checkpoint.every=1000000",
    ])  # fmt: skip
    folder = short.run_folder
    try:
        return _train(short, runtime, folder, read_rate, keep=config.checkpoint.keep)
    finally:
        if short.run_url is not None:
            shutil.rmtree(folder.parent, ignore_errors=True)
            if runtime.is_main:
                with suppress(OSError, UserError):
                    objects = ObjectFolder(short.run_url)
                    objects.remove(objects.names())


def _train(config: Config, runtime: Runtime, folder: Path, read_rate: float, *, keep: int) -> list[Finding]:
    from distgan.training.loop import train

    logging.disable(logging.WARNING)  # `warnings` reports them
    try:
        train(config)
    except (UserError, LostRankError) as error:
        return [Finding("FAILED", "training", str(error))]
    except Exception as error:  # the report must include any failure
        return [Finding("FAILED", "training", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
    finally:
        logging.disable(logging.NOTSET)
    if not runtime.is_main:
        return []
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    rate = row["speed/images_per_second"]
    waiting = row["speed/data_wait_seconds"] / row["speed/step_seconds"]
    said = f"{rate:,.0f} samples/s; each rank waits for data {waiting:.0%} of the time"
    size = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    findings = [room(folder.parent.parent, checkpoint=size, keep=keep)]
    if read_rate < _AMPLE * rate:
        fix = "raise data.num_workers, or move the shards to faster storage"
        text = f"{said}; reading alone reaches {read_rate:,.0f} samples/s; {fix}"
        return [Finding("warning", "training", text), *findings]
    return [Finding("ok", "training", said), *findings]
