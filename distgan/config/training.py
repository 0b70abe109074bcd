"""How a run goes: how long, in which numbers, what is kept of it and what is seen of it."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    WrapValidator,
    model_validator,
)

from distgan.config.fields import (
    Batch,
    Count,
    CountOrZero,
    Positive,
    Real,
    Section,
    Size,
    plain_or_section,
    plain_value,
)


class ExtraCriticStepsConfig(Section):
    """Steps with more discriminator updates (Arjovsky et al. 2017, released code only)."""

    updates: Annotated[Count, Field(le=2**24)] = 100
    """Number of discriminator updates in such a step."""
    first: CountOrZero = 25
    """Number of initial steps that run `updates` discriminator updates each."""
    every: Count | None = 500
    """Interval of later steps that run `updates` discriminator updates; null runs none."""


class EarlyStoppingConfig(Section):
    """End of the run when the critic's estimate of the Wasserstein distance stays flat."""

    steps: Count = 10_000
    """Number of steps for which the smoothed estimate must stay within `tolerance`. Smoothing half-life: steps / 10."""
    tolerance: Annotated[Real, Field(gt=0, lt=1)] = 0.02
    """Largest relative change of the smoothed estimate that counts as flat."""


def _action_alone(guard: Any) -> Any:
    """Return a divergence guard that is given by its action alone as a section."""
    return {"action": guard} if isinstance(guard, str) else guard


class DivergenceConfig(Section):
    """Action of a run that diverges for good: its first metric stays far worse than its best value, or
    `max_skipped_updates` updates in a row are not finite."""

    takes_effect_with: ClassVar = {"max_rollbacks": ("action", ("rollback",))}

    action: Literal["stop", "rollback"]
    """`stop`: the run ends with the outcome `diverged`. `rollback`: it continues from its best checkpoint with other
    samples and noise."""
    factor: Annotated[Real, Field(gt=1)] = 2.0
    """Factor by which the first metric of `evaluation.metrics` is worse than its best value. It must also have lost 5 %
    of what it gained since the first evaluation, so that noise near 0 does not count."""
    patience: Count = 3
    """Number of evaluations in a row that are so much worse, or not finite, before the action."""
    max_rollbacks: CountOrZero = 3
    """Number of rollbacks in a run; at the next divergence it stops."""


class MixedPrecisionConfig(Section):
    """bfloat16 by stage of the networks, penalized passes included (Huang et al. 2024, released code)."""

    dtype: Literal["bf16"] = "bf16"
    """Always `bf16`."""
    float32_below: Annotated[Size, Field(ge=4)]
    """Resolution in pixels per side below which stages run in float32. 8 leaves 4x4 in float32; 4 leaves only stages
    without pixels in it, such as GAT's mappings and head. Penalties by finite differences need 8 or more with `r3gan`.
    For networks of stages, such as `r3gan`."""


Precision = Literal["no", "tf32", "bf16"]


def _micro_batches(value: Any, _: Any) -> Any:
    """Return a number of micro-batches, or `auto`. In place of the check of a union, which reports a mistake twice."""
    if value == "auto":
        return value
    if isinstance(value, str) and not value.strip()[:1].isdigit():
        raise ValueError(f"expected a number of micro-batches or auto, found {value[:80]!r}")
    return TypeAdapter(Batch).validate_python(value)


def _compile(value: Any, _: Any) -> Any:
    """Return true, false or `blocks`. In place of the check of a union, which reports a mistake twice."""
    if value == "blocks":
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        meant = "; did you mean blocks?" if difflib.get_close_matches(str(value)[:80].lower(), ["blocks"]) else ""
        raise ValueError(f"expected true, false or blocks, found {str(value)[:80]!r}{meant}") from None


class TrainingConfig(Section):
    """Length of the run, batch size, and arithmetic."""

    steps: Count | None = None
    """Number of steps. A step is one generator update and its discriminator updates. Required without `kimg`."""
    kimg: Annotated[Positive, Field(le=1e12)] | None = None
    """Length of the run in thousands of images that the discriminator is trained on, as papers count them. The run ends
    at the first step that reaches it, and at `steps` if that comes first."""
    batch_size: Batch
    """Global batch size: over all ranks and all micro-batches of an update."""
    generator_batch_size: Batch | None = None
    """Global batch size of generator updates, such as twice `batch_size` in the code of WGAN-GP and SNGAN; null: as
    `batch_size`. A multiple of the number of ranks times `gradient_accumulation_steps`, as `batch_size` is."""
    gradient_accumulation_steps: Annotated[Batch | Literal["auto"], WrapValidator(_micro_batches)] = 1
    """Number of micro-batches per update. Batch statistics are computed over one micro-batch of all ranks. `auto`: the
    smallest number for which updates fit into the memory of every rank, found at the start and kept on resume; refused
    where the objective depends on it."""
    critic_steps: Annotated[Count, Field(le=2**24)] = 1
    """Number of discriminator updates per step, before the generator's update."""
    extra_critic_steps: ExtraCriticStepsConfig | None = None
    """Steps that run more discriminator updates than `critic_steps`; null runs none."""
    initial_critic_steps: CountOrZero = 0
    """Number of discriminator updates before the first generator update. They count to step 0."""
    generator_reals: Literal["own", "last"] = "own"
    """Real samples of a generator update whose loss looks at some, as relativistic losses and feature matching do.
    `own`: the next ones of the data, as in the released code of both. `last`: those of the step's last discriminator
    update again. Schedules and curves count the images of the discriminator alone."""
    generator_latents: Literal["own", "last"] = "own"
    """Latents and drawn labels of a generator update. `own`: others than those of the discriminator. `last`: those of
    the step's last discriminator update again, as in the released code of GAT, which needs batches of one size."""
    early_stopping: EarlyStoppingConfig | None = None
    """Early end of the run when the Wasserstein estimate stays flat, for `wasserstein`; null trains all steps."""
    on_divergence: Annotated[DivergenceConfig, BeforeValidator(_action_alone)] | None = None
    """Action when the run diverges for good: `stop`, `rollback`, or a section with options; null: train on, and fail
    after `max_skipped_updates`."""
    mixed_precision: Annotated[Precision | MixedPrecisionConfig, plain_or_section(Precision, MixedPrecisionConfig)] = (
        "no"
    )
    """Arithmetic of the networks. `no`: full float32. `tf32`: matrix products and convolutions round their inputs to 10
    bits of mantissa, on NVIDIA GPUs. `bf16`: bfloat16 autocast, with 8 bits, but float32 in whole passes whose input
    gradient is penalized, such as every discriminator pass with R1 and `every: 1`. `{dtype: bf16, float32_below: 8}`:
    bfloat16 by stage, in penalized passes too. Losses, weights and evaluation are float32 in all of them."""
    gradient_precision: Literal["float32", "bf16"] = "float32"
    """Precision in which ranks exchange gradients. `bf16` halves the bytes, and rounds; sums over many ranks round
    more."""
    deterministic: bool = False
    """Use deterministic kernels. A resume on the same number of ranks is then bitwise."""
    compile: Annotated[bool | Literal["blocks"], WrapValidator(_compile)] = False
    """Compile the networks with torch.compile: whole, or `blocks`, each block of a network by itself, which is compiled
    once for all blocks of a kind. Passes with exact gradient penalties stay eager, because compiled code has no double
    backward."""
    activation_checkpointing: bool = False
    """Keep only the inputs of a network's blocks for the backward pass, and compute the activations inside a block
    again there: less memory for about a third more computation. Results are the same. Not with spectral norm or virtual
    batch norm. For networks that declare blocks."""
    channels_last: bool | Literal["auto"] = "auto"
    """Use the channels_last memory format for convolutions. `auto` uses it where it was measured to be faster."""
    max_skipped_updates: Count = 20
    """Number of non-finite updates of one player in a row that ends the run, or counts for `on_divergence`."""
    timeout_minutes: Annotated[Real, Field(gt=0, le=1e6)] = 10.0
    """Minutes that a rank waits for another in a collective before it gives up."""
    startup_timeout_minutes: Annotated[Real, Field(gt=0, le=1e6)] = 30.0
    """The same limit in minutes until the first step is done, while nodes read data and compile or tune kernels."""

    _found: int = PrivateAttr(default=1)

    @property
    def accumulation(self) -> int:
        """Number of micro-batches per update. For `auto`, 1 until `with_accumulation` has set what a run found."""
        steps = self.gradient_accumulation_steps
        return self._found if steps == "auto" else steps

    def with_accumulation(self, found: int) -> TrainingConfig:
        """Return this section with the number of micro-batches that a run has found for `auto`."""
        section = self.model_copy()
        section._found = found
        return section

    @property
    def autocasts(self) -> bool:
        """Whether networks run in bfloat16."""
        return self.mixed_precision == "bf16" or self.float32_below is not None

    @property
    def float32_below(self) -> int | None:
        """Resolution below which stages run in float32; None if precision is not by stage."""
        precision = self.mixed_precision
        return precision.float32_below if isinstance(precision, MixedPrecisionConfig) else None

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
        for key in ("batch_size", "generator_batch_size"):
            size = getattr(self, key)
            if size is not None and size % self.accumulation:
                raise ValueError(
                    f"{key}: {size} does not divide into "
                    f"training.gradient_accumulation_steps={self.accumulation} micro-batches; "
                    "change one of them"
                )
        if self.steps is None and self.kimg is None:
            raise ValueError("steps: missing; set the length of the run in steps, or in thousands of images with kimg")
        most = max(self.critic_steps, self.extra_critic_steps.updates if self.extra_critic_steps else 0)
        if (self.steps or 0) * (most * self.batch_size + (self.generator_batch_size or 0)) >= 2**62:
            raise ValueError("steps: times critic_steps times batch_size is 2**62 images or more; lower one of them")
        return self


class CheckpointConfig(Section):
    """Interval and number of checkpoints."""

    every: Count = 1000
    """Steps between checkpoints. The run also saves one at its end and before it leaves on a signal."""
    keep: Count = 3
    """Number of newest checkpoints to keep, besides the best one."""


def _named(trackers: Any) -> Any:
    """Return a list of trackers with those that are given by their name alone as sections."""
    if not isinstance(trackers, list):
        return trackers
    return [{"name": tracker} if isinstance(tracker, str) else tracker for tracker in trackers]


class TrackerConfig(Section):
    """Experiment tracker that gets the rows of metrics.jsonl. Further keys are its own options, as of `wandb.init`."""

    model_config = ConfigDict(extra="allow")
    takes_effect_with: ClassVar = {"run_name": ("name", ("wandb", "mlflow"))}

    __pydantic_extra__: dict[str, Annotated[Any, BeforeValidator(plain_value)]]

    name: Literal["wandb", "mlflow", "comet_ml", "clearml", "swanlab", "trackio", "aim", "dvclive"]
    """Tracker, as accelerate names it. A resumed run goes on in the same run of `wandb` and `mlflow`, and begins a new
    run with all rows in the others."""
    project: str = "distgan"
    """Project or experiment that the run belongs to."""
    run_name: str | None = None
    """Name of the run there, for `wandb` and `mlflow`; null: the name of the run folder."""


class MonitoringConfig(Section):
    """What the run writes while it trains."""

    every: Count = 50
    """Steps between rows of metrics.jsonl and TensorBoard scalars."""
    samples_every: Count = 500
    """Steps between sample grids, drawn from the same latents each time. The last step has one too."""
    num_samples: Annotated[Count, Field(le=4096)] = 64
    """Number of samples in each sample grid."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    trackers: Annotated[list[TrackerConfig], BeforeValidator(_named)] = Field(default_factory=list)
    """Experiment trackers that rank 0 logs to: names such as `[wandb, mlflow]`, or sections with options."""

    @model_validator(mode="after")
    def _check(self) -> MonitoringConfig:
        names = [tracker.name for tracker in self.trackers]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"trackers: {twice[0]} is named twice; remove one")
        return self
