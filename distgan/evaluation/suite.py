"""All metrics of a generator: one pass of features over its images, compared with statistics of the real ones.

Rank r of W evaluates the generated images i = r mod W. Latents and labels are the caller's function of i, so the set of
images does not depend on W; nor do the metrics, beyond the rounding of sums in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distgan.config import Config
from distgan.data.index import Index
from distgan.errors import UserError
from distgan.evaluation import cache
from distgan.evaluation.features import Detector, evaluation_folder, load_detector
from distgan.evaluation.frechet import FrechetDistance, Reference, make_reference
from distgan.evaluation.moments import Moments
from distgan.evaluation.samples import fill, rank_batches, read_reals

if TYPE_CHECKING:
    from distgan.distributed.runtime import Runtime

log = logging.getLogger("distgan")

Generate = Callable[[Tensor], Tensor]
"""From sample numbers (n,), int64 on the CPU, to images (n, C, R, R), uint8, each a function of its number alone."""
_PREPROCESSING = 1  # Raised by any change of how shards become pixels, so that no cached statistics outlive it.


class Evaluator:
    """The detector and the real statistics, loaded once for any number of evaluations of one run."""

    def __init__(self, config: Config, index: Index, runtime: Runtime) -> None:
        """Call it on all ranks; the first time it trains or downloads the detector and reads all real images.

        Raises:
            UserError: see `load_detector`; too many real images cannot be read.
        """
        self.config = config
        self.runtime = runtime
        self.detector = load_detector(config.evaluation, config.data, index, runtime)
        self.reference = real_statistics(self.detector, config, index, runtime)
        fewest = min(config.evaluation.num_samples, self.reference.samples)
        if fewest <= self.detector.dimension and runtime.is_main:
            log.warning(
                "fid[%s] of %d generated and %d real images: with no more images than features (%d) it is far too "
                "large and compares only between equal numbers; raise evaluation.num_samples or use another detector",
                self.detector.name, config.evaluation.num_samples, self.reference.samples, self.detector.dimension,
            )  # fmt: skip

    def __call__(self, generate: Generate) -> dict[str, float]:
        """Metrics by name, the same on every rank, such as `{"fid[classifier]": 12.3}`. Call it on all ranks.

        Raises UserError for fewer than two images.
        """
        settings = self.config.evaluation
        distance = FrechetDistance(self.reference, sync_on_compute=False).to(self.runtime.device)
        with torch.no_grad():
            for batch in rank_batches(
                settings.num_samples, settings.batch_size, self.runtime.rank, self.runtime.world_size
            ):
                images = generate(fill(batch, settings.batch_size)).to(self.runtime.device)
                distance.update(self.detector(images).features[: len(batch)])
        distance.sync()
        # On one rank, because another machine's rounding could make the ranks disagree on which checkpoint is best.
        metrics = None
        with self.runtime.together():
            if self.runtime.is_main:
                metrics = {f"fid[{self.detector.name}]": float(distance.compute())}
        found: dict[str, float] = self.runtime.broadcast_object(metrics)
        return found


def evaluate(generate: Generate, config: Config, index: Index, runtime: Runtime) -> dict[str, float]:
    """Metrics of a generator, once; see `Evaluator`."""
    return Evaluator(config, index, runtime)(generate)


def real_statistics(detector: Detector, config: Config, index: Index, runtime: Runtime) -> Reference:
    """The side of the real images: all of them, from the cache folder or computed now by all ranks together.

    They are cached under the data's fingerprint, the images' shape, the detector's hash and the preprocessing.
    Images that cannot be read are left out, and counted in a warning.

    Raises:
        UserError: more than `data.max_failure_rate` of them cannot be read.
    """
    data = config.data
    name = cache.key(index.fingerprint, data.resolution, data.channels, detector.hash, _PREPROCESSING)
    path = evaluation_folder(config.evaluation) / f"real-{detector.name}-{name}.safetensors"
    entry = runtime.broadcast_object(cache.read(path) if runtime.is_main else None)
    if entry is None:
        reference = make_reference(_real_moments(detector, config, index, runtime).compute())
    else:
        mean, factor = (entry.tensors[side].to(runtime.device) for side in ("mean", "factor"))
        reference = Reference(int(entry.facts["samples"]), mean, factor)
    unreadable = len(index) - reference.samples
    if unreadable > data.max_failure_rate * len(index):
        raise UserError(
            f"data.path = {data.path}: {unreadable} of {len(index)} images cannot be read, "
            f"more than data.max_failure_rate = {data.max_failure_rate}; repair or pack them again"
        )
    if unreadable and runtime.is_main:
        log.warning("the real statistics leave out %d of %d images that cannot be read", unreadable, len(index))
    if entry is None and runtime.is_main:
        tensors = {"mean": reference.mean, "factor": reference.factor}
        cache.write(path, cache.Entry(tensors, {"samples": reference.samples}))
    return reference


def _real_moments(detector: Detector, config: Config, index: Index, runtime: Runtime) -> Moments:
    """Moments of all real images, on each rank of its share."""
    if runtime.is_main:
        log.info("computing the statistics of %d real images for fid[%s]", len(index), detector.name)
    moments = Moments(detector.dimension).to(runtime.device)
    size = config.evaluation.batch_size
    with runtime.together():
        # A range of its own for each rank, so that a remote shard is fetched by one of them.
        mine = torch.arange(len(index)).tensor_split(runtime.world_size)[runtime.rank]
        for images, _ in read_reals(config.data, index, mine.split(size) if len(mine) else ()):
            if len(images):
                moments.update(detector(fill(images, size).to(runtime.device)).features[: len(images)])
    return moments
