"""Statistics of the real samples that metrics need, from the cache folder or one pass over the shards."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from distgan.config import Config
from distgan.data.index.table import Index
from distgan.data.stages import stages_key
from distgan.distributed.control import Asked, never
from distgan.errors import UserError
from distgan.evaluation import statistics_cache
from distgan.evaluation.detectors.features import Detector, evaluation_folder
from distgan.evaluation.samples import FeatureBatch, fill, read_reals

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

log = logging.getLogger("distgan")

_PREPROCESSING = 1  # Raise it with every change of the decoding, so that no stale cached statistics are used.


class Collector(Protocol):
    """Collects the statistics of the real samples that one metric needs."""

    name: str
    """Prefix of the cached file's name."""
    numbers: Tensor
    """Indices of the samples it needs: int64, increasing."""

    def update(self, seen: FeatureBatch) -> None:
        """Add a batch on this rank; ignore samples that the metric does not need."""

    def entry(self) -> statistics_cache.Entry:
        """Return the statistics over all ranks, for the cache. Collective: call on every rank; rank 0's is used.

        The fact `samples` is the number of samples taken.
        """


def real_statistics(
    collectors: Mapping[str, Collector],
    detector: Detector | None,
    config: Config,
    index: Index,
    runtime: Runtime,
    asked: Asked = never,
) -> dict[str, statistics_cache.Entry]:
    """Return the collectors' entries, by the same keys, on every rank. Collective: call on every rank.

    The cache key is the collector's name, the data's fingerprint, the samples' shape, the detector's hash and the
    preprocessing version. Unreadable samples are left out, and a warning counts them.

    Raises:
        UserError: more than `data.max_failure_rate` of the samples cannot be read.
        Interrupted: a rank was asked to stop; nothing is cached.
    """
    folder = evaluation_folder(config.evaluation)
    key = statistics_cache.key(index.fingerprint, *_shape(config), detector.hash if detector else "", _PREPROCESSING)
    owner = f"-{detector.name}" if detector else ""
    paths = {metric: folder / f"{of.name}{owner}-{key}.safetensors" for metric, of in collectors.items()}
    found = {metric: statistics_cache.read(path) if runtime.is_main else None for metric, path in paths.items()}
    missing = runtime.broadcast_object([metric for metric, entry in found.items() if entry is None])
    if missing:
        _collect([collectors[metric] for metric in missing], detector, config, index, runtime, asked)
    entries = {}
    for metric, collector in collectors.items():
        with runtime.raise_on_all_ranks():
            entry = collector.entry() if metric in missing else found[metric]
        entry = entries[metric] = runtime.broadcast_object(entry if runtime.is_main else None)
        _check_readable(int(entry.facts["samples"]), len(collector.numbers), config, runtime)
        if metric in missing and runtime.is_main:
            statistics_cache.write(paths[metric], entry)
    return entries


def _shape(config: Config) -> tuple[object, ...]:
    data = config.data
    kinds: dict[str, tuple[object, ...]] = {
        "images": (data.resolution, data.channels, data.background),
        "text": (data.length,),
        "points": (data.dimensions,),
    }
    return *kinds[data.kind], *stages_key(data)


def _collect(
    collectors: list[Collector],
    detector: Detector | None,
    config: Config,
    index: Index,
    runtime: Runtime,
    asked: Asked,
) -> None:
    """Make one pass over the samples that any collector needs; each rank reads a contiguous part."""
    numbers = torch.cat([collector.numbers for collector in collectors]).unique()
    if runtime.is_main:
        by = f" with detector {detector.name}" if detector else ""
        log.info("computing the statistics of %d real samples%s", len(numbers), by)
    size = config.evaluation.batch_size
    # Contiguous ranges, so that only one rank fetches a given remote shard.
    mine = numbers.tensor_split(runtime.world_size)[runtime.rank]
    rounds = -(-(len(numbers) // runtime.world_size) // size)
    with runtime.raise_on_all_ranks(), runtime.interruptible(asked, rounds) as check:
        for reals in read_reals(config.data, index, mine.split(size) if len(mine) else ()):
            check()
            if len(reals.samples):
                seen = extract_features(
                    detector, reals.numbers, fill(reals.samples, size).to(runtime.device), reals.labels
                )
                for collector in collectors:
                    collector.update(seen)


def extract_features(detector: Detector | None, numbers: Tensor, samples: Tensor, labels: Tensor) -> FeatureBatch:
    """Return the first len(numbers) samples with their features and logits."""
    count = len(numbers)
    if detector is None:
        features = logits = torch.empty(len(samples), 0, device=samples.device)
    else:
        features, logits = detector(samples)
    return FeatureBatch(numbers, samples[:count], labels.to(samples.device), features[:count], logits[:count])


def _check_readable(found: int, expected: int, config: Config, runtime: Runtime) -> None:
    unreadable = expected - found
    if unreadable > config.data.max_failure_rate * expected:
        raise UserError(
            f"data.path = {config.data.path}: {unreadable} of {expected} samples cannot be read, "
            f"more than data.max_failure_rate = {config.data.max_failure_rate}; repair or pack them again",
            everywhere=True,
        )
    if unreadable and runtime.is_main:
        log.warning("real statistics: %d of %d samples cannot be read and are left out", unreadable, expected)
