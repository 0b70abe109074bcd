"""A recipe tried out: its data read, its detector found, and some steps of it trained in a folder of their own."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from distgan.config import Config, parse_config
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.data.stream import open_stream
from distgan.distributed.runtime import Runtime
from distgan.doctor.finding import Finding
from distgan.doctor.storage import room
from distgan.errors import LostRankError, UserError
from distgan.packages import is_installed
from distgan.training.setup import validate_run

_READ_SECONDS = 2.0
_STEPS = 20
_AMPLE = 1.2
"""How much faster than training reading should be, so that training never waits."""


def index(config: Config, runtime: Runtime) -> tuple[Index | None, Finding]:
    """The index that this rank finds, and whether all find the same. Every rank calls it."""
    found, mistake = None, None
    try:
        found = load_index(config.data.path, config.data.cache_dir)
        validate_run(config, found, runtime.world_size)
    except UserError as error:
        mistake = str(error)
    answers = runtime.gather_objects((mistake, found.fingerprint if found else None))
    wrong = [rank for rank, (text, _) in enumerate(answers) if text]
    if wrong:
        where = "" if len(wrong) == runtime.world_size else f"rank {', '.join(map(str, wrong))}: "
        return None, Finding("FAILED", "data", f"{where}{answers[wrong[0]][0]}")
    others = [rank for rank, answer in enumerate(answers) if answer != answers[0]]
    if others:
        text = f"rank {', '.join(map(str, others))} has other shards than rank 0"
        return None, Finding("FAILED", "data", f"{text}; give every node the same, with their index")
    assert found is not None
    shards = f"{len(found)} samples in {len(found.shards)} shards, fingerprint {found.fingerprint[:12]}"
    return found, Finding("ok", "data", shards)


def reading(config: Config, found: Index, runtime: Runtime) -> tuple[float, Finding]:
    """Samples a second that all ranks together read and decode, as training would. Every rank calls it."""
    failures, count, mistake = [], 0, None
    seconds = 1.0
    try:
        stream = open_stream(
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
        fix = "`distgan index --verify` tells which shards are damaged"
        text = f"{len(unreadable)} samples cannot be read, such as {unreadable[0].reason}; {fix}"
        return rate, Finding("FAILED", "reading", text)
    return rate, Finding("ok", "reading", f"{rate:,.0f} samples/s by all ranks, {config.data.num_workers} loaders each")


def detector(config: Config) -> Finding:
    """Whether what an evaluation compares features of is there."""
    settings = config.evaluation
    if not settings.every:
        return Finding("ok", "detector", "not needed while training: evaluation.every is 0")
    if settings.detector == "classifier":
        return Finding("ok", "detector", "a classifier, trained on the shards by the first evaluation")
    if not is_installed("torch_fidelity"):
        return Finding("FAILED", "detector", "evaluation.detector = inception needs torch-fidelity; pip install it")
    from distgan.evaluation.detectors.features import evaluation_folder
    from distgan.evaluation.detectors.inception import weights_file

    file = weights_file(settings.inception_weights, evaluation_folder(settings))
    if file.is_file():
        return Finding("ok", "detector", f"Inception's weights are in {file}")
    if settings.inception_weights:
        return Finding("FAILED", "detector", f"evaluation.inception_weights = {file}: not there; name the file")
    text = f"Inception's weights are not in {file} yet, so the first evaluation downloads them"
    fix = "if the nodes cannot, run `distgan evaluate` where there is internet, with the same cache"
    return Finding("warning", "detector", f"{text}; {fix}")


def training(config: Config, runtime: Runtime, folder: Path, read_rate: float) -> list[Finding]:
    """Some steps in a folder of their own: what rank 0 finds, or what went wrong. Every rank calls it."""
    from distgan.training.loop import train

    short = parse_config(config.model_dump(mode="json"), [
        f"run_dir={folder}", f"training.steps={_STEPS}", "training.initial_critic_steps=0", "evaluation.every=0",
        f"monitoring.every={_STEPS // 2}", "monitoring.samples_every=1000000", "monitoring.tensorboard=false",
        "checkpoint.every=1000000",
    ])  # fmt: skip
    logging.disable(logging.INFO)
    try:
        train(short)
    except (UserError, LostRankError) as error:
        return [Finding("FAILED", "training", str(error))]
    except Exception as error:  # whatever it is, the user asked for a verdict
        return [Finding("FAILED", "training", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]
    finally:
        logging.disable(logging.NOTSET)
    if not runtime.is_main:
        return []
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    rate = row["speed/images_per_second"]
    waiting = row["speed/data_wait_seconds"] / row["speed/step_seconds"]
    said = f"{rate:,.0f} samples/s, of which a rank waits {waiting:.0%} for data"
    size = sum(file.stat().st_size for file in folder.glob("checkpoints/step-*/*"))
    findings = [room(folder.parent.parent, checkpoint=size, keep=config.checkpoint.keep)]
    if read_rate < _AMPLE * rate:
        fix = "raise data.num_workers, or bring the shards nearer"
        return [Finding("warning", "training", f"{said}; reading alone makes {read_rate:,.0f}; {fix}"), *findings]
    return [Finding("ok", "training", said), *findings]
