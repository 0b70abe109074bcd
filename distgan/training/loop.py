"""The training loop."""

from __future__ import annotations

import gc
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from typing import NamedTuple

import torch

from distgan.checkpoint.averages import write_snapshot
from distgan.checkpoint.contents import ACCEPTABLE
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import Config
from distgan.data.index.loading import load_index
from distgan.data.index.table import Index
from distgan.distributed.launcher_settings import filled_keys, with_launcher_settings
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, within_memory
from distgan.extensions import refresh_digests
from distgan.monitoring.console import setup_logging
from distgan.monitoring.diagnosis import why_stop
from distgan.monitoring.trackers import check_installed
from distgan.players.reconstruction import has_started
from distgan.randomness import derive_key
from distgan.runs.outcome import Attempt, Result, record_outcome
from distgan.runs.shared import check_shared
from distgan.runs.stop_request import StopRequest
from distgan.schedule import (
    discriminator_updates,
    ema_decay,
    generator_batch_size,
    optimizer_settings,
    rate_at_resolution,
    snapshot_due,
)
from distgan.training.divergence import (
    Decision,
    decide,
    fail_with_skipped_updates,
    metric_divergence,
    skipped_updates,
)
from distgan.training.evaluations import Evaluations
from distgan.training.inputs import Feed
from distgan.training.micro_batches.memory import batch_memory
from distgan.training.micro_batches.trials import settle_accumulation
from distgan.training.monitor import Monitor
from distgan.training.result import Callbacks, RunResult
from distgan.training.resume import open_writer, resume_run, save, upload_rest
from distgan.training.setup import assemble, check_files, check_ranks_agree, validate_evaluation, validate_run
from distgan.training.state import Progress, TrainingState
from distgan.training.warnings import log_warnings

logger = logging.getLogger("distgan")


def train(
    config: Config, *, resume: str = "auto", accept: Iterable[str] = (), callbacks: Callbacks | None = None
) -> RunResult:
    """Train a run to its last step or until a stop request. Collective: call on every rank.

    In your own program under a launcher, call `torch.distributed.destroy_process_group()` after the last `train` or
    `evaluate`.

    Args:
        resume: `auto` continues from the newest valid checkpoint of the run folder, if there is one. `never` moves the
            content of the run folder aside and starts at step 0. Any other value is the path of a checkpoint or run.
        accept: accepted differences from the checkpoint, from `contents.ACCEPTABLE`.
        callbacks: functions to call between steps.

    Returns:
        The outcome, `finished`, `preempted` or `diverged`, as in status.json of the run folder, with what the run left.

    Raises:
        UserError: the config, data, checkpoint, run folder or launch is wrong; the message gives the fix.
        RuntimeError: a callback failed.
    """
    if not resume:
        raise UserError("--resume: empty; expected auto, never, or the path of a checkpoint or run", everywhere=True)
    if resume != "auto" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            f"--resume {resume}: the launcher would repeat it at each of its restarts; launch with --max-restarts 0 "
            "(MAX_RESTARTS=0 for node.sh), then remove --resume for later launches",
            everywhere=True,
        )
    refresh_digests()
    accepted = frozenset(accept)
    if unknown := accepted.difference(ACCEPTABLE):
        raise UserError(f"--accept {min(unknown)}: expected one of {', '.join(ACCEPTABLE)}", everywhere=True)
    runtime = Runtime(
        deterministic=config.training.deterministic,
        timeout_minutes=max(config.training.startup_timeout_minutes, config.training.timeout_minutes),
        gradients_in_bf16=config.training.gradient_precision == "bf16",
        tf32=config.training.mixed_precision == "tf32",
    )
    setup_logging(runtime.rank)
    recorded = record_outcome(config, runtime, fresh=resume == "never")
    with StopRequest(config.run_folder, main=runtime.is_main) as stop, recorded as attempt:
        with runtime.raise_on_all_ranks():
            config = _launched(config, runtime)
            index = load_index(config.data.path, config.data.cache_dir)
            validate_run(config, index, runtime.world_size)
            if runtime.is_main:
                check_installed(config.monitoring.trackers)
                check_files(config)
            validate_evaluation(config, index)
        check_ranks_agree(config, index, runtime)
        if attempt.remote is None:
            check_shared(config.run_folder, runtime)
        log_warnings(config, index, runtime)
        config = settle_accumulation(config, index, runtime, resume, accepted, attempt.exhausted, attempt.remote)
        train_part = partial(_train_part, config, index, runtime, stop, attempt, callbacks or Callbacks())
        end = train_part(resume, accepted)
        while end.decision is not None and end.decision.checkpoint is not None:
            attempt.roll_back(end.decision.reason)
            # All is built again, so that every engine starts from a checkpoint as it does on a resume.
            gc.collect()
            if config.training.compile:
                torch.compiler.reset()
            runtime.set_timeout(max(config.training.startup_timeout_minutes, config.training.timeout_minutes))
            accepted |= end.progress.accepted
            end = train_part(str(end.decision.checkpoint), accepted, rollback=end.decision)
        why = {"preempted": stop.reason, "finished": end_reason(config, end.progress)}.get(end.result)
        reason = attempt.finish(end.result, end.progress.step, end.decision.reason if end.decision else why)
        return RunResult(end.result, end.progress.step, reason, end.progress.best, config.run_folder, config.run_url)


class _End(NamedTuple):
    """How a part of a run, up to its end or to a rollback, ended."""

    result: Result
    decision: Decision | None
    """What is done about a divergence; None if there was none."""
    progress: Progress


def _train_part(
    config: Config,
    index: Index,
    runtime: Runtime,
    stop: StopRequest,
    attempt: Attempt,
    callbacks: Callbacks,
    resume: str,
    accepted: frozenset[str],
    *,
    rollback: Decision | None = None,
) -> _End:
    """Train from a checkpoint, or from step 0, until the run ends or diverges. Collective: call on every rank."""
    state = assemble(config, index, runtime)
    if runtime.is_main and runtime.world_size > 1 and rollback is None:
        logger.info("%d ranks train with %s", runtime.world_size, state.generator.engine.name)
    with ExitStack() as held:
        held.enter_context(within_memory(*_beside_updates(config)))
        with runtime.raise_on_all_ranks():
            # First, because it publishes a complete checkpoint that a killed process had not yet renamed.
            writer = held.enter_context(closing(open_writer(config, runtime, attempt.remote)))
            resume_run(config, state, runtime, resume, accepted, attempt.remote, rolls_back=rollback is not None)
            feed = held.enter_context(closing(Feed(state, runtime)))
            evaluations = Evaluations(state, feed.latents, runtime, stop)
            monitor = held.enter_context(closing(Monitor(state, feed, evaluations, writer, runtime)))
        attempt.begin()
        if rollback is not None:
            monitor.note(rollback.reason)
            # Written anew with the rollback, so that a run that is killed from here on continues after it.
            save(state, feed, writer, runtime, is_best=True)
        result, decision = run(state, feed, monitor, writer, runtime, stop, callbacks)
        if decision is not None and decision.checkpoint is None:
            monitor.note(decision.reason)
        if attempt.remote is not None and (decision is None or decision.checkpoint is None):
            upload_rest(writer, attempt.remote, runtime)
    if decision is not None and decision.checkpoint is not None:
        for player in state.players:
            player.engine.close()
    return _End(result, decision, state.progress)


def _beside_updates(config: Config) -> tuple[str, str]:
    """Return the keys that need memory between updates, and what to do if there is too little, for `within_memory`."""
    keys = f"evaluation.batch_size = {config.evaluation.batch_size}, monitoring.num_samples = "
    return f"{keys}{config.monitoring.num_samples}: beside the updates", "lower them, or train on more memory"


def _launched(config: Config, runtime: Runtime) -> Config:
    """Return the config with the settings of the launcher; see `with_launcher_settings`."""
    launched = with_launcher_settings(config)
    for key, value in filled_keys(config, launched).items() if runtime.is_main else ():
        logger.info("%s = %s, as accelerate launch sets it", key, str(value).lower())
    return launched


def run(
    state: TrainingState,
    feed: Feed,
    monitor: Monitor,
    writer: CheckpointWriter,
    runtime: Runtime,
    stop: StopRequest,
    callbacks: Callbacks,
) -> tuple[Result, Decision | None]:
    """Run the remaining steps.

    Returns:
        `preempted` if a stop request ended the run early, `diverged` with what to do if it diverged for good, else
        `finished`.
    """
    config, progress = state.config, state.progress
    report = monitor.before_first_step()
    stopping = report.evaluation_left
    if report.metrics:
        callbacks.call("on_evaluation", progress.step, report.metrics)
    if (stopping or report.is_best) and save(state, feed, writer, runtime, last=stopping, is_best=report.is_best):
        callbacks.call("on_checkpoint", progress.step)
    decision: Decision | None = None
    if not (stopping or is_done(state)) and (why := metric_divergence(state)):
        decision = decide(state, writer, runtime, why)
    flags = runtime.exchange([False, False])
    while not (stopping or decision or is_done(state)):
        with batch_memory(config, runtime.world_size):
            train_step(state, feed, runtime, before_change=writer.copied)
        # The first step may compile kernels. From the second step on, a timeout means that a rank is lost.
        runtime.set_timeout(config.training.timeout_minutes)

        # The flags are read one step later, so that no step waits for the all-reduce.
        stopping, unreadable = flags.result()
        flags = runtime.exchange([stop.requested, bool(feed.failures)])
        if unreadable:
            feed.share_failures()
        stuck = skipped_updates(state) if progress.step % config.monitoring.every == 0 else None
        if stuck is not None and config.training.on_divergence is None:
            fail_with_skipped_updates(state, writer, runtime, stuck)
        callbacks.call("on_step", progress.step)
        report = monitor.after_step(evaluate=not stopping)
        if report.metrics:
            callbacks.call("on_evaluation", progress.step, report.metrics)
        stopping = stopping or report.evaluation_left
        last = stopping or is_done(state)
        why = stuck or (None if last else metric_divergence(state))
        if why is not None and not stopping:
            decision = decide(state, writer, runtime, why)
            # A start of the same command then ends at once. After skipped updates, the last good checkpoint stays last.
            last = decision.checkpoint is None and stuck is None
        # What a rollback gives up is not saved.
        due = last or report.is_best or (decision is None and progress.step % config.checkpoint.every == 0)
        if due and save(state, feed, writer, runtime, last=last, is_best=report.is_best):
            callbacks.call("on_checkpoint", progress.step)
    flags.result()
    if decision is not None:
        return "diverged", decision
    return ("finished" if is_done(state) and not report.evaluation_left else "preempted"), None


def train_step(
    state: TrainingState, feed: Feed, runtime: Runtime, *, before_change: Callable[[], None] | None = None
) -> None:
    """Run the discriminator updates of one step, then the generator update, then the EMA update.

    Before the adversarial term of an autoencoder starts (`has_started`), the discriminator is not updated.

    Args:
        before_change: called before each change of a tensor that a checkpoint holds.
    """
    config, progress = state.config, state.progress
    step, images = progress.step, progress.images
    updates = list(discriminator_updates(config, step, progress.used))
    rate = rate_at_resolution(config, images)
    settings = optimizer_settings(config.discriminator.optimizer, step, images, state.length, rate)
    started = has_started(config.objective.reconstruction, images)
    for update in updates:
        seed_default_generator(state.seed, update.index, runtime.rank)
        batches = feed.discriminator_inputs(update)
        if started:
            applied = state.discriminator.update(batches, (images, update.index), settings, before_change=before_change)
            if state.controller is not None:
                signs = [values["augmentation/sign"] for values in state.discriminator.latest]
                state.controller.update(signs, applied, index=update.index, images=update.batch_size)
        else:  # read all the same, so that positions are those of the schedule, and the generator gets its reals
            deque(batches, maxlen=0)
        progress.position += update.batch_size
        progress.images += update.batch_size
    settings = optimizer_settings(config.generator.optimizer, step, images, state.length, rate)
    batches = feed.generator_inputs(step)
    applied = state.generator.update(batches, (images, step), settings, before_change=before_change)
    if config.generator_draws_reals:
        progress.position += generator_batch_size(config, images)
    # The EMA decay counts a long critic phase (initial_critic_steps) as one normal step.
    usual = config.training.critic_steps * updates[-1].batch_size
    state.average.update(ema_decay(config.ema, images, usual, state.length), applied)
    state.profiles.update(images, progress.images - images, applied)
    if snapshot_due(config.ema, images, progress.images):
        profiles = state.profiles.snapshot(keep=runtime.is_main)
        if runtime.is_main:
            write_snapshot(config.run_folder, progress.images, profiles)
    progress.step += 1
    state.grow()


def is_done(state: TrainingState) -> bool:
    """Return True if no step remains. Equal on all ranks."""
    return state.is_complete or early_stop_reason(state) is not None


def early_stop_reason(state: TrainingState) -> str | None:
    """Return the reason of early stopping, or None if early stopping has not triggered."""
    return why_stop(state.progress.diagnosis, state.config.training.early_stopping)


def end_reason(config: Config, progress: Progress) -> str | None:
    """Return what to say of a finished run: why it stopped early, and its rollbacks; None if there is nothing."""
    early = why_stop(progress.diagnosis, config.training.early_stopping)
    steps = ", ".join(map(str, progress.rollbacks))
    return "; ".join(filter(None, [early, steps and f"rolled back to step {steps} (training.on_divergence)"])) or None


def seed_default_generator(seed: int, update: int, rank: int) -> None:
    """Seed torch's default generator, so that layers such as dropout resume exactly.

    Their draws depend on the number of ranks.
    """
    torch.manual_seed(derive_key(seed, f"default generator/{update}/{rank}"))
