"""The training loop."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack, closing

import torch

from distgan.config import Config, dump_config
from distgan.data.index import load_index
from distgan.distributed.runtime import Runtime
from distgan.monitoring.console import setup_logging
from distgan.randomness import derive_key
from distgan.training import run_folder
from distgan.training.assembly import assemble, check_fits
from distgan.training.checkpoint import CheckpointWriter
from distgan.training.feed import Feed
from distgan.training.observer import Observer
from distgan.training.preemption import StopRequest
from distgan.training.schedule import discriminator_updates, ema_decay, learning_rate
from distgan.training.state import TrainingState


def train(config: Config, *, resume: str = "auto", accept: Iterable[str] = ()) -> str:
    """Train a run to its last step, or until it is asked to stop. Call it on every rank.

    Args:
        resume: `auto` continues from the newest valid checkpoint of the run folder, if there is one; `never` starts
            over, setting aside what the folder holds; anything else is the path of a checkpoint or run.
        accept: changes against the checkpoint that are fine, of `state.ACCEPTABLE`.

    Returns:
        `finished` or `preempted`, which status.json in the run folder says too.

    Raises:
        UserError: something that the user can mend.
    """
    runtime = Runtime(deterministic=config.training.deterministic, timeout_minutes=config.training.timeout_minutes)
    setup_logging(runtime.rank)
    with StopRequest(config.run_dir, main=runtime.is_main) as stop, run_folder.outcome(config, runtime) as outcome:
        with runtime.together():
            index = load_index(config.data.path)
            check_fits(config, index, runtime.world_size)
        runtime.check_equal("the config", dump_config(config), "launch every rank with the same recipe and overrides")
        runtime.check_equal("the data's fingerprint", index.fingerprint, "give every node the same shards and index")
        state = assemble(config, index, runtime)
        with ExitStack() as held:
            with runtime.together():
                run_folder.prepare(config, state, runtime, resume, frozenset(accept))
                writer = held.enter_context(closing(run_folder.open_writer(config))) if runtime.is_main else None
                feed = held.enter_context(closing(Feed(state, runtime)))
                observer = held.enter_context(closing(Observer(state, feed, runtime, stop)))
            result = run(state, feed, observer, writer, runtime, stop)
        outcome(result)
        return result


def run(
    state: TrainingState,
    feed: Feed,
    observer: Observer,
    writer: CheckpointWriter | None,
    runtime: Runtime,
    stop: StopRequest,
) -> run_folder.Result:
    """All remaining steps. Returns `preempted` if a stop was asked for before the last of them."""
    config, progress = state.config, state.progress
    steps, penalty = config.training.steps, config.objective.r1
    generator, discriminator = config.generator.optimizer, config.discriminator.optimizer
    if progress.step == 0 and observer.after_step():
        save(state, feed, observer, writer, runtime, is_best=True)
    news = runtime.exchange([False, False])
    leaving = False
    while progress.step < steps and not leaving:
        before = progress.position
        for update in discriminator_updates(config, progress.step, progress.position):
            seed_default_generator(config.seed, update.index, runtime.rank)
            penalised = penalty is not None and update.index % penalty.every == 0
            state.discriminator.update(
                [(*inputs, penalised) for inputs in feed.discriminator_inputs()],
                learning_rate(discriminator, progress.step, steps),
            )
            progress.position += update.batch_size
        applied = state.generator.update(
            list(feed.generator_inputs(progress.step)), learning_rate(generator, progress.step, steps)
        )
        state.average.update(ema_decay(config.ema, before, progress.position - before), applied)
        progress.step += 1

        # What ranks tell each other here is read one step later, so that no step waits for it.
        leaving, unreadable = news.result()
        news = runtime.exchange([stop.requested, bool(feed.failures)])
        if unreadable:
            feed.share_failures()
        is_best = observer.after_step()
        last = leaving or progress.step == steps
        if last or is_best or progress.step % config.checkpoint.every == 0:
            save(state, feed, observer, writer, runtime, blocking=last, is_best=is_best)
    news.result()
    return "finished" if progress.step >= steps else "preempted"


def save(
    state: TrainingState,
    feed: Feed,
    observer: Observer,
    writer: CheckpointWriter | None,
    runtime: Runtime,
    *,
    blocking: bool = False,
    is_best: bool = False,
) -> None:
    """A checkpoint of this moment; the loop goes on while it is written, unless `blocking`."""
    feed.share_failures()
    description = state.description(runtime)
    if writer is None:
        return
    progress = state.progress
    writer.save(progress.step, state.tensors(), description, blocking=blocking)
    observer.checkpoint_failures = writer.failures
    if is_best and progress.best is not None:
        writer.mark_best(**progress.best)


def seed_default_generator(seed: int, update: int, rank: int) -> None:
    """Layers that draw from torch's own generator (dropout) then resume exactly, though what they draw depends on W."""
    torch.manual_seed(derive_key(seed, f"default generator/{update}/{rank}"))
