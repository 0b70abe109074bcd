"""The training loop."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from distgan import latents as generation
from distgan.config import Config, dump_config
from distgan.data.index import Index, load_index
from distgan.data.stream import Batch, Failure, check_failure_rate, open_stream
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import suite
from distgan.monitoring import pictures
from distgan.monitoring.console import Console, setup_logging
from distgan.monitoring.tracker import Tracker, open_tracker
from distgan.networks.layers.normalisation import recompute_statistics
from distgan.randomness import derive_key
from distgan.training import run_folder, schedule
from distgan.training.assembly import assemble, check_fits, latent_source, uses_channels_last
from distgan.training.checkpoint import CheckpointWriter
from distgan.training.preemption import StopRequest
from distgan.training.state import TrainingState

logger = logging.getLogger("distgan")


def train(config: Config, *, resume: str = "auto", accept: Iterable[str] = ()) -> str:
    """Train a run to its last step, or until it is asked to stop. Call it on every rank.

    Args:
        resume: `auto` continues from the newest valid checkpoint of the run folder, if there is one; `never` starts
            over, setting aside what the folder holds; anything else is the path of a checkpoint or run.
        accept: changes against the checkpoint that are fine, of `state.ACCEPTABLE`.

    Returns:
        `finished` or `preempted`, which status.json in the run folder says too.

    Raises:
        UserError: something that the user can mend; on all ranks, with the same line.
    """
    runtime = Runtime(deterministic=config.training.deterministic, timeout_minutes=config.training.timeout_minutes)
    setup_logging(runtime.rank)
    with run_folder.outcome(config, runtime) as outcome, StopRequest(config.run_dir, main=runtime.is_main) as stop:
        with runtime.together():
            index = load_index(config.data.path)
            check_fits(config, index, runtime.world_size)
        runtime.check_equal("the config", dump_config(config), "launch every rank with the same recipe and overrides")
        runtime.check_equal("the data's fingerprint", index.fingerprint, "give every node the same shards and index")
        state = assemble(config, index, runtime)
        with runtime.together():
            run_folder.prepare(config, state, runtime, resume, frozenset(accept))
        with Trainer(state, runtime, stop) as trainer:
            return outcome(trainer.run())


class Trainer:
    """The loop, and the things it holds open."""

    def __init__(self, state: TrainingState, runtime: Runtime, stop: StopRequest) -> None:
        self.state, self.runtime, self.stop = state, runtime, stop
        self.config: Config = state.config
        self.index: Index = state.index
        config, progress = state.config, state.progress
        self.run_dir = Path(config.run_dir)
        self.latents = latent_source(config, state.index, runtime.device)
        self.channels_last = uses_channels_last(config, runtime.device)
        self.writer = (
            CheckpointWriter(self.run_dir / "checkpoints", keep=config.checkpoint.keep) if runtime.is_main else None
        )
        self.tracker: Tracker = open_tracker(
            self.run_dir,
            tensorboard=config.monitoring.tensorboard,
            resume_step=progress.step if progress.step else None,
            main=runtime.is_main,
        )
        self.console = Console(total=config.training.steps, start=progress.step, main=runtime.is_main)
        self.stream = open_stream(
            config.data,
            config.seed,
            state.index,
            start=progress.position,
            micro_batch=config.micro_batch,
            rank=runtime.rank,
            world_size=runtime.world_size,
            substitutions=progress.substitutions,
            pin_memory=runtime.device.type == "cuda",
        )
        self.failures: list[Failure] = []
        self.data_seconds = 0.0

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        for held in (self.stream, self.console, self.tracker, self.writer):
            if held is not None:
                held.close()

    def run(self) -> str:
        """All remaining steps. Returns `finished`, or `preempted` if a stop was asked for before the last."""
        config, state, progress = self.config, self.state, self.state.progress
        if progress.step == 0:
            self.finish_step({}, last=False)
        self.start_interval()
        news = self.runtime.exchange([False, False])
        leaving = False
        while progress.step < config.training.steps and not leaving:
            for update in schedule.discriminator_updates(config, progress.step, progress.position):
                self.seed_third_parties(update.index)
                penalty = config.objective.r1
                penalised = penalty is not None and update.index % penalty.every == 0
                state.discriminator.update(
                    [(*self.next_reals(), penalised) for _ in range(config.training.accumulation)],
                    schedule.learning_rate(config.discriminator.optimizer, progress.step, config.training.steps),
                )
                progress.position += update.batch_size
            applied = state.generator.update(
                list(self.generator_inputs(progress.step)),
                schedule.learning_rate(config.generator.optimizer, progress.step, config.training.steps),
            )
            images = config.training.critic_steps * config.training.batch_size
            state.average.update(schedule.ema_decay(config.ema, progress.position - images, images), applied)
            progress.step += 1

            leaving, failed_reads = news.result()
            news = self.runtime.exchange([self.stop.requested, bool(self.failures)])
            if failed_reads:
                self.share_failures()
            row = self.measure() if progress.step % config.monitoring.every == 0 else {}
            self.finish_step(row, last=leaving or progress.step == config.training.steps)
        news.result()
        return "preempted" if progress.step < config.training.steps else "finished"

    def next_reals(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The next micro-batch for the discriminator: reals and their labels, latents and labels for fakes."""
        started = time.perf_counter()
        batch: Batch = next(self.stream)
        self.data_seconds += time.perf_counter() - started
        self.failures += batch.failures
        device = self.runtime.device
        reals = generation.from_bytes(batch.images.to(device, non_blocking=True))
        if self.channels_last:
            reals = reals.contiguous(memory_format=torch.channels_last)
        latents, labels = self.latents.draw("discriminator latents", batch.positions.to(device, non_blocking=True))
        real_labels = batch.labels.to(device, non_blocking=True) if labels is not None else None
        return reals, real_labels, latents, labels

    def generator_inputs(self, step: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """This rank's latents and labels of a generator update, one micro-batch at a time."""
        share = self.config.micro_batch // self.runtime.world_size
        for number in range(self.config.training.accumulation):
            first = (
                step * self.config.training.batch_size + number * self.config.micro_batch + self.runtime.rank * share
            )
            yield self.latents.draw("generator latents", torch.arange(first, first + share))

    def seed_third_parties(self, update: int) -> None:
        """Layers that draw from torch's own generator (dropout) then resume exactly; what they draw depends on W."""
        torch.manual_seed(derive_key(self.config.seed, f"default generator/{update}/{self.runtime.rank}"))

    def share_failures(self) -> None:
        """Make what any rank could not read known to all, from the next position on."""
        progress = self.state.progress
        for failures in self.runtime.gather_objects(self.failures):
            for failure in failures:
                if progress.substitutions.add(failure, progress.position) and self.runtime.is_main:
                    logger.warning("unreadable sample replaced: %s", failure.reason)
        self.failures = []
        with self.runtime.together():
            check_failure_rate(
                progress.substitutions, progress.position, len(self.index), self.config.data.max_failure_rate
            )

    def finish_step(self, row: dict[str, float], *, last: bool) -> None:
        """After a step: evaluate, sample, write down and save, each when it is due."""
        config, progress = self.config, self.state.progress
        every = config.evaluation.every
        evaluated = bool(every) and progress.step % every == 0
        pictured = progress.step % config.monitoring.samples_every == 0
        if evaluated or pictured:
            self.recompute_statistics()
        is_best = False
        if evaluated:
            metrics = self.evaluate()
            row = {**row, **metrics}
            is_best = self.note_best(metrics)
        if pictured:
            self.draw_samples()
        if row:
            self.tracker.scalars(progress.step, progress.position, row)
            self.console.update(progress.step, row)
        if evaluated or pictured or row:
            self.start_interval()
        due = progress.step > 0 and progress.step % config.checkpoint.every == 0
        if due or last or is_best:
            self.save(blocking=last, is_best=is_best)

    def start_interval(self) -> None:
        """Rates are measured from here, so that evaluations and sample grids do not count as training time."""
        self.interval_started = time.perf_counter()
        self.interval_position = self.state.progress.position
        self.interval_step = self.state.progress.step
        self.data_seconds = 0.0

    def measure(self) -> dict[str, float]:
        """What the players reported since the last time, with rates and sizes. The only host sync of an interval."""
        state, progress, config = self.state, self.state.progress, self.config
        row: dict[str, float] = {}
        for player in (state.generator, state.discriminator):
            row |= player.statistics.reduce(self.runtime)
            row[f"skipped_updates/{player.role}"] = player.skipped.item()
            if player.skipped_in_a_row.item() >= config.training.max_skipped_updates:
                raise UserError(
                    f"step {progress.step}: the last {int(player.skipped_in_a_row.item())} updates of the {player.role} "
                    "had a loss or gradient that is not finite and were skipped; "
                    f"last good checkpoint: {run_folder.newest_step(self.run_dir)}; "
                    "lower the learning rate, raise objective.r1.gamma, or set training.mixed_precision=no",
                    everywhere=True,
                )
        seconds = time.perf_counter() - self.interval_started
        steps = max(1, progress.step - self.interval_step)
        row["learning_rate/generator"] = state.generator.optimizer.param_groups[0]["lr"]
        row["learning_rate/discriminator"] = state.discriminator.optimizer.param_groups[0]["lr"]
        row["ema/decay"] = schedule.ema_decay(
            config.ema, progress.position, config.training.critic_steps * config.training.batch_size
        )
        row["speed/images_per_second"] = (progress.position - self.interval_position) / seconds
        row["speed/step_seconds"] = seconds / steps
        row["speed/data_wait_seconds"] = self.data_seconds / steps
        row["memory/host_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        if self.runtime.device.type == "cuda":
            row["memory/device_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
        row["data/replaced_samples"] = len(progress.substitutions)
        row["progress/kimg"] = progress.position / 1000
        if self.writer is not None:
            row["checkpoint/failures"] = self.writer.failures
        return row

    def recompute_statistics(self) -> None:
        """Fit the average's batch-norm statistics to its weights."""
        batches = generation.statistics_batches(
            self.latents, self.config, rank=self.runtime.rank, world_size=self.runtime.world_size
        )
        recompute_statistics(self.state.average.network, batches)

    def generate(self, samples: Tensor) -> Tensor:
        """Evaluation samples by number: the same images for any number of ranks."""
        return generation.generate(self.state.average.network, self.latents, "evaluation", samples)

    def evaluate(self) -> dict[str, float]:
        """All metrics of the average."""
        metrics = suite.evaluate(self.generate, self.config, self.index, self.runtime)
        if self.runtime.is_main:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.info("step %d: %s", self.state.progress.step, shown)
        return metrics

    def note_best(self, metrics: dict[str, float]) -> bool:
        """Whether this is the lowest FID so far; if so, it is remembered."""
        name = f"fid[{self.config.evaluation.detector}]"
        best = self.state.progress.best
        if best is not None and best["metric"] == name and best["value"] <= metrics[name]:
            return False
        self.state.progress.best = {"metric": name, "value": metrics[name], "step": self.state.progress.step}
        return True

    def draw_samples(self) -> None:
        """A grid of the same latents every time, on disk and in TensorBoard."""
        if not self.runtime.is_main:
            return
        step = self.state.progress.step
        images = generation.generate(
            self.state.average.network, self.latents, "sample grid", torch.arange(self.config.monitoring.num_samples)
        )
        grid = pictures.grid(images.cpu())
        self.tracker.image(step, "samples", grid)
        try:
            pictures.save_png(self.run_dir / "samples" / f"step-{step:08d}.png", grid)
        except OSError as error:
            logger.error("step %d: cannot write the sample grid: %s; training goes on", step, error)

    def save(self, *, blocking: bool, is_best: bool) -> None:
        """A checkpoint of this moment; the loop goes on while it is written, unless `blocking`."""
        self.share_failures()
        if self.writer is None:
            return
        step = self.state.progress.step
        self.writer.save(step, self.state.tensors(), self.state.description(self.runtime.world_size), blocking=blocking)
        if is_best and self.state.progress.best is not None:
            self.writer.mark_best(**self.state.progress.best)
