"""Metrics of a run or checkpoint, outside training."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from distgan import latents as generation
from distgan.config import parse_config
from distgan.data.index import load_index
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation import suite
from distgan.monitoring.console import setup_logging
from distgan.networks.layers.normalisation import recompute_statistics
from distgan.training import checkpoint
from distgan.training.assembly import build_average, latent_source
from distgan.training.restore import find_checkpoint, load_network


def evaluate(path: str | os.PathLike[str], overrides: Iterable[str] = (), *, best: bool = False) -> dict[str, float]:
    """All metrics of the averaged generator of a run (its newest checkpoint, or its best) or of a checkpoint.

    Call it on every rank; the result does not depend on how many there are.

    Args:
        overrides: `key=value` changes to the run's config, such as `evaluation.num_samples=50000`.

    Raises:
        UserError: nothing to evaluate there, or data and checkpoint do not belong together.
    """
    runtime = Runtime()
    setup_logging(runtime.rank)
    with runtime.together():
        found = find_checkpoint(Path(path), best=best)
        state = checkpoint.load_state(found)
        config = parse_config(state["config"], overrides, source=f"{found}/state.json")
        index = load_index(config.data.path)
        if index.fingerprint != state["data"]["fingerprint"] and not any(o.startswith("data.path") for o in overrides):
            raise UserError(
                f"data.path = {config.data.path}: its fingerprint is {index.fingerprint[:12]}, but the run was trained "
                f"on {state['data']['fingerprint'][:12]}; restore the data, or name other data with data.path=..."
            )
        network = build_average(config, index, runtime.device)
        load_network(found, "generator_ema", network)
    runtime.check_equal("the checkpoint", str(found), "give every node the same run folder")
    source = latent_source(config, index, runtime.device)
    batches = generation.statistics_batches(source, config, rank=runtime.rank, world_size=runtime.world_size)
    recompute_statistics(network, batches)

    def generate(samples: Tensor) -> Tensor:
        return generation.generate(network, source, "evaluation", samples)

    with torch.no_grad():
        return suite.evaluate(generate, config, index, runtime)
