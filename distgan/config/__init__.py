"""The schema of a run: YAML plus ``key=value`` overrides, checked before anything else happens.

Every field is documented by the string under it; the same strings become the JSON Schema that editors read
(``python -m distgan schema``). Sections are pure data: the package that a section belongs to builds from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, ValidationError, model_validator

from distgan.config.data import DataConfig
from distgan.config.fields import Section, Seed, folder
from distgan.config.objective import (
    FeatureMatchingConfig,
    GradientPenaltyConfig,
    HistoricalAveragingConfig,
    InstanceNoiseConfig,
    ObjectiveConfig,
    TargetsConfig,
    WeightClippingConfig,
    ZeroCentredPenaltyConfig,
)
from distgan.config.players import (
    DiscriminatorConfig,
    EMAConfig,
    GeneratorConfig,
    GrowthConfig,
    MinibatchDiscriminationConfig,
    MinibatchStddevConfig,
    NetworkConfig,
    OptimizerConfig,
)
from distgan.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    ExtraCriticStepsConfig,
    MetricName,
    MonitoringConfig,
    StopWhenFlatConfig,
    TrainingConfig,
)
from distgan.errors import UserError
from distgan.recipe import apply_override, read_recipe, to_plain
from distgan.validation import explain

__all__ = [
    "ARCHITECTURES",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DiscriminatorConfig",
    "EMAConfig",
    "EvaluationConfig",
    "ExtraCriticStepsConfig",
    "FeatureMatchingConfig",
    "GeneratorConfig",
    "GradientPenaltyConfig",
    "GrowthConfig",
    "HistoricalAveragingConfig",
    "InstanceNoiseConfig",
    "MinibatchDiscriminationConfig",
    "MinibatchStddevConfig",
    "MonitoringConfig",
    "NetworkConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "Section",
    "StopWhenFlatConfig",
    "TargetsConfig",
    "TrainingConfig",
    "WeightClippingConfig",
    "ZeroCentredPenaltyConfig",
    "cache_folder",
    "dump_config",
    "flatten",
    "json_schema",
    "load_config",
    "parse_config",
    "parse_section",
]

AnySection = TypeVar("AnySection", bound=Section)


class Config(Section):
    """A run, whole."""

    run_dir: Annotated[str, AfterValidator(folder)]
    """The folder that everything of this run is written to."""
    seed: Seed = 0
    """All randomness is a function of this number and of what it is drawn for."""
    data: DataConfig
    generator: GeneratorConfig = GeneratorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    training: TrainingConfig
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    growth: GrowthConfig | None = None
    """Progressive growing of both networks; null trains all of their layers at full resolution throughout."""

    @property
    def micro_batch(self) -> int:
        """Samples that one forward pass of all ranks together sees: the batch that batch statistics are over.

        With progressive growing, levels may have another by `growth.batch_sizes`: see `schedule.micro_batch`.
        """
        return self.training.batch_size // self.training.accumulation

    @property
    def metrics(self) -> list[MetricName]:
        """What evaluations measure: as configured, else what suits the kind of data."""
        return self.evaluation.metrics or METRICS[self.data.kind][:1]

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the objective depends on how a batch is cut into micro-batches."""
        comparing = self.discriminator.minibatch_discrimination or self.discriminator.minibatch_stddev
        normalisations = {self.generator.normalisation, self.discriminator.normalisation}
        batch_norm = bool(normalisations & {"synchronized", "batch"})
        return batch_norm or comparing is not None or self.objective.uses_batch_statistics

    @property
    def doubts(self) -> tuple[str, ...]:
        """What the run will do as told, though its user may not want it; one line each."""
        found = []
        targets, objective = self.objective.targets, self.objective
        if targets is not None and targets.fake not in (0.0, (0.0, 0.0)):
            found.append(
                f"objective.targets.fake = {targets.fake}: with targets above 0 for generated samples the optimal "
                "discriminator, (alpha p + beta q) / (p + q), no longer vanishes where there is no data, so that the "
                "generator is held to its present mistakes (Salimans et al. 2016, section 3.4); leave it at 0"
            )
        held = objective.weight_clipping or objective.gradient_penalty or objective.r1 or objective.r2
        if objective.adversarial == "wasserstein" and not held and not self.discriminator.spectral_norm:
            found.append(
                "objective.adversarial = wasserstein: nothing bounds the critic's slope, so that its loss has no "
                "minimum; set objective.gradient_penalty={} or objective.weight_clipping={}, or "
                "discriminator.spectral_norm=true"
            )
        for role in ("generator", "discriminator"):
            network: NetworkConfig = getattr(self, role)
            times = (network.reference_size or 0) // self.micro_batch
            if network.normalisation == "virtual" and times >= 16:
                found.append(
                    f"{role}.reference_size = {network.reference_size}: each pass through the network runs its "
                    f"reference batch too, which is {times} times the micro-batch of {self.micro_batch}; lower it"
                )
        return tuple(found)

    @model_validator(mode="after")
    def _fill_in(self) -> Config:
        for role in ("generator", "discriminator"):
            network: NetworkConfig = getattr(self, role)
            if network.normalisation == "virtual" and network.reference_size is None:
                sized = network.model_copy(update={"reference_size": self.micro_batch})
                object.__setattr__(self, role, sized)  # sections are frozen for everybody else
        return self

    @model_validator(mode="after")
    def _check(self) -> Config:
        for role in ("generator", "discriminator"):
            architecture = getattr(self, role).architecture
            if architecture not in ARCHITECTURES[self.data.kind]:
                raise ValueError(
                    f"{role}.architecture: {architecture} does not make {self.data.kind} (data.kind); "
                    f"for these choose {' or '.join(ARCHITECTURES[self.data.kind])}"
                )
        for metric in self.metrics:
            if metric not in METRICS[self.data.kind]:
                raise ValueError(
                    f"evaluation.metrics: {metric} does not measure {self.data.kind} (data.kind); "
                    f"for these choose from {', '.join(METRICS[self.data.kind])}"
                )
        if self.generator.architecture == "progressive" and self.discriminator.architecture != "progressive":
            raise ValueError("discriminator.architecture: must be progressive as the generator's is")
        if self.discriminator.architecture == "progressive" and self.generator.architecture != "progressive":
            raise ValueError("generator.architecture: must be progressive as the discriminator's is")
        if self.growth is not None and self.generator.architecture != "progressive":
            raise ValueError("growth: only networks of architecture progressive grow; set both to it, or leave it out")
        if self.growth is not None:
            self._check_growth(self.growth)
        if self.objective.gradient_penalty and self.discriminator.normalisation in ("synchronized", "batch"):
            raise ValueError(
                "discriminator.normalisation: batch norm makes a critic's output depend on the whole batch, so that "
                "the gradient penalty, which is on each sample's own gradient, means nothing (Gulrajani et al. 2017, "
                "section 4); use layer or none"
            )
        if self.training.stop_when_flat is not None and self.objective.adversarial != "wasserstein":
            raise ValueError(
                f"training.stop_when_flat: {self.objective.adversarial} does not estimate the Wasserstein distance; "
                "set objective.adversarial=wasserstein, or leave stop_when_flat out"
            )
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        """Groups of the minibatch standard deviation are equally large in each batch that the layer sees."""
        if self.discriminator.minibatch_stddev is None:
            return
        size = self.discriminator.minibatch_stddev.group_size
        sizes = {self.training.batch_size, *(self.growth.batch_sizes.values() if self.growth else ())}
        for batch in sorted(batch_size // self.training.accumulation for batch_size in sizes):
            if batch > size and batch % size:
                raise ValueError(
                    f"discriminator.minibatch_stddev.group_size: {size} does not divide the micro-batch of {batch} "
                    "samples (training.batch_size / training.accumulation); change one of them"
                )
        reference = self.discriminator.reference_size or self.micro_batch
        if self.discriminator.normalisation == "virtual" and reference != self.micro_batch and reference % size:
            raise ValueError(
                f"discriminator.reference_size: {reference} is neither a multiple of minibatch_stddev.group_size="
                f"{size} nor the micro-batch of {self.micro_batch}; change one of them"
            )

    def _check_growth(self, growth: GrowthConfig) -> None:
        for key, side in (
            ("first_resolution", growth.first_resolution),
            ("batch_sizes", max(growth.batch_sizes, default=0)),
        ):
            if side > self.data.resolution:
                raise ValueError(f"growth.{key}: {side} is above data.resolution = {self.data.resolution}")
        for side, batch in growth.batch_sizes.items():
            if batch % self.training.accumulation:
                raise ValueError(
                    f"growth.batch_sizes: {batch} at {side} does not divide into training.accumulation="
                    f"{self.training.accumulation} micro-batches; change one of them"
                )


ARCHITECTURES = {
    "images": ("dcgan", "resnet", "progressive", "r3gan"),
    "text": ("characters",),
    "points": ("mlp",),
}
"""Which networks are for which kind of data."""
METRICS: dict[str, list[MetricName]] = {
    "images": ["fid", "inception_score", "kid", "classes"],
    "text": ["ngram_js"],
    "points": ["modes"],
}
"""Which metrics are for which kind of data; the first is the default."""


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML recipe, apply ``section.key=value`` overrides (values are YAML), and check it.

    Raises:
        UserError: one line naming the file and key, what was found and what is accepted.
    """
    return parse_config(read_recipe(path), overrides, source=str(path))


def parse_config(values: dict[str, Any], overrides: Iterable[str] = (), *, source: str = "config") -> Config:
    """Check plain values (as YAML or JSON give them) against the schema. Raises UserError."""
    plain = to_plain(values, source)
    for override in overrides:
        apply_override(plain, override)
    return parse_section(Config, plain, source=source)


def parse_section(section: type[AnySection], values: Any, *, source: str) -> AnySection:
    """Check plain values against one section of the schema. Raises UserError."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, section)}") from None


def dump_config(config: Config) -> str:
    """The resolved config, every default written out, as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Config) -> dict[str, Any]:
    """Every key of the config, in full, with its plain value: `training.steps` -> 1000."""

    def walk(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def json_schema() -> dict[str, Any]:
    """JSON Schema of the config, for editors."""
    return Config.model_json_schema()


def cache_folder(configured: str | None) -> Path:
    """The node-local cache: as configured, else ``$DISTGAN_CACHE``, else ``~/.cache/distgan``.

    Raises:
        UserError: it lies in a home folder, and this user has none.
    """
    try:
        return Path(configured or os.environ.get("DISTGAN_CACHE") or Path.home() / ".cache" / "distgan").expanduser()
    except RuntimeError:
        raise UserError(
            "the cache folder lies in a home folder, and this user has none; set DISTGAN_CACHE to a writable folder"
        ) from None
