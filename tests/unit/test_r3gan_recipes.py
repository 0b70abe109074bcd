"""The recipes of R3GAN against the released presets, number by number (github.com/brownvc/R3GAN, 19a7ddf)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from distgan.config import Config, ScheduleConfig, load_config
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.stage import Stage
from distgan.networks.r3gan import ResidualBlock
from distgan.networks.shape import sample_shape

CONFIGS = Path(__file__).parents[2] / "configs"


class Preset(NamedTuple):
    """What train.py sets for a preset, and README.md on its command line; source lines stand behind the values."""

    name: str
    lines: range
    """Of train.py."""
    batch: int
    gpus: int
    classes: int
    widths: list[int]
    """From 4x4 on, as are the next two."""
    blocks: list[int]
    cardinality: list[int]
    bf16_stages: list[int]
    """Negative numbers count from the highest resolution."""
    noise: int
    decay: float
    """Images over which all curves move."""
    ema: float
    """Half-life at the end, in images."""
    gamma: tuple[float, float]
    augmentation: float
    """Probability of augmentation at the end."""
    said: list[str]
    """What the comment says of results: FID, total images and GPUs."""


PRESETS = {
    "cifar10-r3gan": Preset(
        "CIFAR10", range(178, 197),
        batch=512, gpus=8, classes=10,  # README.md:36
        widths=[3 * x // 4 for x in [1024, 1024, 1024, 1024]],  # 179
        blocks=[2, 2, 2, 2],  # 180
        cardinality=[3 * x for x in [32, 32, 32, 32]],  # 181
        bf16_stages=[-1, -2, -3],  # 182
        noise=64,  # 183
        ema=5000 * 1000, decay=2e7,  # 189, 190
        gamma=(0.05, 0.005),  # 195
        augmentation=0.55,  # 193
        # FID: sotaverified.org, paper; images and GPUs: table 9 and supplement D, by issues 18 and 19 of the code.
        said=["FID of 1.96", "250 million images", "8 L40 GPUs"],
    ),
    "ffhq64-r3gan": Preset(
        "FFHQ-64", range(198, 213),
        batch=256, gpus=8, classes=0,  # README.md:39
        widths=[3 * x // 4 for x in [1024, 1024, 1024, 1024, 512]],  # 199
        blocks=[2, 2, 2, 2, 2],  # 200
        cardinality=[3 * x for x in [32, 32, 32, 32, 16]],  # 201
        bf16_stages=[-1, -2, -3, -4],  # 202
        noise=64,  # 203
        ema=500 * 1000, decay=2e7,  # 205, 206
        gamma=(2, 0.2),  # 211
        augmentation=0.3,  # 209
        said=["FID of 1.95", "8 GPUs", "stopped by hand"],  # model card; issue 18
    ),
    "ffhq256-r3gan": Preset(
        "FFHQ-256", range(214, 229),
        batch=256, gpus=8, classes=0,  # README.md:42
        widths=[3 * x // 4 for x in [1024, 1024, 1024, 1024, 512, 256, 128]],  # 215
        blocks=[2, 2, 2, 2, 2, 2, 2],  # 216
        cardinality=[3 * x for x in [32, 32, 32, 32, 16, 8, 4]],  # 217
        bf16_stages=[-1, -2, -3, -4],  # 218
        noise=64,  # 219
        ema=500 * 1000, decay=2e7,  # 221, 222
        gamma=(150, 15),  # 227
        augmentation=0.3,  # 225
        said=["FID of 2.75", "8 GPUs", "stopped by hand"],  # model card; issue 18
    ),
    "imagenet32-r3gan": Preset(
        "ImageNet-32", range(230, 248),
        batch=4096, gpus=32, classes=1000,  # README.md:45
        widths=[6 * x // 4 for x in [1024, 1024, 1024, 1024]],  # 231
        blocks=[2, 2, 2, 2],  # 232
        cardinality=[3 * x for x in [32, 32, 32, 32]],  # 233
        bf16_stages=[-1, -2, -3],  # 234
        noise=64,  # 235
        ema=50000 * 1000, decay=2e8,  # 240, 241
        gamma=(0.5, 0.05),  # 246
        augmentation=0.5,  # 244
        said=["FID of 1.27", "1,000 million images", "32 GPUs"],  # sotaverified.org, paper; issue 18
    ),
    "imagenet64-r3gan": Preset(
        "ImageNet-64", range(249, 267),
        batch=4096, gpus=64, classes=1000,  # README.md:48
        widths=[6 * x // 4 for x in [1024, 1024, 1024, 1024, 1024]],  # 250
        blocks=[2, 2, 2, 2, 2],  # 251
        cardinality=[3 * x for x in [32, 32, 32, 32, 32]],  # 252
        bf16_stages=[-1, -2, -3, -4],  # 253
        noise=64,  # 254
        ema=50000 * 1000, decay=2e8,  # 259, 260
        gamma=(1, 0.1),  # 265
        augmentation=0.4,  # 263
        said=["FID of 2.09", "1,000 million images", "64 GPUs"],  # model card; issue 18
    ),
}  # fmt: skip

every_preset = pytest.mark.parametrize("name", PRESETS)


def curve(start: float, end: float, preset: Preset) -> ScheduleConfig:
    """training_loop.py:29-38 with `base_value`, `final_value` and `total_nimg` of train.py."""
    return ScheduleConfig(start=start, end=end, over=preset.decay / 1000, shape="cosine")


@every_preset
def test_the_numbers_are_the_presets(name: str) -> None:
    preset, config = PRESETS[name], load_config(CONFIGS / f"{name}.yaml")
    rate, beta2 = curve(2e-4, 5e-5, preset), curve(0.9, 0.99, preset)  # train.py:194, 196 and their like
    for network in (config.generator, config.discriminator):
        optimizer = network.optimizer
        assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == ("adam", rate, 0)
        assert (optimizer.options.betas, optimizer.options.eps) == ((0.0, beta2), 1e-8)  # 159, training_loop.py:331
    for penalty in (config.objective.r1, config.objective.r2):
        assert penalty is not None
        assert (penalty.gamma, penalty.every) == (curve(*preset.gamma, preset), 1)  # Trainer.py:35-41
    augmentation = config.objective.augmentation
    assert augmentation is not None
    assert (augmentation.technique, augmentation.penalties) == ("ada", "clean")  # Trainer.py:29-36
    assert augmentation.probability == curve(0, preset.augmentation, preset)
    halved = {"brightness", "contrast", "luma_flip", "hue", "saturation"}  # train.py:300
    off = {"frequency_filter", "noise"}
    for transform, multiplier in augmentation.options:
        assert multiplier == (0.5 if transform in halved else 0.0 if transform in off else 1.0), transform
    assert config.objective.adversarial.family == "relativistic_paired"  # Trainer.py:21-22,38-39
    assert config.ema.half_life_kimg == curve(0, preset.ema / 1000, preset)
    assert (config.generator.latent_size, config.generator.latent_distribution) == (preset.noise, "normal")
    assert (config.data.resolution, config.data.channels) == (4 * 2 ** (len(preset.widths) - 1), 3)
    assert (config.data.mirror, config.data.labels) == (True, preset.classes > 0)  # README.md: --mirror=1, --cond
    assert not config.data.dequantize  # training_loop.py:298
    training = config.training
    assert (training.batch_size, training.critic_steps, training.steps) == (preset.batch, 1, None)
    assert training.generator_reals == "own"  # training_loop.py:287-305
    assert not preset.batch % preset.gpus
    metric = config.metrics[0].metric, config.evaluation.detector.detector, config.evaluation.num_samples
    assert metric == ("fid", "inception", 50_000)  # train.py:142
    totals = {"CIFAR10": 250_000, "ImageNet-32": 1_000_000, "ImageNet-64": 1_000_000}
    assert training.kimg == totals.get(preset.name, 150_000)


@every_preset
def test_the_networks_are_the_presets(name: str) -> None:
    preset, config = PRESETS[name], load_config(CONFIGS / f"{name}.yaml")
    shape = sample_shape(config.data, num_classes=preset.classes)
    with torch.device("meta"):
        generator = build_generator(config.generator, shape)
        discriminator = build_discriminator(config.discriminator, shape)
    check_stages(generator, preset, config)
    check_stages(discriminator, preset, config)
    if preset.classes:  # train.py:185-187, 237-238, 256-257
        assert generator.get_parameter("embedding.weight").shape == (preset.classes, preset.noise)
        assert discriminator.get_parameter("embedding.weight").shape == (preset.classes, preset.widths[0])
    else:
        assert not any("embedding" in key for key in generator.state_dict() | discriminator.state_dict())


def check_stages(network: nn.Module, preset: Preset, config: Config) -> None:
    stages = {
        stage.resolution: stage for stage in network.get_submodule("stages").children() if isinstance(stage, Stage)
    }
    assert sorted(stages) == [4 << level for level in range(len(preset.widths))]
    below = config.training.float32_below
    assert below is not None
    for level, (width, depth, groups) in enumerate(zip(preset.widths, preset.blocks, preset.cardinality, strict=True)):
        blocks = [layer for layer in stages[4 << level].children() if isinstance(layer, ResidualBlock)]
        assert len(blocks) == depth
        for block in blocks:
            grouped: Any = block.layers[2]
            assert (grouped.groups, grouped.in_channels, grouped.kernel_size) == (groups, 2 * width, (3, 3))  # 272
        in_bf16 = level - len(preset.widths) in preset.bf16_stages  # 273 and 279 name the same stages of both players
        assert in_bf16 == (4 << level >= below)


@every_preset
def test_the_comment_says_what_was_published(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    comment = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    for part in (f"preset {PRESETS[name].name}", *PRESETS[name].said):
        assert part in comment, part
