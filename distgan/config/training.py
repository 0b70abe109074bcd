"""How a run goes: how long, in which numbers, what is kept of it and what is seen of it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from distgan.config.fields import Batch, Count, CountOrZero, Real, Section

MetricName = Literal["fid", "inception_score", "kid", "classes", "modes", "ngram_js"]


class ExtraCriticStepsConfig(Section):
    """Steps in which the discriminator is trained longer (Arjovsky et al. 2017, released code only)."""

    updates: Annotated[Count, Field(le=2**24)] = 100
    """Discriminator updates in such a step."""
    first: CountOrZero = 25
    """The first so many steps are such."""
    every: Count | None = 500
    """So is each k-th after them; null: none."""


class EarlyStoppingConfig(Section):
    """End the run when the critic's estimate of the Wasserstein distance neither falls nor rises any more."""

    steps: Count = 10_000
    """It is flat when it has stayed where it was for so long; its average has a half-life of a tenth of that."""
    tolerance: Annotated[Real, Field(gt=0, lt=1)] = 0.02
    """Where it was: its average then, give or take this share."""


class TrainingConfig(Section):
    """How long, how large, and in which numbers."""

    steps: Count
    """Steps of the run; a step is one generator update with its discriminator updates."""
    batch_size: Batch
    """Global batch: over all ranks and all accumulation."""
    gradient_accumulation_steps: Batch = 1
    """Micro-batches per update. Batch statistics are over one micro-batch of all ranks."""
    critic_steps: Annotated[Count, Field(le=2**24)] = 1
    """Discriminator updates in a step, before the generator's."""
    extra_critic_steps: ExtraCriticStepsConfig | None = None
    """Steps with more discriminator updates than that."""
    initial_critic_steps: CountOrZero = 0
    """Discriminator updates before the first step, so that the generator meets a trained one. They count to step 0."""
    early_stopping: EarlyStoppingConfig | None = None
    """For `wasserstein`: end the run early when its estimate of the distance is flat; null trains all steps."""
    mixed_precision: Literal["no", "tf32", "bf16"] = "no"
    """Arithmetic of the networks. `no` is full float32. `tf32` rounds the inputs of matrix products and convolutions to
    10 bits of mantissa on NVIDIA GPUs. `bf16` runs the networks under bfloat16 autocast, with 8 bits; losses are
    float32, and so are whole passes whose input gradient is penalized, such as the discriminator's in every update
    with R1 and `every: 1`: those use neither bf16 nor `compile`, and are full float32. Weights and evaluation are
    float32 in all three."""
    gradient_precision: Literal["float32", "bf16"] = "float32"
    """`bf16` halves the bytes that gradients cost between ranks, and rounds them; sums of many ranks round more."""
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
    startup_timeout_minutes: Annotated[Real, Field(gt=0, le=1e6)] = 30.0
    """The same until the first step is done, while nodes still read data, and kernels are tuned or compiled."""

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
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size: {self.batch_size} does not divide into "
                f"training.gradient_accumulation_steps={self.gradient_accumulation_steps} micro-batches; "
                "change one of them"
            )
        most = max(self.critic_steps, self.extra_critic_steps.updates if self.extra_critic_steps else 0)
        if self.steps * most * self.batch_size >= 2**62:
            raise ValueError("steps: times critic_steps times batch_size is 2**62 images or more; lower one of them")
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Count = 1000
    """Steps between checkpoints; one is also written at the end and before leaving on a signal."""
    keep: Count = 3
    """How many of the newest checkpoints are kept, besides the best one."""


class MonitoringConfig(Section):
    """What is written down while training."""

    every: Count = 50
    """Steps between rows of metrics.jsonl and TensorBoard scalars. The last step always has one."""
    samples_every: Count = 500
    """Steps between samples of the same latents: a grid of images, lines of text, or a picture of points."""
    num_samples: Annotated[Count, Field(le=4096)] = 64
    """How many of them."""
    tensorboard: bool = True
    """Write TensorBoard event files."""


class EvaluationConfig(Section):
    """Metrics of the averaged generator."""

    takes_effect_with: ClassVar = {"inception_weights": ("detector", ("inception",))}

    every: CountOrZero = 0
    """Steps between evaluations; 0 evaluates only when asked with `distgan evaluate`."""
    num_samples: Annotated[Count, Field(le=2**24)] = 10_000
    """Generated samples per evaluation."""
    batch_size: Batch = 64
    """Samples per forward pass of an evaluation on one rank."""
    metrics: Annotated[list[MetricName], Field(min_length=1)] | None = None
    """What is measured; the first decides which checkpoint is best. null: `fid` for images, `ngram_js` for text,
    `modes` for points. Images also have `inception_score`, `kid`, and with the classifier `classes`: how
    many have at least a tenth of their share in the data (StackedMNIST's protocol asks for one sample of each)."""
    detector: Literal["classifier", "inception"] = "classifier"
    """Whose features are compared: a classifier trained on the labeled shards, or Inception-v3 (2015)."""
    inception_weights: str | None = None
    """Path of torch-fidelity's pt_inception-2015-12-05 weights; null downloads them."""
    held_out: str | None = None
    """Folder of shards of text that is not trained on, for `ngram_js`. Default: `held-out` beside the training shards,
    where `pack --held-out` puts it."""
    cache_dir: str | None = None
    """Folder of real statistics and detectors. Default: `$DISTGAN_CACHE` or `~/.cache/distgan`."""

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        metrics = self.metrics or []
        twice = [name for name in metrics if metrics.count(name) > 1]
        if twice:
            raise ValueError(f"metrics: {twice[0]} is named twice")
        if "classes" in metrics and self.detector != "classifier":
            raise ValueError(
                "metrics: classes needs the classes of the data, which only evaluation.detector=classifier tells apart"
            )
        return self
