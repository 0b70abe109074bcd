"""A run, whole: all sections, what follows from them, and what of one does not fit another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError, model_validator

from distgan.config.architectures import GroupingOptions
from distgan.config.data import DataConfig
from distgan.config.error_messages import explain
from distgan.config.evaluation import DEFAULT_METRIC, METRICS, DetectorConfig, EvaluationConfig, MetricConfig
from distgan.config.fields import Section, Seed, local_copy, run_location
from distgan.config.named import named_sections
from distgan.config.objective import ObjectiveConfig
from distgan.config.objective.alignment import with_projector
from distgan.config.players import DiscriminatorConfig, EMAConfig, GeneratorConfig, GrowthConfig, NetworkConfig
from distgan.config.reconstruction import check_reconstruction
from distgan.config.training import CheckpointConfig, MonitoringConfig, TrainingConfig
from distgan.errors import UserError
from distgan.extensions import package_of

MAX_STATISTICS_BATCH = 128
"""Moments of more samples hardly differ, and a device must hold their activations."""


class _OneLineErrors(type(Section)):  # type: ignore[misc]
    def __call__(cls, *values: Any, **sections: Any) -> Any:
        # Here, and not in __init__, which pydantic calls too when it reads a recipe, whose messages name the file.
        try:
            return super().__call__(*values, **sections)
        except ValidationError as error:
            raise UserError(f"Config: {explain(error, cls)[1]}") from None


class Config(Section, metaclass=_OneLineErrors):
    """A whole run."""

    run_dir: Annotated[str, AfterValidator(run_location)]
    """Folder that the run writes to, or its URL in an object store, such as `s3://bucket/runs/first`. With a URL, each
    node has a copy in the folder `runs` of `data.cache_dir`."""
    seed: Seed = 0
    """Random seed. All randomness is a function of it and of what it is drawn for."""
    data: DataConfig
    """Training data, and how it is read."""
    generator: GeneratorConfig = GeneratorConfig()
    """Network and optimizer of the generator."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """Network and optimizer of the discriminator."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """Loss of both players."""
    training: TrainingConfig
    """Length of the run, batch size, and arithmetic."""
    ema: EMAConfig = EMAConfig()
    """Exponential moving average of the generator's weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Interval and number of checkpoints."""
    monitoring: MonitoringConfig = MonitoringConfig()
    """What the run writes while it trains."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Metrics of the EMA generator."""

    growth: GrowthConfig | None = None
    """Progressive growing of both networks; null trains all layers at full resolution from the start."""

    @property
    def run_url(self) -> str | None:
        """URL of the run in an object store; None for a folder."""
        return self.run_dir if "://" in self.run_dir else None

    @property
    def run_folder(self) -> Path:
        """Local folder of the run: `run_dir` or, for a URL, this host's copy in the cache (see `local_copy`)."""
        return Path(self.run_dir) if self.run_url is None else local_copy(self.run_url, self.data.cache_dir)

    @property
    def micro_batch(self) -> int:
        """Samples that one forward pass of all ranks together sees in a discriminator update.

        Statistics over the batch are over these, except where the recipe has each rank keep to its own share
        (`normalization: batch`, `minibatch_discrimination.over: rank`). With `growth`: `schedule.micro_batch`.
        """
        return self.training.batch_size // self.training.accumulation

    @property
    def generator_micro_batch(self) -> int:
        """The same in a generator update."""
        size = self.training.generator_batch_size or self.training.batch_size
        return size // self.training.accumulation

    @property
    def generator_draws_reals(self) -> bool:
        """Whether generator updates use real samples of their own."""
        return self.training.generator_reals == "own" and self.objective.generator_needs_reals

    @property
    def reads_images(self) -> bool:
        """Whether training reads the images that latents are encoded from."""
        alignment = self.objective.alignment
        return self.data.kind == "latents" and alignment is not None and alignment.weights is not None

    @property
    def statistics_batch(self) -> int:
        """Samples of a batch that one device passes whole, for the statistics that a fixed generator is to have.

        As in its updates, up to a bound, since a micro-batch of many ranks does not fit on one of them.
        """
        return min(self.generator_micro_batch, MAX_STATISTICS_BATCH)

    @property
    def code_paths(self) -> list[str]:
        """Import paths of the user's code that the config names."""
        named = {section.technique for _, section in named_sections(self) if not section.is_built_in}
        # A run records the version of torch.
        return sorted(path for path in named if package_of(path) != "torch")

    @property
    def packages(self) -> list[str]:
        """Top-level packages of the user's code that the config names."""
        return sorted({*map(package_of, self.code_paths)})

    @property
    def metrics(self) -> list[MetricConfig]:
        """What evaluations measure: as configured, else what suits the kind of data.

        Each has its `samples`, and its `detector` if it needs one.
        """
        default = DEFAULT_METRIC.get(self.measured_kind)
        metrics = self.evaluation.metrics or ([MetricConfig(metric=default)] if default else [])
        return [self.evaluation.resolved(metric) for metric in metrics]

    @property
    def measured_kind(self) -> str:
        """Kind of the samples that metrics get: decoded latents are images."""
        return "images" if self.data.decoder is not None else self.data.kind

    @property
    def generated_samples(self) -> int:
        """Number of samples that an evaluation generates: those of the metric that gets most."""
        return max((metric.samples or 0 for metric in self.metrics), default=0)

    @property
    def detectors(self) -> list[DetectorConfig]:
        """The different detectors that evaluations need, in the order of the metrics."""
        found = {metric.detector.key: metric.detector for metric in self.metrics if metric.detector}
        return list(found.values())

    @model_validator(mode="after")
    def _fill_in(self) -> Config:
        for role, micro_batch in (("generator", self.generator_micro_batch), ("discriminator", self.micro_batch)):
            network: NetworkConfig = getattr(self, role)
            if network.facts.has_reference and network.facts.reference_samples is None:
                values = {**network.model_dump(), "reference_size": min(micro_batch, MAX_STATISTICS_BATCH)}
                sized = type(network).model_validate(values)
                object.__setattr__(self, role, sized)  # sections are frozen for everybody else
        aligned = with_projector(self.discriminator, self.objective.alignment, self.data.kind)
        object.__setattr__(self, "discriminator", aligned)
        return self

    @model_validator(mode="after")
    def _check_kind(self) -> Config:
        """Networks and metrics are for this kind of data."""
        kind = self.data.kind
        for role in ("generator", "discriminator"):
            network: NetworkConfig = getattr(self, role)
            if kind not in network.facts.kinds:
                suited = [name for name, built_in in network.built_in.items() if kind in built_in.options.kinds]
                raise ValueError(
                    f"{role}.architecture: {network.architecture} does not make {kind} (data.kind); "
                    f"for these choose {' or '.join(suited)}"
                )
            side = self.data.resolution
            if network.facts.power_of_two and side & (side - 1):
                raise ValueError(
                    f"data.resolution: {side} is not a power of two, which {network.architecture} networks need"
                )
            self._check_precision(role, network)
        augmentation = self.objective.augmentation
        if augmentation is not None and kind not in augmentation.facts.kinds:
            suited = [name for name, built_in in augmentation.built_in.items() if kind in built_in.options.kinds]
            fix = f"choose {' or '.join(suited)}, or leave it out" if suited else "leave it out"
            why = ", whose channels are no colors and do not reach from -1 to 1" if kind == "latents" else ""
            raise ValueError(
                f"objective.augmentation: {augmentation.augmentation} does not augment {kind} (data.kind){why}; {fix}"
            )
        if self.evaluation.every and not self.metrics:
            raise ValueError(
                f"evaluation.every: {self.evaluation.every}: no metric is named, and {kind} (data.kind) have none by "
                "default; name one in evaluation.metrics, or set evaluation.every=0"
            )
        if self.evaluation.real_images is not None and self.data.decoder is None:
            raise ValueError("evaluation.real_images: has no effect without data.decoder; leave it out, or set that")
        measured = self.measured_kind
        decode = "; set data.decoder to decode them" if measured == "latents" else ""
        for metric in self.metrics:
            if metric.needs_detector and measured != "images":
                raise ValueError(
                    f"evaluation.metrics: {metric.metric} takes the {metric.inputs[0]} of a detector, which are of "
                    f"images, but data.kind is {measured}{decode}"
                )
            if measured not in metric.facts.kinds:
                suited = [name for name, built_in in METRICS.items() if measured in built_in.options.kinds]
                raise ValueError(
                    f"evaluation.metrics: {metric.metric} does not measure {measured} (data.kind); "
                    f"for these choose from {', '.join(suited)}"
                )
        return self

    def _check_precision(self, role: str, network: NetworkConfig) -> None:
        """Precision by stage needs networks of stages, of which some are in bfloat16."""
        below, side = self.training.float32_below, self.data.resolution
        if below is None or not network.is_allowed:
            return
        if not network.facts.has_stages:
            suited = [name for name, built_in in network.built_in.items() if built_in.options.has_stages]
            raise ValueError(
                f"training.mixed_precision.float32_below: {role}.architecture: {network.architecture} has no stages; "
                f"choose {' or '.join(suited)}, or set training.mixed_precision=bf16"
            )
        if below > side:
            raise ValueError(
                f"training.mixed_precision.float32_below: {below} is above data.resolution = {side}, so that nothing "
                "would run in bfloat16; lower it, or set training.mixed_precision=no"
            )

    @model_validator(mode="after")
    def _check_objective(self) -> Config:
        """The objective means something for these networks."""
        check_reconstruction(self)
        if self.objective.gradient_penalty and self.discriminator.facts.normalizes_batch:
            raise ValueError(
                "discriminator.normalization: batch norm makes a critic's output depend on the whole batch, so that "
                "the gradient penalty, which is on each sample's own gradient, means nothing (Gulrajani et al. 2017, "
                "section 4); use layer or none"
            )
        apart = self.discriminator.facts.batch_statistics
        for name in ("r1", "r2"):
            penalty = getattr(self.objective, name)
            if penalty is not None and penalty.fraction < 1 and apart:
                raise ValueError(
                    f"objective.{name}.fraction: {penalty.fraction:g} would give the penalized samples other batch "
                    f"statistics (discriminator.{next(iter(apart))}) than the whole batch; set 1, or turn them off"
                )
        levels = self.generator.facts.levels
        if self.generator.is_allowed and self.discriminator.is_allowed and levels != self.discriminator.facts.levels:
            raise ValueError(
                f"discriminator.architecture: {self.discriminator.architecture} judges "
                f"{self.discriminator.facts.levels} levels of outputs, but {self.generator.architecture} has {levels}; "
                "choose two networks of one kind, such as gat"
            )
        if levels > 1 and self.objective.gradient_penalty:
            raise ValueError(
                f"objective.gradient_penalty: real samples lack the {levels} levels of {self.generator.architecture}, "
                "so that there is nothing between a real sample and a generated one; use r1 and r2"
            )
        adversarial = self.objective.adversarial
        estimates = not adversarial.is_allowed or adversarial.facts.estimates_wasserstein
        if self.training.early_stopping is not None and not estimates:
            raise ValueError(
                f"training.early_stopping: {adversarial.family} does not estimate the Wasserstein distance; "
                "set objective.adversarial=wasserstein, or leave early_stopping out"
            )
        guard = self.training.on_divergence
        if guard is not None and guard.action == "rollback" and not self.evaluation.every:
            raise ValueError(
                "training.on_divergence: rollback needs a best checkpoint, but evaluation.every is 0; set "
                "evaluation.every, or training.on_divergence=stop"
            )
        return self

    @model_validator(mode="after")
    def _check_generator_batch(self) -> Config:
        """A generator batch of another size has latents, and reals if its loss looks at some."""
        size = self.training.generator_batch_size
        if size is None:
            return self
        if self.growth is not None and self.growth.batch_sizes:
            raise ValueError(
                f"training.generator_batch_size: {size}: growth.batch_sizes gives both players' batches by resolution; "
                "leave one of them out"
            )
        if size == self.training.batch_size:
            return self
        if self.training.generator_latents == "last":
            raise ValueError(
                f"training.generator_latents: last: the latents of a discriminator update are "
                f"{self.training.batch_size}, but training.generator_batch_size is {size}; set "
                "training.generator_latents=own, or leave generator_batch_size out"
            )
        if self.objective.generator_needs_reals and self.training.generator_reals == "last":
            raise ValueError(
                f"training.generator_reals: last: the generator's loss looks at the {self.training.batch_size} real "
                f"samples of a discriminator update, but training.generator_batch_size is {size}; set "
                "training.generator_reals=own, or leave generator_batch_size out"
            )
        return self

    @model_validator(mode="after")
    def _check_groups(self) -> Config:
        """Groups of the minibatch standard deviation are equally large in each batch that the layer sees."""
        options = self.discriminator.facts
        if not isinstance(options, GroupingOptions) or options.minibatch_stddev is None:
            return self
        size = options.minibatch_stddev.group_size
        sizes = {self.training.batch_size, *(self.growth.batch_sizes.values() if self.growth else ())}
        sizes.add(self.training.generator_batch_size or self.training.batch_size)
        for batch in sorted(batch_size // self.training.accumulation for batch_size in sizes):
            if batch > size and batch % size:
                raise ValueError(
                    f"discriminator.minibatch_stddev.group_size: {size} does not divide the micro-batch of {batch} "
                    "samples (batch_size or generator_batch_size / gradient_accumulation_steps); change one of them"
                )
        reference = options.reference_samples or self.micro_batch
        if reference != self.micro_batch and reference % size:
            raise ValueError(
                f"discriminator.reference_size: {reference} is neither a multiple of minibatch_stddev.group_size="
                f"{size} nor the micro-batch of {self.micro_batch}; change one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_growth(self) -> Config:
        """Both networks grow, or neither does; levels and their batches fit the data."""
        if not self.generator.is_allowed or not self.discriminator.is_allowed:
            return self
        growing = [self.generator.facts.grows, self.discriminator.facts.grows]
        if any(growing) and not all(growing):
            role, other = ("discriminator", "generator") if growing[0] else ("generator", "discriminator")
            raise ValueError(f"{role}.architecture: must grow as the {other}'s does; choose progressive")
        if self.growth is None:
            return self
        if not all(growing):
            raise ValueError(
                "growth: found networks that do not grow; set both architectures to progressive, or leave growth out"
            )
        for key, side in (
            ("first_resolution", self.growth.first_resolution),
            ("batch_sizes", max(self.growth.batch_sizes, default=0)),
            ("learning_rates", max(self.growth.learning_rates, default=0)),
        ):
            if side > self.data.resolution:
                raise ValueError(f"growth.{key}: {side} is above data.resolution = {self.data.resolution}")
        for side, batch in self.growth.batch_sizes.items():
            if batch % self.training.accumulation:
                raise ValueError(
                    f"growth.batch_sizes: {batch} at {side} does not divide into training.gradient_accumulation_steps="
                    f"{self.training.accumulation} micro-batches; change one of them"
                )
        return self
