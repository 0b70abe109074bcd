"""Evaluate all metrics of a generator in one pass over its samples, against statistics of the real samples.

Rank r of W evaluates the generated samples i = r mod W. Latents and labels are the caller's function of i, so the set
of samples does not depend on W. Neither do the metrics, up to the rounding of sums in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.config import Config
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.errors import within_memory
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.names import needs_detector, value_name
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.real_statistics import extract_features, real_statistics
from distgan.evaluation.samples import fill, rank_batches
from distgan.evaluation.suite_metrics import MetricContext, make_collectors, make_measure

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

Generate = Callable[[Tensor], Tensor]
"""Maps sample numbers (n,), int64 on the CPU, to samples in the format of `FeatureBatch`."""


class Evaluator:
    """Evaluates a run any number of times; loads the detector and the real statistics once."""

    def __init__(self, config: Config, index: Index, runtime: Runtime, asked: Asked = never) -> None:
        """Load the detector and the real statistics. Collective: call on every rank.

        Without cached files this trains or downloads the detector and reads all real samples.

        Args:
            asked: returns True if this rank was asked to stop; this and later evaluations then raise Interrupted.

        Raises:
            UserError: see `load_configured_detector`; too many real samples are unreadable, or they are too few for a
                metric.
            Interrupted: some rank was asked to stop.
        """
        self.config, self.runtime, self._asked = config, runtime, asked
        self.detector = None
        if needs_detector(config):
            self.detector = load_configured_detector(config.evaluation, config.data, index, runtime, asked)
        setting = MetricContext(config, index, runtime, self.detector)
        with runtime.raise_on_all_ranks():
            collectors = make_collectors(setting)
        self.reals = real_statistics(collectors, self.detector, config, index, runtime, asked)
        with runtime.raise_on_all_ranks():
            self._measures = [(metric, make_measure(metric, setting, self.reals)) for metric in config.metrics]

    def __call__(self, generate: Generate) -> dict[str, float]:
        """Return the metric values by name, the same on every rank, such as `{"fid[classifier]": 12.3}`.

        Collective: call on every rank.

        Raises:
            UserError: the samples are too few for a metric.
            Interrupted: some rank was asked to stop.
        """
        runtime, settings = self.runtime, self.config.evaluation
        self._forget()  # the state of an interrupted evaluation
        rounds = -(-(settings.num_samples // runtime.world_size) // settings.batch_size)
        memory = within_memory(f"evaluation.batch_size = {settings.batch_size}", "lower it")
        with torch.no_grad(), ieee_float32(), runtime.interruptible(self._asked, rounds) as check, memory:
            for numbers in rank_batches(settings.num_samples, settings.batch_size, runtime.rank, runtime.world_size):
                check()
                samples = generate(fill(numbers, settings.batch_size)).to(runtime.device)
                seen = extract_features(self.detector, numbers, samples, torch.full_like(numbers, -1))
                for _, measure in self._measures:
                    measure.metric.update(*measure.take(seen))
        values: dict[str, float] = {}
        with ExitStack() as synchronized:
            for _, measure in self._measures:
                synchronized.enter_context(measure.metric.sync_context(dist_sync_fn=measure.metric.dist_sync_fn))
            # On one rank, because rounding differs between machines and ranks could disagree on the best checkpoint.
            with runtime.raise_on_all_ranks():
                if runtime.is_main:
                    for metric, measure in self._measures:
                        for suffix, value in measure.values(measure.metric.compute()).items():
                            values[value_name(metric, self.config, suffix)] = value
        self._forget()
        found: dict[str, float] = runtime.broadcast_object(values)
        return found

    def _forget(self) -> None:
        for _, measure in self._measures:
            measure.metric.reset()


def evaluate(generate: Generate, config: Config, index: Index, runtime: Runtime) -> dict[str, float]:
    """Evaluate a generator once; see `Evaluator`. Collective: call on every rank."""
    return Evaluator(config, index, runtime)(generate)
