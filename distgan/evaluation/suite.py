"""Evaluate all metrics of a generator in one pass over its samples, against statistics of the real samples.

Rank r of W evaluates the generated samples i = r mod W. Latents and labels are the caller's function of i, so the set
of samples does not depend on W. Neither do the metrics, up to the rounding of sums in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.config import Config, MetricConfig
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, within_memory
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.names import needs_detector, value_name
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.real_statistics import extract_features, make_collectors, real_statistics
from distgan.evaluation.samples import fill, rank_batches
from distgan.evaluation.states import feed, leave_synchronization, reduced_states
from distgan.evaluation.statistics_cache import Entry

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
        context = EvaluationContext(config, index, runtime, asked)
        self.detector = load_configured_detector(context) if needs_detector(config) else None
        context = replace(context, detector=self.detector)
        with runtime.raise_on_all_ranks():
            collectors = make_collectors(context)
        self.reals = real_statistics(collectors, context)
        with runtime.raise_on_all_ranks():
            self._metrics = [(section, make_metric(section, context, self.reals)) for section in config.metrics]

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
        pieces = rank_batches(settings.num_samples, settings.batch_size, runtime.rank, runtime.world_size)
        interruptible = runtime.interruptible(self._asked, rounds)
        with torch.no_grad(), ieee_float32(), runtime.raise_on_all_ranks(), interruptible as check, memory:
            for numbers in pieces:
                check()
                samples = generate(fill(numbers, settings.batch_size)).to(runtime.device)
                seen = extract_features(self.detector, numbers, samples, torch.full_like(numbers, -1))
                for section, metric in self._metrics:
                    feed(metric, [getattr(seen, field) for field in section.inputs], section, "update")
        values: dict[str, float] = {}
        # On one rank, because rounding differs between machines and ranks could disagree on the best checkpoint.
        with runtime.raise_on_all_ranks(), reduced_states((metric for _, metric in self._metrics), runtime):
            if runtime.is_main:
                for section, metric in self._metrics:
                    with section.blaming("compute failed"):
                        result = metric.compute()
                    _add_values(values, section, self.config, result)
        self._forget()
        found: dict[str, float] = runtime.broadcast_object(values)
        return found

    def _forget(self) -> None:
        for _, metric in self._metrics:
            metric.reset()


def make_metric(section: MetricConfig, context: EvaluationContext, reals: Mapping[str, Entry]) -> Metric:
    """Make a metric, with its statistics of the real samples from the entry of its label.

    Raises:
        UserError: there are too few samples, the detector has no logits that the metric needs, or the technique made
            no `torchmetrics.Metric`.
    """
    detector = context.detector
    if "logits" in section.inputs and detector is not None and not detector.num_logits:
        raise UserError(
            f"evaluation.metrics: {section.metric} needs logits, but the detector {detector.name} has none; return "
            "features and logits from it, or remove the metric"
        )
    offers: dict[str, Any] = {"context": replace(context, name=value_name(section, context.config))}
    if section.label in reals:
        tensors, facts = reals[section.label]
        offers["reals"] = {"samples": torch.tensor(int(facts["samples"])), **tensors}
    metric = section.build(**offers)
    if not isinstance(metric, Metric):
        raise UserError(
            f"evaluation.metrics: {section.metric} returned {type(metric).__name__}, expected a torchmetrics.Metric"
        )
    leave_synchronization(metric)
    return metric.to(context.runtime.device)


def _add_values(values: dict[str, float], section: MetricConfig, config: Config, result: Any) -> None:
    """Add what a metric computed to the values of an evaluation, by name. Raises UserError if it is no number."""
    for key, value in (result if isinstance(result, Mapping) else {"": result}).items():
        suffix = str(key)
        name = value_name(section, config, f"_{suffix}" if suffix and not suffix.startswith("[") else suffix)
        if name in values:
            raise UserError(
                f"evaluation.metrics: two values are named {name}; give {section.metric} another name, as in "
                f"{{metric: {section.metric}, name: {section.label}-2}}"
            )
        try:
            values[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"evaluation.metrics: {section.metric}: compute returned {type(value).__name__}, expected a number or "
                "a dict of numbers"
            ) from None


def evaluate(generate: Generate, config: Config, index: Index, runtime: Runtime) -> dict[str, float]:
    """Evaluate a generator once; see `Evaluator`. Collective: call on every rank."""
    return Evaluator(config, index, runtime)(generate)
