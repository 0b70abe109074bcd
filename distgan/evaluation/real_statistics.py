"""Statistics of the real samples that metrics compare with, from the cache folder or one pass over the shards."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Mapping
from inspect import signature

import torch
from torch import Tensor
from torchmetrics import Metric

from distgan.config import Config, MetricConfig
from distgan.data.kinds.posterior import draw_posterior
from distgan.data.stages import stages_key
from distgan.errors import UserError, within_memory
from distgan.evaluation import statistics_cache
from distgan.evaluation.contract import EvaluationContext
from distgan.evaluation.detectors.features import Detector, evaluation_folder
from distgan.evaluation.numerics.subsets import choose_reals
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.samples import FeatureBatch, pad_batch, read_reals
from distgan.evaluation.states import feed, joined, leave_synchronization, reduced_states
from distgan.extensions import code_digest_of, package_of

log = logging.getLogger("distgan")

MOST_ROWS = 10_000
"""Most real samples whose rows a metric without a `real_statistic` of its own gets."""
_PREPROCESSING = 2
"""Raise it with every change of decoding, of a detector's preprocessing or of the choice of real samples: no stale
cached statistics are used then."""


class RealRows(Metric):
    """Rows of one field of chosen real samples: `rows`, in order of their indices."""

    full_state_update = False
    rows: list[Tensor] | Tensor

    def __init__(self, takes: str, chosen: Tensor) -> None:
        """takes: name of the field. chosen: indices of the samples, int64, increasing."""
        super().__init__()
        self.takes: str | tuple[str, ...] = takes
        self.chosen = chosen
        self.cache_name = f"real-{takes}"
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, rows: Tensor) -> None:
        """Add rows (n, ...)."""
        assert isinstance(self.rows, list)
        self.rows.append(rows.detach().cpu())

    def compute(self) -> dict[str, Tensor]:
        """Return the rows, on the CPU."""
        return {"rows": joined(self.rows)}


class RealFeatures(RealRows):
    """Features of up to `max_reals` real images, for metrics with this option: 4 d bytes each, on every rank."""

    def __init__(self, context: EvaluationContext, max_reals: int) -> None:
        super().__init__("features", choose_reals(len(context.index), max_reals))
        self.cache_name = f"real-features-{max_reals}"


class Collector:
    """Feeds the statistic of one metric with the real samples that it wants."""

    def __init__(self, section: MetricConfig, context: EvaluationContext) -> None:
        """Make the statistic. Raises UserError if it is no `torchmetrics.Metric`."""
        technique = getattr(section.load(), "real_statistic", None)
        if technique is None:
            made: object = RealRows(section.inputs[0], choose_reals(len(context.index), MOST_ROWS))
        else:
            passed = {**section.arguments, "context": context}
            with section.blaming("its real_statistic cannot be made"):
                made = technique(**{key: passed[key] for key in passed.keys() & signature(technique).parameters.keys()})
        if not isinstance(made, Metric):
            raise UserError(
                f"evaluation.metrics: {section.metric}: real_statistic made {type(made).__name__}, expected a "
                "torchmetrics.Metric"
            )
        leave_synchronization(made)
        self.section, self.statistic, self._runtime = section, made.to(context.runtime.device), context.runtime
        self.detector = context.detector
        takes = getattr(made, "takes", "samples")
        self._takes = (takes,) if isinstance(takes, str) else tuple(takes)
        count, chosen = len(context.index), getattr(made, "chosen", None)
        self.numbers: Tensor = torch.arange(count) if chosen is None else chosen
        """Indices of the samples that it gets: int64, increasing."""
        self._all, self._added = len(self.numbers) == count, 0
        self.cache_name = str(getattr(made, "cache_name", type(made).__name__))
        self.version: tuple[str, ...] = ()
        """What tells its values apart in the cache, besides the data and the detector."""
        owner = f"{getattr(technique, '__module__', '')}:{getattr(technique, '__qualname__', '')}"
        if technique is not None and package_of(owner) != "distgan":  # whose versions are _PREPROCESSING
            options = section.model_dump_json(exclude={"name", "detector", "samples"})
            self.version = (owner, options, *map(code_digest_of, (section.path, owner)))

    def update(self, seen: FeatureBatch) -> None:
        """Add a batch on this rank, without samples that the statistic does not get."""
        if not self._all:
            kept = torch.isin(seen.numbers, self.numbers)
            seen = FeatureBatch(*(part[kept.to(part.device)] for part in seen))
        if len(seen.numbers):
            self._added += len(seen.numbers)
            taken = [getattr(seen, field) for field in self._takes]
            feed(self.statistic, taken, self.section, "update of its real_statistic")

    def entry(self) -> statistics_cache.Entry | None:
        """Return the statistics over all ranks, on rank 0. Collective: call on every rank.

        The fact `samples` is the number of samples added.
        """
        with reduced_states([self.statistic], self._runtime):
            added = int(self._runtime.all_reduce_sum(torch.tensor(self._added)))
            if not self._runtime.is_main:
                return None
            with self.section.blaming("compute of its real_statistic failed"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*was called before the ``update``")  # one that needs no samples
                return statistics_cache.Entry(dict(self.statistic.compute()), {"samples": added})


def make_collectors(metrics: Iterable[tuple[MetricConfig, EvaluationContext]]) -> dict[str, Collector]:
    """Make the collectors, by the `value_name` of their metric, of the metrics that ask for `reals`."""
    wanting = [(metric, context) for metric, context in metrics if metric.asks_for("reals")]
    return {metric.value_name: Collector(metric, context) for metric, context in wanting}


def real_statistics(
    collectors: Mapping[str, Collector], context: EvaluationContext
) -> dict[str, statistics_cache.Entry]:
    """Return the collectors' entries, by the same keys, on every rank. Collective: call on every rank.

    The cache key is the collector's name and version, the data's fingerprint, the samples' shape, the detector's hash
    and the preprocessing version. Unreadable samples are left out, and a warning counts them.

    Raises:
        UserError: more than `data.max_failure_rate` of the samples cannot be read.
        Interrupted: a rank was asked to stop; nothing is cached.
    """
    config, runtime = context.config, context.runtime
    folder = evaluation_folder(config.evaluation)
    names = {metric: _file_name(collector, context) for metric, collector in collectors.items()}
    distinct = {name: collectors[metric] for metric, name in names.items()}  # equal statistics share one collector
    cached = {name: statistics_cache.read(folder / name) if runtime.is_main else None for name in distinct}
    missing = runtime.broadcast_object([name for name, entry in cached.items() if entry is None])
    if missing:
        _collect([distinct[name] for name in missing], context)
    found: dict[str, statistics_cache.Entry] = {}
    for name, collector in distinct.items():
        with runtime.raise_on_all_ranks():
            entry = collector.entry() if name in missing else cached[name]
        entry = found[name] = runtime.broadcast_object(entry)
        _check_readable(int(entry.facts["samples"]), len(collector.numbers), context)
        if name in missing and runtime.is_main:
            statistics_cache.write(folder / name, entry)
    return {metric: found[name] for metric, name in names.items()}


def _file_name(collector: Collector, context: EvaluationContext) -> str:
    detector = collector.detector
    data = context.index.fingerprint, *_shape(context.config), detector.hash if detector else "", _PREPROCESSING
    owner = f"-{detector.name}" if detector else ""
    return f"{collector.cache_name}{owner}-{statistics_cache.key(*data, *collector.version)}.safetensors"


def _shape(config: Config) -> tuple[object, ...]:
    data = config.data
    kinds: dict[str, tuple[object, ...]] = {
        "images": (data.resolution, data.channels, data.background),
        "text": (data.length,),
        "points": (data.dimensions,),
        "latents": (data.resolution, data.channels),
    }
    return *kinds[data.kind], *stages_key(data)


def _collect(collectors: list[Collector], context: EvaluationContext) -> None:
    """Make one pass over the samples that any collector needs; each rank reads a contiguous part."""
    config, runtime = context.config, context.runtime
    groups: dict[Detector | None, list[Collector]] = {}
    for collector in collectors:
        groups.setdefault(collector.detector, []).append(collector)
    numbers = torch.cat([collector.numbers for collector in collectors]).unique()
    if runtime.is_main and len(numbers):
        by = ", ".join(detector.name for detector in groups if detector)
        by = f" with detector {by}" if by else ""
        log.info("computing the statistics of %d real samples%s", len(numbers), by)
    size = config.evaluation.batch_size
    # Contiguous ranges, so that only one rank fetches a given remote shard.
    mine = numbers.tensor_split(runtime.world_size)[runtime.rank]
    rounds = -(-(len(numbers) // runtime.world_size) // size)
    memory = within_memory(f"evaluation.batch_size = {size}", "lower it")
    interruptible = runtime.interruptible(context.asked, rounds)
    with torch.no_grad(), ieee_float32(), runtime.raise_on_all_ranks(), interruptible as check, memory:
        for reals in read_reals(config.data, context.index, mine.split(size) if len(mine) else ()):
            check()
            if len(reals.samples):
                samples = pad_batch(reals.samples, size).to(runtime.device)
                if config.data.kind == "latents":
                    samples = draw_posterior(samples, config.data.channels, 0, pad_batch(reals.numbers, size))
                for detector, group in groups.items():
                    seen = extract_features(detector, reals.numbers, samples, reals.labels)
                    for collector in group:
                        collector.update(seen)


def extract_features(detector: Detector | None, numbers: Tensor, samples: Tensor, labels: Tensor) -> FeatureBatch:
    """Return the first len(numbers) samples with their features and logits."""
    count = len(numbers)
    if detector is None:
        features = logits = torch.empty(len(samples), 0, device=samples.device)
    else:
        features, logits = detector(samples)
    return FeatureBatch(numbers, samples[:count], labels.to(samples.device), features[:count], logits[:count])


def _check_readable(found: int, expected: int, context: EvaluationContext) -> None:
    unreadable, config = expected - found, context.config
    if unreadable > config.data.max_failure_rate * expected:
        raise UserError(
            f"data.path = {config.data.path}: {unreadable} of {expected} samples cannot be read, "
            f"more than data.max_failure_rate = {config.data.max_failure_rate}; repair or pack them again",
            everywhere=True,
        )
    if unreadable and context.runtime.is_main:
        log.warning("real statistics: %d of %d samples cannot be read and are left out", unreadable, expected)
