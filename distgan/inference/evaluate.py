"""Metrics of a run or checkpoint, outside training."""

from __future__ import annotations

import os
from collections.abc import Iterable

from distgan.autoencoders.decoding import image_evaluation
from distgan.checkpoint.compatibility import find_difference
from distgan.checkpoint.contents import load_description
from distgan.checkpoint.downloads import checkpoint_url, is_url
from distgan.checkpoint.loading import find_checkpoint
from distgan.config import Config, flatten, parse_config
from distgan.data.index.loading import load_index
from distgan.data.kinds.decoding import sample_format
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.comparison.published_statistics import with_real_statistics
from distgan.extensions import refresh_digests
from distgan.inference import generation
from distgan.inference.export import load_generator
from distgan.inference.latents import Source
from distgan.monitoring.console import setup_logging

_MADE_FOR = {f"data.{name}" for name in ("kind", "resolution", "channels", "labels", "length", "dimensions")}
"""Keys that the shape of the networks depends on."""


def evaluate(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    *,
    best: bool = False,
    truncation: float | None = None,
    real_statistics: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Compute all metrics of the EMA generator of a run (its newest or best checkpoint) or of a checkpoint.

    Collective: call on every rank. The result does not depend on the number of ranks.

    Returns:
        `step` of the checkpoint, `generated`, the number of generated samples, and the metric values by name, such as
        `{"step": 1500, "generated": 10000, "fid[classifier]": 12.3}`. A metric with `samples` of its own, such as those
        of a published protocol, has the first of them. With truncation the names say so:
        `fid[classifier,truncation=0.5]`.

    Args:
        overrides: `key=value` changes to the run's config, such as `evaluation.num_samples=50000`.
        truncation: threshold of the latents, see `load_generator`.
        real_statistics: .npz file with mean `mu` and covariance `sigma`, to compare with in place of the run's data.

    Raises:
        UserError: there is no checkpoint, the data differ from the run's, an override does not apply to evaluation, or
            a metric compares with samples and there are only `real_statistics`.
    """
    overrides = list(overrides)
    refresh_digests()
    runtime = Runtime()
    setup_logging(runtime.rank)
    with runtime.raise_on_all_ranks():
        if not os.fspath(path):
            raise UserError("RUN_OR_CHECKPOINT is empty; pass a run folder, or a checkpoint in it")
        newest = find_checkpoint(path, best=best) if runtime.is_main else None
    # If the run is still training, other ranks may find a newer checkpoint.
    found = runtime.broadcast_object(newest)
    with runtime.raise_on_all_ranks():
        if is_url(path) and not runtime.is_main:  # each node has a copy of its own
            found = find_checkpoint(checkpoint_url(os.fspath(path), found.name))
        state = load_description(found)
        trained = parse_config(state.config, source=f"{found}/state.json")
        config = parse_config(state.config, overrides, source=f"{found}/state.json")
        _check_changes(trained, config)
        index = load_index(config.data.path, config.data.cache_dir)
        if index.fingerprint != state.data.fingerprint and not any(o.startswith("data.path=") for o in overrides):
            raise UserError(
                f"data.path = {config.data.path}: found data fingerprint {index.fingerprint[:12]}, expected "
                f"{state.data.fingerprint[:12]} as in training; restore it, or set data.path to other data"
            )
        if real_statistics is not None:
            config = with_real_statistics(config, os.fspath(real_statistics))
        sample_format(config.data, index)
        if tuple(state.vocabulary or ()) != (index.vocabulary or ()):
            raise UserError(
                f"data.path = {config.data.path}: the vocabulary differs from that of the run; set data.path to text "
                "with the same characters"
            )
        if problem := find_difference(state.latent_space, index):
            raise UserError(f"data.path = {config.data.path}: other latents than those of the run: {problem}")
        if not config.metrics:
            raise UserError(
                f"evaluation.metrics: none is named, and {config.data.kind} (data.kind) have none by default; name one"
            )
        generator = load_generator(found, device=runtime.device, truncation=truncation, decoder=config.data.decoder)
        if config.data.decoder is None:
            generator.decoder = None
        source: Source = (
            generation.ImageSource(config, index, runtime.device)
            if config.objective.reconstruction is not None
            else generator.source(config.seed, truncation)
        )
        config, index = image_evaluation(config, index, generator.decoder)

    from distgan.evaluation import suite  # late, because it takes seconds and errors should come before

    with generation.generating(*generator.sampler, source, "evaluation") as generate:
        values = suite.evaluate(generate, config, index, runtime)
    numbers = {"step": state.step, "generated": config.generated_samples}
    return numbers | {_value_name(name, truncation): value for name, value in values.items()}


def evaluate_images(
    generated: str | os.PathLike[str],
    real: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    *,
    real_statistics: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Compute metrics of two sets of images, see `compare_images`. Collective: call on every rank."""
    refresh_digests()
    runtime = Runtime()
    setup_logging(runtime.rank)
    from distgan.evaluation.comparison.compare import compare_images  # late, because it takes seconds

    return compare_images(generated, real, overrides, runtime, real_statistics=real_statistics)


def _value_name(name: str, truncation: float | None) -> str:
    """Return the name of a value with the truncation in its brackets, if there was any."""
    if truncation is None:
        return name
    inside = name[name.index("[") + 1 : -1] + "," if name.endswith("]") else ""
    return f"{name.partition('[')[0]}[{inside}truncation={float(truncation)}]"


def _check_changes(trained: Config, config: Config) -> None:
    """Raise UserError for an override that does not apply to evaluation or would change the networks."""
    before, after = flatten(trained), flatten(config)
    for key in [*before, *(after.keys() - before.keys())]:
        heeded = key == "seed" or (key.startswith(("evaluation.", "data.")) and key not in _MADE_FOR)
        if before.get(key) != after.get(key) and not heeded:
            raise UserError(
                f"{key} = {after.get(key)}: cannot change in an evaluation, the run was trained with "
                f"{before.get(key)}; change only seed, evaluation.* and the location and reading of the data"
            )
