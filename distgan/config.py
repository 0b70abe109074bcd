"""The schema of a run: YAML plus ``key=value`` overrides, checked before anything else happens.

Every field is documented by the string under it; the same strings become the JSON Schema that editors read
(``python -m distgan schema``). Sections are pure data: the package that a section belongs to builds from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distgan.errors import UserError
from distgan.recipe import apply_override, read_recipe, to_plain
from distgan.validation import explain


def _whole_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number, found a boolean")
    return value


def _folder(value: str) -> str:
    if not value.strip() or not value.isprintable():
        raise ValueError(f"{value[:80]!r} is not the path of a folder; give one such as runs/first")
    expanded = os.path.expanduser(value)
    if expanded.startswith("~"):
        raise ValueError(f"{value[:80]!r}: there is no such home folder; write the path out")
    return expanded


# The bounds keep products of a few of these inside 64 bits, and are far from what any run needs.
Count = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, le=2**40)]
CountOrZero = Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=2**40)]
Size = Annotated[int, BeforeValidator(_whole_number), Field(ge=1, le=2**24)]
Real = Annotated[float, BeforeValidator(_whole_number), Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, documented by attribute docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataConfig(Section):
    """What is trained on, and how it is read."""

    path: str | list[str]
    """A folder of shards, a glob, a brace expansion, a URL that fsspec understands, or a list of these."""
    resolution: Annotated[Size, Field(le=2**16)]
    """Images are centre-cropped to a square and resized to this many pixels a side (a power of two)."""
    channels: Literal[1, 3] = 3
    """1 for greyscale, 3 for RGB; images are converted when they differ."""
    labels: bool = False
    """Use the class labels: both networks become class-conditional."""
    mirror: bool = False
    """Flip each image left-right with probability 1/2, as a function of seed and stream position."""
    order: Literal["permutation", "lanes"] = "permutation"
    """`permutation`: uniform over all samples, for local data; `lanes`: few shards at a time, for object stores."""
    lanes: Annotated[Count, Field(le=2**20)] = 16
    """Lanes of the `lanes` order: about the largest number of nodes the run will ever use."""
    shuffle_block: Count = 4096
    """Samples of a lane that are shuffled together in the `lanes` order."""
    workers: Annotated[CountOrZero, Field(le=1024)] = 2
    """Loader processes per rank; 0 reads in the training process. The data does not depend on it."""
    prefetch: Annotated[Count, Field(le=1024)] = 2
    """Batches each loader process keeps ready."""
    cache_dir: str | None = None
    """Node-local folder for remote shards. Default: `$DISTGAN_CACHE` or `~/.cache/distgan`."""
    cache_gigabytes: Annotated[Real, Field(gt=0, le=1e9)] = 50.0
    """Upper bound of that folder, in 1e9 bytes."""
    retries: Annotated[CountOrZero, Field(le=1000)] = 3
    """How often a failed read is tried again, with backoff, before the sample is replaced."""
    max_failure_rate: Annotated[Real, Field(ge=0, le=1)] = 0.01
    """The run stops when more than this share of the samples read could not be read."""
    max_pixels: Count = 64_000_000
    """An image with more pixels than this is treated as unreadable."""
    max_bytes: Count = 64_000_000
    """A file inside a shard larger than this many bytes is treated as unreadable."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.resolution < 4 or self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution: {self.resolution} is not a power of two from 4 up")
        return self


class OptimizerConfig(Section):
    """One player's optimizer and learning-rate schedule."""

    name: Literal["adam"] = "adam"
    """The optimization algorithm."""
    learning_rate: Annotated[Real, Field(gt=0)] = 2e-4
    """The peak learning rate."""
    betas: tuple[Real, Real] = (0.5, 0.999)
    """Decay rates of the two moments."""
    eps: Annotated[Real, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """`linear` and `cosine` fall to 0 at the last step."""
    warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises linearly to its peak."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        for beta in self.betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas: {beta} is not in [0, 1)")
        return self


AnySection = TypeVar("AnySection", bound=Section)

Normalisation = Literal["synchronized", "batch", "none"]


class GeneratorConfig(Section):
    """The generator: its network and its optimizer."""

    architecture: Literal["dcgan"] = "dcgan"
    """Which network."""
    latent_size: Size = 100
    """Numbers in a latent vector."""
    latent_distribution: Literal["uniform", "normal"] = "uniform"
    """`uniform` is U(-1, 1), `normal` is N(0, 1)."""
    width: Size = 64
    """Channels of the last hidden layer; they double towards the latents, up to `max_width`."""
    max_width: Size = 1024
    """Upper bound of the channels of a layer."""
    normalisation: Normalisation = "synchronized"
    """Batch norm over all ranks, over each rank alone, or none."""
    optimizer: OptimizerConfig = OptimizerConfig()


class DiscriminatorConfig(Section):
    """The discriminator (critic): its network and its optimizer."""

    architecture: Literal["dcgan"] = "dcgan"
    """Which network."""
    width: Size = 64
    """Channels of the first layer; they double towards the output, up to `max_width`."""
    max_width: Size = 1024
    """Upper bound of the channels of a layer."""
    normalisation: Normalisation = "synchronized"
    """Batch norm over all ranks, over each rank alone, or none."""
    optimizer: OptimizerConfig = OptimizerConfig()


class GradientPenaltyConfig(Section):
    """A penalty on the discriminator's gradient with respect to its input."""

    gamma: Annotated[Real, Field(gt=0)]
    """The penalty is gamma/2 times the mean squared norm of the gradient of the logit."""
    every: Count = 1
    """Computed on each k-th discriminator update only, and then multiplied by k (lazy regularization)."""


class ObjectiveConfig(Section):
    """What the players minimise."""

    adversarial: Literal["non_saturating", "minimax"] = "non_saturating"
    """Goodfellow et al. 2014: `minimax` is the value function itself, `non_saturating` the -log D(G(z)) heuristic."""
    r1: GradientPenaltyConfig | None = None
    """Gradient penalty on real images (Mescheder et al. 2018, eq. 9)."""


class TrainingConfig(Section):
    """How long, how large, and in which numbers."""

    steps: Count
    """Steps of the run; a step is one generator update with its discriminator updates."""
    batch_size: Size
    """Global batch: over all ranks and all accumulation."""
    accumulation: Size = 1
    """Micro-batches per update. Batch statistics are over one micro-batch of all ranks."""
    critic_steps: Size = 1
    """Discriminator updates in a step, before the generator's."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`bf16` runs the networks under bfloat16 autocast; losses and penalties stay in float32."""
    deterministic: bool = False
    """Deterministic kernels and gradient buckets: resume at the same world size is then bitwise."""
    compile: bool = False
    """Compile the networks with torch.compile (not the gradient-penalty path, which has no double backward)."""
    channels_last: bool | Literal["auto"] = "auto"
    """Memory format of convolutions. `auto`: where it was measured to pay."""
    max_skipped_updates: Count = 20
    """This many non-finite updates of one player in a row stop the run."""
    timeout_minutes: Annotated[Real, Field(gt=0, le=1e6)] = 10.0
    """A rank that waits longer than this for another in a collective gives up."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_fp16(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("mixed_precision") in ("fp16", "float16", "half"):
            raise ValueError(
                "mixed_precision: fp16 is refused, because gradient penalties and BN statistics overflow its range "
                "and loss scaling would skip updates of one player only; use bf16 or no"
            )
        return values

    @model_validator(mode="after")
    def _check(self) -> TrainingConfig:
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size: {self.batch_size} does not divide into training.accumulation={self.accumulation} "
                "micro-batches; change one of them"
            )
        if self.steps * self.critic_steps * self.batch_size >= 2**62:
            raise ValueError("steps: times critic_steps times batch_size is 2**62 images or more; lower one of them")
        return self


class EMAConfig(Section):
    """The exponential moving average of the generator's weights, which is what is evaluated and exported."""

    half_life_kimg: Annotated[Real, Field(ge=0, le=1e12)] = 10.0
    """Half-life in thousands of images; 0 makes the average equal the live weights."""
    rampup: Annotated[Real, Field(gt=0)] | None = 0.05
    """Early on the half-life is at most this share of the images seen so far; null switches the ramp off."""
    statistics_samples: Size = 2048
    """Addressed latents from which batch-norm statistics are recomputed before evaluation, sampling and export."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Count = 1000
    """Steps between checkpoints; one is also written at the end and before leaving on a signal."""
    keep: Count = 3
    """How many of the newest checkpoints are kept, besides the best one."""


class MonitoringConfig(Section):
    """What is written down while training."""

    every: Count = 50
    """Steps between rows of metrics.jsonl and TensorBoard scalars."""
    samples_every: Count = 500
    """Steps between sample grids."""
    num_samples: Annotated[Count, Field(le=4096)] = 64
    """Images in a sample grid."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


class EvaluationConfig(Section):
    """Metrics of the averaged generator."""

    every: CountOrZero = 0
    """Steps between evaluations; 0 evaluates only when asked with `distgan evaluate`."""
    num_samples: Count = 10_000
    """Generated images per evaluation."""
    batch_size: Size = 64
    """Images per forward pass of an evaluation on one rank."""
    detector: Literal["classifier", "inception"] = "classifier"
    """Whose features are compared: a classifier trained on the labelled shards, or Inception-v3 (2015)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's pt_inception-2015-12-05 weights; null downloads them."""
    cache_dir: str | None = None
    """Folder of real statistics and detectors. Default: `$DISTGAN_CACHE` or `~/.cache/distgan`."""


class Config(Section):
    """A run, whole."""

    run_dir: Annotated[str, AfterValidator(_folder)]
    """The folder that everything of this run is written to."""
    seed: Annotated[int, BeforeValidator(_whole_number), Field(ge=0, le=2**63 - 1)] = 0
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

    @property
    def micro_batch(self) -> int:
        """Samples that one forward pass of all ranks together sees: the batch that batch statistics are over."""
        return self.training.batch_size // self.training.accumulation

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the objective depends on how a batch is cut into micro-batches and ranks."""
        return (self.generator.normalisation, self.discriminator.normalisation) != ("none", "none")


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
