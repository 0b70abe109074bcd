"""What the techniques of the lineage carry along resumes bitwise after kill -9, on two ranks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Job
from tests.runs import differing, recipe, rows, tensors

STEPS = 8

CURVE = {"start": 1e-3, "end": 0.5, "over": 0.2, "shape": "cosine"}

TECHNIQUES: dict[str, dict[str, Any]] = {
    "WGAN with clipping, extra critic steps and a warm start": {
        "generator": {"optimizer": {"name": "rmsprop", "learning_rate": 5e-5}},
        "discriminator": {"optimizer": {"name": "rmsprop", "learning_rate": 5e-5}},
        "objective": {"adversarial": "wasserstein", "r1": None, "weight_clipping": {}},
        "training": {"initial_critic_steps": 2, "extra_critic_steps": {"updates": 3, "first": 2, "every": 3}},
    },
    "schedules of rates, betas, penalties and the average, in a run of 250 images a player": {
        "generator": {"optimizer": {"learning_rate": CURVE | {"end": 5e-5}, "betas": [0, CURVE]}},
        "discriminator": {"optimizer": {"learning_rate": CURVE | {"end": 5e-5}, "betas": [0.5, CURVE]}},
        "objective": {"r1": {"gamma": CURVE, "every": 1}, "instance_noise": {"sigma": CURVE}, "drift": CURVE},
        "ema": {"half_life_kimg": CURVE},
        "training": {"steps": None, "kimg": 0.25},
    },
    "R3GAN with labels and bfloat16 by stage, penalized passes included": {
        "data": {"labels": True},
        "generator": {"architecture": "r3gan", "width": 8, "max_width": 16, "depth": 1},
        "discriminator": {"architecture": "r3gan", "width": 8, "max_width": 16, "depth": 1},
        "objective": {
            "adversarial": "relativistic_paired",
            "r1": {"gamma": CURVE, "every": 1},
            "r2": {"gamma": CURVE, "every": 1},
        },
        "training": {"critic_steps": 1, "mixed_precision": {"dtype": "bf16", "float32_below": 8}},
    },
    "virtual batch norm, histories, matching, noisy targets and inputs": {
        "generator": {"normalization": "virtual"},
        "discriminator": {"normalization": "virtual"},
        "objective": {
            "feature_matching": {"adversarial": True},
            "historical_averaging": {"generator": 0.1, "discriminator": 0.1},
            "label_smoothing": {"real": [0.8, 1.0], "flip": 0.1},
            "instance_noise": {"sigma": {"start": 0.2, "end": 0, "over": 0.2}},
        },
        "training": {"generator_batch_size": 24},
    },
    "spectral norm, comparisons of samples, relativistic averages and labels": {
        "data": {"labels": True},
        "generator": {"spectral_norm": True},
        "discriminator": {
            "normalization": "none",
            "spectral_norm": True,
            "minibatch_discrimination": {"kernels": 5, "dimensions": 2},
            "minibatch_stddev": {"group_size": 4},
        },
        "objective": {"adversarial": "relativistic_average", "r2": {"gamma": 1.0, "every": 2}},
    },
    "adaptive augmentation": {
        "objective": {
            "augmentation": {"augmentation": "ada", "cutout": 1, "controller": {"target": -0.5, "every": 3, "kimg": 1}},
        },
    },
    "BigGAN with attention, parts of latents, a shared embedding and orthogonal regularization": {
        "data": {"resolution": 32, "labels": True},
        "generator": {
            "architecture": "biggan",
            "width": 2,
            "latent_distribution": "normal",
            "attention": [16],
            "shared_size": 4,
            "hierarchical": True,
        },
        "discriminator": {"architecture": "biggan", "width": 2, "attention": [16]},
        "objective": {"terms": [{"term": "orthogonal_regularization", "weight": 1e-4}]},
    },
    "autoencoder and PatchGAN, of which the adversarial term starts in the middle": {
        "generator": {
            "architecture": "autoencoder",
            "depth": 1,
            "downsampling": 4,
            "latent_size": 32,
            "latent_distribution": "normal",
        },
        "discriminator": {"architecture": "patchgan", "layers": 1},
        "objective": {"adversarial": "hinge", "r1": None, "reconstruction": {"adversarial_start_kimg": 0.15}},
    },
    "StyleGAN2 with mixed styles, lazy path length and a mapped average": {
        "data": {"labels": True},
        "generator": {"architecture": "stylegan2", "latent_distribution": "normal", "mapping_layers": 2},
        "discriminator": {"architecture": "stylegan2", "minibatch_stddev": {"group_size": 4}},
        "objective": {"terms": [{"term": "path_length", "weight": 2, "every": 2}]},
    },
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_killed_run_ends_bitwise_the_same(tmp_path: Path, digits: Path, technique: str) -> None:
    sections = dict(TECHNIQUES[technique])
    sections["training"] = {"steps": STEPS, **sections.get("training", {})}
    config = str(recipe(tmp_path, digits, **sections))
    assert Job(2, ["train", config, f"run_dir={tmp_path / 'whole'}"]).wait() == [0, 0]
    if "augmentation" in sections["objective"]:
        killed_at, last = (tensors(tmp_path / "whole", step) for step in (4, STEPS))
        assert 0 < killed_at["counters/controller/probability"] < last["counters/controller/probability"]
        assert killed_at["counters/controller/images"] > 0, "in the middle of an interval"
        assert rows(tmp_path / "whole")[-1].keys() >= {"augmentation/probability", "augmentation/sign"}
    job = Job(2, ["train", config])
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "checkpoints" / "step-00000004").exists():
        assert time.monotonic() < deadline
        assert job.running(), "the job ended by itself"
        time.sleep(0.005)
    job.kill(1)
    assert Job(2, ["train", config]).wait() == [0, 0]
    assert differing(tensors(tmp_path / "run", STEPS), tensors(tmp_path / "whole", STEPS)) == []
