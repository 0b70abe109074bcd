"""The recipes of GAT against the released script, number by number (github.com/hse1032/GAT, efea1ce)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from distgan import schedule
from distgan.config import load_config
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import sample_shape

CONFIGS = Path(__file__).parents[2] / "configs"
STEPS, EPOCH = 400_000, 1_281_167 // 512
"""train.py: --max-train-steps, and steps per pass over ImageNet's training images with drop_last."""


class Size(NamedTuple):
    """What models/generator.py and models/discriminator.py set for a size; source lines stand behind the values."""

    name: str
    depth: int
    width: int
    heads: int
    steps: int


SIZES = {
    "imagenet256-gat-s2": Size(
        "GAT-S/2", 12, 384, 6, STEPS,  # generator.py: GAT_S_2, and discriminator.py: the same
    ),
    "imagenet256-gat-b2": Size(
        "GAT-B/2", 12, 768, 12, STEPS,  # GAT_B_2
    ),
    "imagenet256-gat-l2": Size(
        "GAT-L/2", 24, 1024, 16, STEPS,  # GAT_L_2
    ),
    "imagenet256-gat-xl2": Size(
        "GAT-XL/2", 28, 1152, 16, 60 * EPOCH,  # GAT_XL_2; 60 epochs: arXiv 2509.24935v3, 40: v1
    ),
}  # fmt: skip

every_size = pytest.mark.parametrize("name", SIZES)


@every_size
def test_the_numbers_are_the_scripts(name: str) -> None:
    size, config = SIZES[name], load_config(CONFIGS / f"{name}.yaml")
    for network in (config.generator, config.discriminator):
        optimizer = network.optimizer
        assert optimizer.name == "torch.optim:AdamW"  # train.py: optimizerG, optimizerD
        assert optimizer.learning_rate == pytest.approx(2e-4 * 768 / size.width)  # train_256_B2.sh:24, train.py: glr
        assert optimizer.max_gradient_norm == 1  # train.py: --max-grad-norm
        assert optimizer.warmup_steps == 0
        chosen = optimizer.arguments
        assert (tuple(chosen["betas"]), chosen["eps"], chosen["weight_decay"]) == ((0, 0.99), 1e-8, 0)  # --adam-*
    objective = config.objective
    assert objective.adversarial.family == "relativistic_paired"  # Rp_PT_loss.py: step_gen, step_disc
    for penalty in (objective.r1, objective.r2):
        assert penalty is not None
        assert (penalty.gamma, penalty.every) == (0.1, 1)  # train_256_B2.sh:21-23
        # Rp_PT_loss.py: approximated_gradient_penalty, approximated_GP_std
        assert (penalty.method, penalty.sigma, penalty.antithetic) == ("finite_difference", 0.01, False)
        assert (penalty.draws, penalty.fraction) == (1, 1.0)
    augmentation = objective.augmentation
    assert augmentation is not None
    assert (augmentation.technique, augmentation.penalties) == ("latent_diffaugment", "clean")
    assert augmentation.chosen_probability == 1  # Rp_PT_loss.py: aug_prob
    assert augmentation.options.policy == ("color", "translation", "cutout", "flip")  # Rp_PT_loss.py: policy
    alignment = objective.alignment
    assert alignment is not None
    assert (alignment.weights, alignment.weight) == (None, 1)  # train_256_B2.sh: --proj-coeff; a path is the user's
    training = config.training
    assert (training.batch_size, training.critic_steps, training.steps) == (512, 1, size.steps)  # train_256_B2.sh:8
    assert (training.generator_reals, training.generator_latents) == ("last", "last")  # train.py: model_kwargs
    assert training.autocasts  # train_256_B2.sh: --mixed-precision
    assert training.activation_checkpointing  # generator.py and discriminator.py: ckpt_wrapper
    assert training.gradient_accumulation_steps == 1
    for step in (1, 1000):  # train.py: update_ema
        images = 512 * step
        assert schedule.ema_decay(config.ema, images, 512, 512 * size.steps) == pytest.approx(0.999, abs=1e-9)
    data = config.data
    # train.py: latent_size, in_channels of both networks
    assert (data.kind, data.channels, data.resolution, data.labels, data.mirror) == ("latents", 4, 32, True, False)
    assert (config.generator.latent_size, config.generator.latent_distribution) == (64, "normal")  # generator.py
    metric = config.metrics[0].metric, config.evaluation.detector.detector, config.evaluation.num_samples
    assert metric == ("fid", "inception", 50_000)  # generate.py: --num-fid-samples


@every_size
def test_the_networks_are_of_the_size(name: str) -> None:
    size, config = SIZES[name], load_config(CONFIGS / f"{name}.yaml", ["objective.alignment.weights=dinov2"])
    shape = sample_shape(config.data, num_classes=1000)  # train.py: --num-classes
    with torch.device("meta"):
        generator = build_generator(config.generator, shape)
        discriminator = build_discriminator(config.discriminator, shape)
    for network in (generator, discriminator):
        blocks = [
            child for name, child in network.named_modules() if name.count(".") == 1 and name.startswith("blocks")
        ]
        assert len(blocks) == size.depth
        for block in blocks:
            attention = block.get_submodule("attention")
            assert attention.heads == size.heads
            assert attention.get_parameter("inputs.weight").shape == (3 * size.width, size.width)
            inside = int(2 / 3 * 4 * size.width)  # generator.py, discriminator.py: SwiGLUFFN
            assert block.get_parameter("dense.inputs.weight").shape == (2 * inside, size.width)
    patches = (32 // 2) ** 2
    assert (
        generator.get_buffer("positions").shape == discriminator.get_buffer("positions").shape == (patches, size.width)
    )
    assert generator.get_parameter("embedding.weight").shape == (1000, 64)  # generator.py: LabelEmbedder
    assert discriminator.get_parameter("embedding.weight").shape == (1000, 2048)  # discriminator.py: cmap_dim
    layers = [layer for layer in discriminator.get_submodule("projector").children() if isinstance(layer, nn.Linear)]
    widths = [size.width, 2048, 2048, 768]  # discriminator.py: build_mlp, projector_dim, z_dims
    assert [(layer.in_features, layer.out_features) for layer in layers] == list(itertools.pairwise(widths))
