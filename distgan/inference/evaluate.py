"""Metrics of a run or checkpoint, outside training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from distgan.checkpoint.contents import load_description
from distgan.checkpoint.restore import find_checkpoint
from distgan.config import Config, flatten, parse_config
from distgan.data.index.loading import load_index
from distgan.data.kinds.decoding import sample_format
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.inference import generation
from distgan.inference.export import load_generator
from distgan.inference.latents import LatentSource
from distgan.monitoring.console import setup_logging

_MADE_FOR = {f"data.{name}" for name in ("kind", "resolution", "channels", "labels", "length", "dimensions")}
"""What the networks were made for."""


def evaluate(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, best: bool = False) -> dict[str, float]:
    """All metrics of the averaged generator of a run (its newest checkpoint, or its best) or of a checkpoint.

    Call it on every rank; the result does not depend on how many there are.

    Args:
        overrides: `key=value` changes to the run's config, such as `evaluation.num_samples=50000`.

    Raises:
        UserError: nothing to evaluate there, data and checkpoint do not belong together, or an override is of something
            else than an evaluation.
    """
    overrides = list(overrides)
    runtime = Runtime()
    setup_logging(runtime.rank)
    with runtime.raise_on_all_ranks():
        if not os.fspath(path):
            raise UserError("RUN_OR_CHECKPOINT is empty; name a run folder, or a checkpoint in it")
        newest = find_checkpoint(Path(path), best=best) if runtime.is_main else None
    # Of a run that is training, others may find a newer one.
    found = runtime.broadcast_object(newest)
    with runtime.raise_on_all_ranks():
        state = load_description(found)
        trained = parse_config(state.config, source=f"{found}/state.json")
        config = parse_config(state.config, overrides, source=f"{found}/state.json")
        _check_changes(trained, config)
        index = load_index(config.data.path, config.data.cache_dir)
        if index.fingerprint != state.data.fingerprint and not any(o.startswith("data.path=") for o in overrides):
            raise UserError(
                f"data.path = {config.data.path}: its fingerprint is {index.fingerprint[:12]}, but the run was trained "
                f"on {state.data.fingerprint[:12]}; restore the data, or name other data with data.path=..."
            )
        sample_format(config.data, index)
        if tuple(state.vocabulary or ()) != (index.vocabulary or ()):
            raise UserError(
                f"data.path = {config.data.path}: its text has other characters than the run was trained on, or they "
                "are numbered otherwise; name other data"
            )
        generator = load_generator(found, device=runtime.device)
    counts = generator.description["class_counts"]
    source = LatentSource(config.generator, config.seed, class_counts=counts, device=runtime.device)

    from distgan.evaluation import suite  # late, because it takes seconds, and a mistake should be told before

    with generation.generating(generator.network, generator.shape, source, "evaluation") as generate:
        return suite.evaluate(generate, config, index, runtime)


def _check_changes(trained: Config, config: Config) -> None:
    """Refuse changes that no evaluation heeds, or of what the networks were made for. Raises UserError."""
    before, after = flatten(trained), flatten(config)
    for key in [*before, *(after.keys() - before.keys())]:
        heeded = key == "seed" or (key.startswith(("evaluation.", "data.")) and key not in _MADE_FOR)
        if before.get(key) != after.get(key) and not heeded:
            raise UserError(
                f"{key} = {after.get(key)}: the run was trained with {before.get(key)}, and an evaluation takes it as "
                "it is; only seed, evaluation.* and how and where data are read can be changed here"
            )
