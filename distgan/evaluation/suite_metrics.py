"""Metrics of `evaluation.metrics`: their statistics of the real samples, their inputs and the names of their values."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.config import Config, MetricConfig
from distgan.data.index.table import Index
from distgan.data.order import permute
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.detectors.features import Detector
from distgan.evaluation.metrics.class_coverage import ClassSpread, Spread
from distgan.evaluation.metrics.frechet import FrechetDistanceToReference, Reference, make_reference
from distgan.evaluation.metrics.inception_score import InceptionScoreOfLogits
from distgan.evaluation.metrics.kid import SUBSET_SIZE, KernelDistanceToReference, subset_size
from distgan.evaluation.metrics.mode_coverage import Coverage, MixtureMoments, ModeCoverage, Modes
from distgan.evaluation.metrics.ngrams import (
    ORDERS,
    NgramDivergence,
    held_out_index,
    ngram_divergences,
    read_lines,
    shuffled,
)
from distgan.evaluation.moments import Moments
from distgan.evaluation.names import value_name
from distgan.evaluation.real_statistics import Collector
from distgan.evaluation.samples import FeatureBatch
from distgan.randomness import derive_key

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

log = logging.getLogger("distgan")

POOL = 10_000
"""Most real samples that kernel distances and n-grams use; an addressed choice if there are more."""


@dataclass(frozen=True)
class MetricContext:
    """Config, data and detector that metrics are built from."""

    config: Config
    index: Index
    runtime: Runtime
    detector: Detector | None
    """None if no metric needs one."""


class SuiteMetric(NamedTuple):
    """Metric of the generated samples, as part of a suite. The suite synchronizes its state over ranks."""

    metric: Metric
    take: Callable[[FeatureBatch], tuple[Tensor, ...]]
    """Maps a batch to the arguments of `metric.update`."""
    values: Callable[[Any], dict[str, float]]
    """Maps the result of `metric.compute` to values by name suffix (see `names.value_name`)."""


def make_collectors(setting: MetricContext) -> dict[str, Collector]:
    """Make the collectors, by metric, of the metrics that need statistics of the real samples."""
    made: dict[str, Collector] = {}
    for metric in setting.config.metrics:
        if metric.metric in COLLECTORS:
            made[metric.metric] = COLLECTORS[metric.metric](setting)
        elif not metric.is_built_in and hasattr(metric.load(), "set_reals"):
            made[metric.metric] = _pool(setting, metric.facts.takes)
    return made


def make_measure(
    metric: MetricConfig, setting: MetricContext, reals: Mapping[str, statistics_cache.Entry]
) -> SuiteMetric:
    """Make a metric from its collector's entry.

    Raises:
        UserError: there are too few samples, or a user's class is no `torchmetrics.Metric`.
    """
    detector = setting.detector
    if metric.facts.takes == "logits" and detector is not None and not detector.num_logits:
        raise UserError(
            f"evaluation.metrics: {metric.metric} needs logits, but the detector {detector.name} has none; return "
            "features and logits from it, or remove the metric"
        )
    entry = reals.get(metric.metric)
    measure = metric.build(setting, entry) if metric.is_built_in else _users(metric, entry)
    assert isinstance(measure, SuiteMetric)
    measure.metric.to(setting.runtime.device)
    return measure


def _users(config: MetricConfig, reals: statistics_cache.Entry | None) -> SuiteMetric:
    """Make a metric of the user's: `update` takes what its attribute `takes` says, `compute` returns one or more."""
    metric = config.build()
    if not isinstance(metric, Metric):
        raise UserError(
            f"evaluation.metrics: {config.metric} returned {type(metric).__name__}, expected a torchmetrics.Metric"
        )
    metric.sync_on_compute = metric._to_sync = False  # the suite synchronizes
    if reals is not None:
        set_reals: Any = metric.set_reals
        set_reals(reals.tensors["rows"])
    takes = config.facts.takes

    def values(result: Any) -> dict[str, float]:
        named = {f"_{name}": value for name, value in result.items()} if isinstance(result, dict) else {"": result}
        try:
            return {suffix: float(value) for suffix, value in named.items()}
        except (TypeError, ValueError, RuntimeError):
            raise UserError(
                f"evaluation.metrics: {config.metric}: compute returned {type(result).__name__}, expected a number or "
                "a dict of numbers"
            ) from None

    return SuiteMetric(metric, lambda seen: (getattr(seen, takes),), values)


class _Moments:
    """Mean and factorized covariance of the features of all real samples."""

    name = "real"

    def __init__(self, setting: MetricContext) -> None:
        assert setting.detector is not None
        self.numbers = torch.arange(len(setting.index))
        self._moments = Moments(setting.detector.dimension).to(setting.runtime.device)

    def update(self, seen: FeatureBatch) -> None:
        self._moments.update(seen.features)

    def entry(self) -> statistics_cache.Entry:
        reference = make_reference(self._moments.compute())
        return statistics_cache.Entry(
            {"mean": reference.mean, "factor": reference.factor}, {"samples": reference.samples}
        )


def fid(setting: MetricContext, reals: statistics_cache.Entry | None) -> SuiteMetric:
    assert setting.detector is not None
    assert reals is not None
    samples, generated = int(reals.facts["samples"]), setting.config.evaluation.num_samples
    if min(generated, samples) <= setting.detector.dimension and setting.runtime.is_main:
        log.warning(
            "%s: found %d generated and %d real images, expected more than %d, the number of features; the value is "
            "far too large and comparable only at equal sample counts; raise evaluation.num_samples or change "
            "evaluation.detector",
            value_name("fid", setting.config), generated, samples, setting.detector.dimension,
        )  # fmt: skip
    reference = Reference(samples, reals.tensors["mean"], reals.tensors["factor"])
    metric = FrechetDistanceToReference(reference, sync_on_compute=False)
    return SuiteMetric(metric, lambda seen: (seen.features,), lambda distance: {"": float(distance)})


def inception_score(setting: MetricContext, _: statistics_cache.Entry | None) -> SuiteMetric:
    assert setting.detector is not None
    metric = InceptionScoreOfLogits(
        setting.detector.num_logits, setting.config.evaluation.num_samples, sync_on_compute=False
    )
    return SuiteMetric(metric, lambda seen: (seen.logits, seen.numbers), _mean_and_deviation)


class _Pool:
    """One row per chosen real sample, gathered on rank 0."""

    def __init__(self, setting: MetricContext, name: str, take: Callable[[FeatureBatch], Tensor]) -> None:
        self.name, self._take = name, take
        count = len(setting.index)
        chosen = permute(np.arange(min(count, POOL)), count, derive_key(0, "kid/reals"))
        self.numbers = torch.from_numpy(chosen).sort().values
        self._runtime = setting.runtime
        self._rows: list[Tensor] = [torch.empty(0)]

    def update(self, seen: FeatureBatch) -> None:
        kept = torch.isin(seen.numbers, self.numbers)
        rows = self._take(seen)
        self._rows.append(rows[kept.to(rows.device)].cpu())

    def entry(self) -> statistics_cache.Entry:
        rows = self._runtime.gather_rows(torch.cat([part for part in self._rows if len(part)] or self._rows))
        return statistics_cache.Entry({"rows": rows}, {"samples": len(rows)})


def _pool(setting: MetricContext, takes: str) -> _Pool:
    return _Pool(setting, f"real-{takes}", lambda seen: getattr(seen, takes))


def _lines(setting: MetricContext) -> _Pool:
    return _Pool(setting, "real-lines", lambda seen: seen.samples.int())


def kid(setting: MetricContext, reals: statistics_cache.Entry | None) -> SuiteMetric:
    assert reals is not None
    features, generated = reals.tensors["rows"], setting.config.evaluation.num_samples
    size = subset_size(generated, len(features), SUBSET_SIZE)
    if size < 2:
        raise UserError(
            f"{value_name('kid', setting.config)}: found {generated} generated and {len(features)} real images, "
            "expected at least 4 of each; raise evaluation.num_samples, or remove kid from evaluation.metrics"
        )
    if size < SUBSET_SIZE and setting.runtime.is_main:
        log.warning(
            "%s: %d generated and %d real images allow subsets of %d, the protocol uses %d; the value is noisier; "
            "raise evaluation.num_samples",
            value_name("kid", setting.config), generated, len(features), size, SUBSET_SIZE,
        )  # fmt: skip
    metric = KernelDistanceToReference(
        features, generated, sync_on_compute=False,
        dist_sync_fn=lambda rows, group=None: [setting.runtime.gather_rows(rows)],
    )  # fmt: skip
    return SuiteMetric(metric, lambda seen: (seen.features, seen.numbers), _mean_and_deviation)


def classes(setting: MetricContext, _: statistics_cache.Entry | None) -> SuiteMetric:
    labels = torch.from_numpy(setting.index.labels.astype(np.int64))
    metric = ClassSpread(torch.bincount(labels, minlength=setting.index.num_classes), sync_on_compute=False)

    def values(spread: Spread) -> dict[str, float]:
        return {"": float(spread.found), "_smallest_share": float(spread.smallest_share), "_kl": float(spread.kl)}

    return SuiteMetric(metric, lambda seen: (seen.logits,), values)


class _Mixture:
    """Centers and width of the modes that the real points were drawn from."""

    name = "real-modes"

    def __init__(self, setting: MetricContext) -> None:
        data, index = setting.config.data, setting.index
        if not index.num_classes:
            raise UserError(
                f"evaluation.metrics: modes needs labels that name each point's mode, found none in data.path = "
                f"{data.path}; use a mixture such as builtin:ring, or set evaluation.every=0",
                everywhere=True,
            )
        self.numbers = torch.arange(len(index))
        self._moments = MixtureMoments(index.num_classes, data.dimensions, sync_on_compute=False)
        self._moments.to(setting.runtime.device)

    def update(self, seen: FeatureBatch) -> None:
        self._moments.update(seen.samples, seen.labels)

    def entry(self) -> statistics_cache.Entry:
        with self._moments.sync_context(dist_sync_fn=self._moments.dist_sync_fn):
            count = int(self._moments.counts.sum())  # first, as computing ends the synchronization
            return statistics_cache.Entry(self._moments.compute()._asdict(), {"samples": count})


def modes(setting: MetricContext, reals: statistics_cache.Entry | None) -> SuiteMetric:
    assert reals is not None
    metric = ModeCoverage(Modes(**reals.tensors), sync_on_compute=False)

    def values(coverage: Coverage) -> dict[str, float]:
        return {"": float(coverage.covered), "_high_quality": float(coverage.high_quality)}

    return SuiteMetric(metric, lambda seen: (seen.samples,), values)


def ngram_js(setting: MetricContext, reals: statistics_cache.Entry | None) -> SuiteMetric:
    assert reals is not None
    index, held_out = held_out_index(setting.config, setting.index), torch.empty(0)
    baseline = torch.zeros(len(ORDERS))
    if setting.runtime.is_main:
        held_out = read_lines(setting.config, index, min(POOL, setting.config.evaluation.num_samples))
        baseline = ngram_divergences(held_out, shuffled(reals.tensors["rows"]))
        log.info("ngram_js: comparing %d generated lines with as many held-out lines", len(held_out))
    metric = NgramDivergence(
        held_out, POOL, sync_on_compute=False,
        dist_sync_fn=lambda rows, group=None: [setting.runtime.gather_rows(rows)],
    )  # fmt: skip

    def values(divergences: Tensor) -> dict[str, float]:
        named = {"": divergences, "_baseline": baseline}
        return {f"{of}[{n}]": float(value) for of, row in named.items() for n, value in zip(ORDERS, row, strict=True)}

    return SuiteMetric(metric, lambda seen: (seen.samples, seen.numbers), values)


def _mean_and_deviation(result: Any) -> dict[str, float]:
    return {"": float(result.mean), "_std": float(result.deviation)}


COLLECTORS: dict[str, Callable[[MetricContext], Collector]] = {
    "fid": _Moments,
    "kid": lambda setting: _pool(setting, "features"),
    "modes": _Mixture,
    "ngram_js": _lines,
}
