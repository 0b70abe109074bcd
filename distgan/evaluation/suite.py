"""Evaluate all metrics of a generator in one pass over its samples, against statistics of the real samples.

Rank r of W evaluates the generated samples i = r mod W. Latents and labels are the caller's function of i, so the set
of samples does not depend on W. Neither do the metrics, up to the rounding of sums in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.config import Config, MetricConfig
from distgan.data.index.proportion import in_proportion, proportional_counts
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, within_memory
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors.configured import load_configured_detector
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.names import value_name
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.real_statistics import extract_features, make_collectors, real_statistics
from distgan.evaluation.samples import pad_batch, rank_batches
from distgan.evaluation.states import computes_on_all_ranks, feed, leave_synchronization, reduced_states
from distgan.evaluation.statistics_cache import Entry

log = logging.getLogger("distgan")

Generate = Callable[[Tensor], Tensor]
"""Maps sample numbers (n,), int64 on the CPU, to samples in the format of `FeatureBatch`. It is an `EvaluatedGenerator`
too if a metric takes `"generator"`."""


class _Member(NamedTuple):
    section: MetricConfig
    context: EvaluationContext
    metric: Metric


class Evaluator:
    """Evaluates a run any number of times; loads the detectors and the real statistics once."""

    def __init__(self, config: Config, index: Index, runtime: Runtime, asked: Asked = never) -> None:
        """Load the detectors and the real statistics. Collective: call on every rank.

        Without cached files this trains or downloads the detectors and reads all real samples.

        Args:
            asked: returns True if this rank was asked to stop; this and later evaluations then raise Interrupted.

        Raises:
            UserError: see `load_configured_detector`; too many real samples are unreadable, or they are too few for a
                metric.
            Interrupted: some rank was asked to stop.
        """
        self.config, self.runtime, self._asked = config, runtime, asked
        reals = in_proportion(index)
        if reals is not index and runtime.is_main:
            parts = ", ".join(
                f"{count:,} of {len(source.samples):,}"
                for count, source in zip(proportional_counts(index), index.sources, strict=True)
            )
            log.info("evaluation: %d real samples, in proportion to the weights of data.path: %s", len(reals), parts)
        context = EvaluationContext(config, reals, runtime, asked)
        loaded = {section.key: load_configured_detector(section, context) for section in config.detectors}
        self.detectors = {section.label: loaded[section.key] for section in config.detectors}
        """Detectors by label."""
        contexts = [(section, _context_of(section, context, loaded)) for section in config.metrics]
        with runtime.raise_on_all_ranks():
            collectors = make_collectors(contexts)
        self.reals = real_statistics(collectors, context)
        self._metrics: list[_Member] = []
        for section, own in contexts:  # one at a time, because a metric may be collective to make
            with runtime.raise_on_all_ranks():
                self._metrics.append(_Member(section, own, make_metric(section, own, self.reals)))

    def __call__(self, generate: Generate) -> dict[str, float]:
        """Return the metric values by name, the same on every rank, such as `{"fid[classifier]": 12.3}`.

        Collective: call on every rank.

        Raises:
            UserError: the samples are too few for a metric.
            Interrupted: some rank was asked to stop.
        """
        runtime, total, size = self.runtime, self.config.generated_samples, self.config.evaluation.batch_size
        self._forget()  # the state of an interrupted evaluation
        rounds = -(-(total // runtime.world_size) // size)
        memory = within_memory(f"evaluation.batch_size = {size}", "lower it")
        pieces = rank_batches(total, size, runtime.rank, runtime.world_size)
        interruptible = runtime.interruptible(self._asked, rounds)
        with torch.no_grad(), ieee_float32(), runtime.raise_on_all_ranks(), interruptible as check, memory:
            for numbers in pieces:
                check()
                self._add(numbers, generate)
        values: dict[str, float] = {}
        # Values of one rank, because rounding differs between machines and ranks could disagree on the best checkpoint.
        for section, _, metric in self._metrics:
            # One metric at a time: a rank holds the rows of one only, and no rank goes on to the collectives of the
            # next one after an error.
            with runtime.raise_on_all_ranks(), reduced_states([metric], runtime):
                if runtime.is_main or computes_on_all_ranks(metric):
                    with section.blaming("compute failed"):
                        result = metric.compute()
                    if runtime.is_main:
                        _add_values(values, section, result)
        self._forget()
        found: dict[str, float] = runtime.broadcast_object(values)
        return found

    def _add(self, numbers: Tensor, generate: Generate) -> None:
        """Make samples, and feed each metric with those that it gets."""
        wanting = [member for member in self._metrics if member.context.num_samples > numbers[0]]
        filled = pad_batch(numbers, self.config.evaluation.batch_size)
        needed = any(member.section.needs_samples for member in wanting)
        samples = generate(filled).to(self.runtime.device) if needed else torch.empty(len(filled), 0)
        for detector in dict.fromkeys(member.context.detector for member in wanting):
            seen = extract_features(detector, numbers, samples, torch.full_like(numbers, -1))
            for section, context, metric in wanting:
                if context.detector is detector:
                    taken = seen.first(context.num_samples)
                    offered = {"generator": generate, **taken._asdict()}
                    feed(metric, [offered[field] for field in section.inputs], section, "update")

    def _forget(self) -> None:
        for member in self._metrics:
            member.metric.reset()


def _context_of(section: MetricConfig, context: EvaluationContext, loaded: Mapping[str, Detector]) -> EvaluationContext:
    """Return the context of a metric, with its detector of those loaded, by key."""
    detector = loaded[section.detector.key] if section.detector else None
    assert section.samples
    return replace(context, detector=detector, num_samples=section.samples, name=value_name(section))


def make_metric(section: MetricConfig, context: EvaluationContext, reals: Mapping[str, Entry]) -> Metric:
    """Make a metric, with its statistics of the real samples from the entry of its name.

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
    offers: dict[str, Any] = {"context": context}
    if section.value_name in reals:
        tensors, facts = reals[section.value_name]
        offers["reals"] = {"samples": torch.tensor(int(facts["samples"])), **tensors}
    metric = section.build(**offers)
    if not isinstance(metric, Metric):
        raise UserError(
            f"evaluation.metrics: {section.metric} returned {type(metric).__name__}, expected a torchmetrics.Metric"
        )
    if not any(part._defaults for part in metric.modules() if isinstance(part, Metric)):
        raise UserError(
            f"evaluation.metrics: {section.metric} has no state, so that each rank would keep its own samples; hold "
            "what it sums up in states, made by add_state"
        )
    leave_synchronization(metric)
    return metric.to(context.runtime.device)


def _add_values(values: dict[str, float], section: MetricConfig, result: Any) -> None:
    """Add what a metric computed to the values of an evaluation, by name. Raises UserError if it is no number."""
    for key, value in (result if isinstance(result, Mapping) else {"": result}).items():
        suffix = str(key)
        name = value_name(section, f"_{suffix}" if suffix and not suffix.startswith("[") else suffix)
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
