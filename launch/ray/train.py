"""Train a run with Ray Train: one worker per GPU, or per `--cpu` process, which Ray restarts after lost workers.

    ray job submit --working-dir . -- python launch/ray/train.py /runs/x.yaml --workers 16 [key=value...]

All nodes need distgan, the recipe, and the run folder on storage that they share. A restart continues from the newest
checkpoint, on the same number of workers.
"""

from __future__ import annotations

import argparse
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_on_worker(job: dict[str, Any]) -> None:
    """Train on this rank. Ray has started the process group and set RANK, LOCAL_RANK and WORLD_SIZE."""
    import distgan  # on the workers; the machine that submits the job may be without it

    distgan.train(distgan.load_config(job["recipe"], job["overrides"]))


def main() -> None:
    """Start the workers and wait for them."""
    parser = argparse.ArgumentParser(description="train a run with Ray Train")
    parser.add_argument("recipe", help="YAML config, on storage that all nodes share")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config")
    parser.add_argument("--workers", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--cpu", action="store_true", help="train without GPUs")
    parser.add_argument("--storage", help="folder or URL for Ray's own files (default: ~/ray_results)")
    parser.add_argument("--max-failures", type=int, default=3, help="number of restarts after an error (default: 3)")
    options = parser.parse_args()
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"recipe": options.recipe, "overrides": options.overrides},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        run_config=RunConfig(
            name="distgan",
            storage_path=options.storage,
            failure_config=FailureConfig(max_failures=options.max_failures),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
