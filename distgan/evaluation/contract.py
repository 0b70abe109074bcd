"""The contracts of metrics, of statistics of the real samples, and of detectors: distgan's own and those of others.

Each is called with its options, and with what its parameters ask for by these names:

- `context`: an `EvaluationContext`, the run that is evaluated;
- `reals`, of metrics: `RealStatistic.compute` of all ranks, tensors by name, and `samples`, the number of real samples.

A metric's or detector's class may have a static method `validate`. A training run with evaluations calls it before the
first step, and so does `distgan doctor`. It gets what its parameters ask for by name: options, `config`, `index` (the
real samples), and `name`, that of the metric's value or of the detector. It raises UserError if evaluations would fail.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from distgan.config import Config
from distgan.data.index.table import Index
from distgan.distributed.control import Asked, never
from distgan.distributed.runtime import Runtime
from distgan.evaluation.detectors.features import Detector


@dataclass(frozen=True)
class EvaluationContext:
    """The run that is evaluated."""

    config: Config
    index: Index
    """What the real samples are: their number, labels and classes."""
    runtime: Runtime
    asked: Asked = never
    """Returns True if this rank was asked to stop, for long work such as training a detector."""
    detector: Detector | None = None
    """Detector of the metric; None if it takes neither features nor logits, and for the detector itself."""
    name: str = ""
    """Name of the metric's main value, such as `fid[classifier]`, for messages; for a detector that of the detector."""
    num_samples: int = 0
    """Number of generated samples that the metric gets over all ranks."""


class EvaluatedGenerator(Protocol):
    """What a metric that takes `"generator"` gets in place of samples, to make its own."""

    @property
    def network(self) -> nn.Module:
        """The EMA generator in evaluation mode: latents (n, latent_size) and labels (n,) or None to samples (n, ...),
        float, images in [-1, 1]."""

    def draw(self, purpose: str, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return latents and labels, distributed as in training: functions of the run's seed, a purpose of the metric's
        own, and positions (n,), int64, so that they do not depend on the number of ranks."""


class SuiteMetric(Protocol):
    """What an evaluation asks of a `torchmetrics.Metric`, besides being one. It is made once and reset after each use.

    Its states are reduced over ranks, with their own `dist_reduce_fx`, to rank 0, where alone `compute` is called.
    Those of "sum" take one all-reduce; rows of "cat" are sent to rank 0 only, in order of rank. The states of one
    metric at a time are reduced.

    The class variables have the defaults of `distgan.config.evaluation.MetricOptions`.
    """

    kinds: ClassVar[tuple[str, ...]]
    takes: ClassVar[Any]
    higher_is_better: bool | None
    main_value: ClassVar[str]
    real_statistic: ClassVar[Any]
    """Class of the `RealStatistic` that the parameter `reals` gets. Its parameters are `context` and options of the
    metric, by name. By default it is `RealRows` of the first field in `takes`."""

    computes_on_all_ranks: ClassVar[bool] = False
    """True if every rank gets the reduced states, and `compute` is called on every rank, to share its work by the
    collectives of `context.runtime`. It must raise the same errors on all ranks. The values of rank 0 count."""

    def update(self, *taken: Any) -> None:
        """Add a batch of generated samples: the fields of `FeatureBatch` that `takes` names, in that order.

        For `"generator"` it gets an `EvaluatedGenerator`. It takes `"numbers"` too then, to make what belongs to them.
        """

    def compute(self) -> float | Tensor | dict[str, float | Tensor]:
        """Return a number, or numbers by name. The name "" is that of the metric alone.

        `std` is reported as `METRIC_std`, and `[4]` as `METRIC[4]`.
        """


class RealStatistic(Protocol):
    """A `torchmetrics.Metric` of the real samples. It is computed once and cached, under `cache_name`.

    The cache tells apart the data, the shape of the samples, the detector, and, for a class outside distgan, the
    metric's options and the sources of the class's package.
    """

    cache_name: str
    """Prefix of the cached file's name; by default that of the class."""
    takes: Any
    """Fields of `FeatureBatch` that `update` gets: a name or a tuple of names; by default `"samples"`."""
    chosen: Tensor | None
    """Indices of the real samples that it gets, int64, increasing; None, the default, for all."""

    def update(self, *taken: Tensor) -> None:
        """Add a batch of real samples."""

    def compute(self) -> dict[str, Tensor]:
        """Return tensors by name. Called on rank 0, with the states of all ranks."""
