"""The training loop."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing

import torch

from distgan.checkpoint.contents import ACCEPTABLE
from distgan.checkpoint.writer import CheckpointWriter
from distgan.config import Config, dump_config
from distgan.data.index.checks import unlisted
from distgan.data.index.loading import load_index
from distgan.data.kinds.images import JPEG_DECODER
from distgan.distributed.control import Check
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.monitoring.console import setup_logging
from distgan.monitoring.diagnosis import why_stop
from distgan.packages import missing_packages
from distgan.randomness import derive_key
from distgan.runs.outcome import Result, record_outcome
from distgan.runs.stop_request import StopRequest
from distgan.schedule import discriminator_updates, ema_decay, growth_warnings, learning_rate
from distgan.training.evaluations import Evaluations
from distgan.training.inputs import Feed
from distgan.training.monitor import Observer
from distgan.training.resume import open_writer, resume_run
from distgan.training.setup import assemble, batch_memory, check_fits
from distgan.training.state import TrainingState
from distgan.version import code_digest

logger = logging.getLogger("distgan")


def train(config: Config, *, resume: str = "auto", accept: Iterable[str] = ()) -> str:
    """Train a run to its last step, or until it is asked to stop. Call it on every rank.

    A program of your own under a launcher ends, as any does, with `torch.distributed.destroy_process_group()`, after
    the last `train` or `evaluate`.

    Args:
        resume: `auto` continues from the newest valid checkpoint of the run folder, if there is one; `never` starts
            over, setting aside what the folder holds; anything else is the path of a checkpoint or run.
        accept: changes against the checkpoint that are fine, of `description.ACCEPTABLE`.

    Returns:
        `finished` or `preempted`, which status.json in the run folder says too.

    Raises:
        UserError: something that the user can mend.
    """
    if not resume:
        raise UserError("--resume is empty; give auto, never, or the path of a checkpoint or run", everywhere=True)
    if resume != "auto" and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError(
            f"--resume {resume}: the launcher would repeat it at each of its restarts; start with --max-restarts 0 "
            "(MAX_RESTARTS=0 for node.sh), and from then on without --resume",
            everywhere=True,
        )
    accepted = frozenset(accept)
    if unknown := accepted.difference(ACCEPTABLE):
        raise UserError(f"--accept {min(unknown)}: accepted are {', '.join(ACCEPTABLE)}", everywhere=True)
    runtime = Runtime(
        deterministic=config.training.deterministic,
        timeout_minutes=max(config.training.startup_timeout_minutes, config.training.timeout_minutes),
        gradients_in_bf16=config.training.gradient_precision == "bf16",
        tf32=config.training.mixed_precision == "tf32",
    )
    setup_logging(runtime.rank)
    with StopRequest(config.run_dir, main=runtime.is_main) as stop, record_outcome(config, runtime) as outcome:
        with runtime.raise_on_all_ranks():
            index = load_index(config.data.path, config.data.cache_dir)
            check_fits(config, index, runtime.world_size)
        runtime.check_equal("the config", dump_config(config), "launch every rank with the same recipe and overrides")
        runtime.check_equal("the code", code_digest(), "install the same version on every node")
        if index.has_jpegs:
            runtime.check_equal(
                "the JPEG decoder", JPEG_DECODER, "install the same version of simplejpeg on every node"
            )
        runtime.check_equal("the data's fingerprint", index.fingerprint, "give every node the same shards and index")
        if runtime.is_main:
            for warning in (*config.config_warnings, *growth_warnings(config), *unlisted(config.data.path, index)):
                logger.warning("%s", warning)
            for package in missing_packages():
                logger.warning("%s is not installed: %s; pip install %s", package.name, package.without, package.name)
            if config.training.mixed_precision == "tf32" and runtime.device.type != "cuda":
                logger.warning(
                    "training.mixed_precision = tf32: %s has no TF32, so float32 is used; it needs an NVIDIA GPU",
                    runtime.device,
                )
            if index.num_classes and "labels" not in config.data.model_fields_set:
                logger.info(
                    "the shards have labels of %d classes, which are not used: training is unconditional; set "
                    "data.labels=true to condition both networks on them, or data.labels=false to hide this line",
                    index.num_classes,
                )
        state = assemble(config, index, runtime)
        if runtime.is_main and runtime.world_size > 1:
            logger.info("%d ranks train with %s", runtime.world_size, state.generator.engine.name)
        with ExitStack() as held:
            held.enter_context(batch_memory(config, runtime.world_size))
            with runtime.raise_on_all_ranks():
                # First, because it completes what a killed predecessor had almost published.
                writer = held.enter_context(closing(open_writer(config))) if runtime.is_main else None
                resume_run(config, state, runtime, resume, accepted)
                feed = held.enter_context(closing(Feed(state, runtime)))
                evaluations = Evaluations(state, feed.latents, runtime, stop)
                observer = held.enter_context(closing(Observer(state, feed, evaluations, writer, runtime)))
            result = run(state, feed, observer, evaluations, writer, runtime, stop)
        outcome(result, state.progress.step, stop.reason if result == "preempted" else early_stop_reason(state))
        return result


def run(
    state: TrainingState,
    feed: Feed,
    observer: Observer,
    evaluations: Evaluations,
    writer: CheckpointWriter | None,
    runtime: Runtime,
    stop: StopRequest,
) -> Result:
    """All remaining steps. Returns `preempted` if a stop was asked for before there was nothing more to do."""
    config, progress = state.config, state.progress
    steps = config.training.steps
    generator, discriminator = config.generator.optimizer, config.discriminator.optimizer
    is_best = observer.before_first_step()
    leaving = evaluations.left_undone
    if is_best or leaving:
        save(state, feed, writer, runtime, last=leaving, is_best=is_best)
    news = runtime.exchange([False, False])
    while not (leaving or is_done(state)):
        before = progress.position
        for update in discriminator_updates(config, progress.step, progress.position):
            seed_default_generator(config.seed, update.index, runtime.rank)
            state.discriminator.update(
                feed.discriminator_inputs(update),
                (progress.step, update.index),
                learning_rate(discriminator, progress.step, steps),
                before_change=writer.copied if writer is not None else None,
            )
            progress.position += update.batch_size
        applied = state.generator.update(
            feed.generator_inputs(progress.step),
            (progress.step,),
            learning_rate(generator, progress.step, steps),
        )
        with runtime.full_params(state.generator.network):
            # A long critic phase is one step of the generator like any other.
            images = config.training.critic_steps * update.batch_size
            state.average.update(ema_decay(config.ema, before, images), applied)
        progress.step += 1
        state.grow()
        # The first step may compile kernels; from the next one on, silence means that a rank is lost.
        runtime.set_timeout(config.training.timeout_minutes)

        # What ranks tell each other here is read one step later, so that no step waits for it.
        leaving, unreadable = news.result()
        news = runtime.exchange([stop.requested, bool(feed.failures)])
        if unreadable:
            feed.share_failures()
        if progress.step % config.monitoring.every == 0:
            check_skipped_updates(state, writer, runtime)
        is_best = observer.after_step(evaluate=not leaving)
        leaving = leaving or evaluations.left_undone
        last = leaving or is_done(state)
        if last or is_best or progress.step % config.checkpoint.every == 0:
            save(state, feed, writer, runtime, last=last, is_best=is_best)
    news.result()
    return "finished" if is_done(state) and not evaluations.left_undone else "preempted"


def is_done(state: TrainingState) -> bool:
    """Whether no step is left to do; all ranks agree."""
    return state.progress.step >= state.config.training.steps or early_stop_reason(state) is not None


def early_stop_reason(state: TrainingState) -> str | None:
    """Why the run ends before its last step, if it does so by itself."""
    return why_stop(state.progress.diagnosis, state.config.training.early_stopping)


def save(
    state: TrainingState,
    feed: Feed,
    writer: CheckpointWriter | None,
    runtime: Runtime,
    *,
    last: bool = False,
    is_best: bool = False,
) -> None:
    """A checkpoint of this moment. The loop goes on while it is written, unless it is the last or the best.

    Raises:
        UserError: the last checkpoint of a run cannot be written.
    """
    feed.share_failures()
    progress = state.progress
    # A best average is worth keeping all the same: it has just been measured, and skipped updates did not change it.
    if not (last or is_best) and max(player.skipped_in_a_row.item() for player in state.players) > 1:
        logger.warning("step %d: no checkpoint while updates are being skipped", progress.step)
        return
    description, tensors = state.description(runtime), state.tensors()
    if not (last or is_best):
        if writer is not None:
            writer.save(progress.step, tensors, description)
        return

    def finish(_: Check) -> None:
        assert writer is not None
        saved = writer.save(progress.step, tensors, description, blocking=True)
        if last and not saved and not writer.save(progress.step, tensors, description, blocking=True):
            raise UserError(
                f"{writer.folder}: the checkpoint of step {progress.step}, where the run ends, cannot be written (see "
                f"above); the last good one is {writer.last_good or 'of an earlier start'}; mend that, and the same "
                "command continues from there"
            )
        if is_best and progress.best is not None:
            writer.mark_best(**progress.best)

    # However slow the disk is, the other ranks' time-outs are not for it.
    runtime.run_on_main(finish)


def check_skipped_updates(state: TrainingState, writer: CheckpointWriter | None, runtime: Runtime) -> None:
    """Raise UserError when a player has skipped too many updates in a row since it was last looked at."""
    limit, step = state.config.training.max_skipped_updates, state.progress.step
    for player in state.players:
        streak = int(player.longest_streak.item())
        player.longest_streak.copy_(player.skipped_in_a_row)
        if streak >= limit:
            good = runtime.broadcast_object(str(writer.last_good) if writer is not None else None)
            raise UserError(
                f"step {step}: {streak} updates of the {player.role} in a row had a loss or gradient that is not "
                f"finite and were skipped; last good checkpoint: {good}; lower the learning rates, add a gradient "
                "penalty, or set training.mixed_precision=no",
                everywhere=True,
            )


def seed_default_generator(seed: int, update: int, rank: int) -> None:
    """Layers that draw from torch's own generator (dropout) then resume exactly, though what they draw depends on W."""
    torch.manual_seed(derive_key(seed, f"default generator/{update}/{rank}"))
