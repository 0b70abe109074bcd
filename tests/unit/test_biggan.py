"""BigGAN's networks against the tables of the paper and of BigGAN-PyTorch. See also test_reference_networks."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.inference.generation import generating
from distgan.inference.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.biggan import BigGANDiscriminator, BigGANGenerator
from distgan.networks.hooks import captured
from distgan.networks.layers.attention import SelfAttention
from distgan.networks.layers.labels import ClassTable
from distgan.networks.layers.normalization import ConditionalNormalization, recompute_statistics
from distgan.networks.layers.residual import DiscriminatorBlock, FirstBlock
from distgan.networks.layers.spectral_norm import NORMALIZED, SpectralNorm
from distgan.networks.shape import SampleShape

PAPERS: dict[str, Any] = {"width": 96, "attention": [64], "shared_size": 128, "hierarchical": True, "latent_size": 120}
"""The paper's generator at 128 pixels."""


def generator_of(resolution: int, num_classes: int = 0, **settings: Any) -> BigGANGenerator:
    shape = SampleShape(resolution=resolution, channels=3, num_classes=num_classes)
    settings = {"latent_size": 6, **settings}
    network = build_generator(GeneratorConfig(architecture="biggan", **settings), shape)
    assert isinstance(network, BigGANGenerator)
    return network


def discriminator_of(resolution: int, num_classes: int = 0, **settings: Any) -> BigGANDiscriminator:
    shape = SampleShape(resolution=resolution, channels=3, num_classes=num_classes)
    network = build_discriminator(DiscriminatorConfig(architecture="biggan", **settings), shape)
    assert isinstance(network, BigGANDiscriminator)
    return network


TABLES = {
    32: ([4, 4, 4, 4], [4, 4, 4, 4], 8),
    64: ([16, 16, 8, 4, 2], [1, 2, 4, 8, 16], 4),
    128: ([16, 16, 8, 4, 2, 1], [1, 2, 4, 8, 16, 16], 4),
    256: ([16, 16, 8, 8, 4, 2, 1], [1, 2, 4, 8, 8, 16, 16], 4),
}
"""Multiples of ch of the generator from 4x4 on and of the discriminator's blocks, and its last size (`G_arch`, `D_arch`
of BigGAN.py; tables 4 and 5 of the paper for 128 and 256)."""


@pytest.mark.parametrize("resolution", TABLES)
def test_widths(resolution: int) -> None:
    up, down, last = TABLES[resolution]
    up, down = [96 * multiple for multiple in up], [96 * multiple for multiple in down]
    with torch.device("meta"):
        generator = generator_of(resolution, width=96, initialization="normal")
        discriminator = discriminator_of(resolution, width=96, initialization="normal")
    assert generator.projection.out_features == up[0] * 16
    assert [(b.first.in_channels, b.first.out_channels) for b in generator.blocks] == list(pairwise(up))
    assert [(b.second.in_channels, b.second.out_channels) for b in generator.blocks] == [(w, w) for w in up[1:]]
    assert isinstance(discriminator.features[0], FirstBlock)
    assert discriminator.features[0].residual[2].out_channels == down[0]
    blocks = [module for module in discriminator.features if isinstance(module, DiscriminatorBlock)]
    assert [(b.residual[2].in_channels, b.residual[2].out_channels) for b in blocks] == list(pairwise(down)), "wide"
    assert [(b.residual[5].in_channels, b.residual[5].out_channels) for b in blocks] == [(w, w) for w in down[1:]]
    halvings = sum(isinstance(module, nn.AvgPool2d) for module in discriminator.modules())
    assert resolution >> halvings == last


def test_numbers_of_the_papers_networks_at_128() -> None:
    """BigGAN-PyTorch's Generator and Discriminator at ch 96 have 70,433,988 and 87,982,370 parameters, as it prints."""
    with torch.device("meta"):
        generator = generator_of(128, 1000, **PAPERS, initialization="normal")
        discriminator = discriminator_of(128, 1000, width=96, attention=[64], initialization="normal")
    # Without effect there, left out here: biases of the blocks' first convolutions, and of the last block, at 128.
    left_out = 96 * (16 + 8 + 4 + 2 + 1) + 2 * 96
    assert sum(p.numel() for p in generator.parameters()) + left_out == 70_433_988
    assert sum(p.numel() for p in discriminator.parameters()) == 87_982_370


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize(
    ("num_classes", "settings"),
    [(0, {}), (0, {"hierarchical": True}), (3, {}), (3, {"shared_size": 2}),
     (3, {"shared_size": 2, "hierarchical": True})],
)  # fmt: skip
def test_shapes_and_gradients(resolution: int, num_classes: int, settings: dict[str, Any]) -> None:
    blocks = {32: 3, 64: 4}[resolution]
    generator = generator_of(resolution, num_classes, width=2, attention=[16], latent_size=4 * (blocks + 1), **settings)
    discriminator = discriminator_of(resolution, num_classes, width=4, attention=[16])
    labels = torch.tensor([0, 2]) if num_classes else None
    images = generator(torch.randn(2, 4 * (blocks + 1)), labels)
    assert images.shape == (2, 3, resolution, resolution)
    assert images.abs().max() <= 1
    with captured(discriminator, discriminator.feature_layer) as outputs:
        logits = discriminator(images, labels)
    assert logits.shape == (2,)
    assert outputs[0].shape == (2, {32: 16, 64: 64}[resolution])
    logits.sum().backward()
    for network in (generator, discriminator):
        assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]


def test_attention_comes_after_the_first_block_of_its_size() -> None:
    generator, discriminator = generator_of(64, width=2, attention=[16]), discriminator_of(64, width=4, attention=[4])
    assert [isinstance(layer, SelfAttention) for layer in generator.attentions] == [False, True, False, False]
    placed = [number for number, layer in enumerate(discriminator.features) if isinstance(layer, SelfAttention)]
    # Blocks at 0, 2, 4, 6 and 8 end at 32, 16, 8, 4 and 4.
    assert placed == [7]


def test_parts_of_the_latent_go_where_the_paper_sends_them() -> None:
    """The first to the 4x4 features, the next to the first block's norms, and so on (appendix B, figure 15)."""
    generator = generator_of(32, 3, width=2, latent_size=8, shared_size=5, hierarchical=True)
    assert generator.projection.in_features == 2
    conditional = [module for module in generator.modules() if isinstance(module, ConditionalNormalization)]
    assert len(conditional) == 6
    assert all(layer.gain.in_features == layer.offset.in_features == 5 + 2 for layer in conditional)
    seen: dict[str, Tensor] = {}
    generator.projection.register_forward_pre_hook(lambda _, given: seen.update(first=given[0]))
    for number, block in enumerate(generator.blocks):
        block.second_norm.gain.register_forward_pre_hook(
            lambda _, given, key=f"block {number}": seen.update({key: given[0]})
        )
    latents, labels = torch.randn(3, 8), torch.tensor([2, 0, 2])
    generator(latents, labels)
    assert torch.equal(seen["first"], latents[:, :2])
    for number in range(3):
        embedding, part = seen[f"block {number}"].split((5, 2), dim=1)
        assert torch.equal(embedding, generator.shared_embedding.weight[labels])
        assert torch.equal(part, latents[:, 2 * number + 2 : 2 * number + 4])


def test_spectral_norm_is_on_all_weights_but_the_generators_embeddings() -> None:
    for network in (
        generator_of(32, 3, width=2, shared_size=2, attention=[16]),
        discriminator_of(32, 3, width=2, attention=[16]),
    ):
        layers = [module for module in network.modules() if isinstance(module, NORMALIZED)]
        assert sum(isinstance(module, SpectralNorm) for module in network.modules()) == len(layers)
    assert isinstance(generator_of(32, 3, width=2, shared_size=2).shared_embedding, ClassTable)
    assert not any(isinstance(m, nn.Embedding) for m in generator_of(32, 3, width=2).modules())


@pytest.mark.parametrize("kind", ["orthogonal", "normal"])
@pytest.mark.parametrize("shared_size", [None, 4])
def test_initial_weights(kind: str, shared_size: int | None) -> None:
    settings = {"width": 8, "attention": [16], "initialization": kind}
    generator = generator_of(32, 10, shared_size=shared_size, latent_size=32, **settings)
    for network in (generator, discriminator_of(32, 10, **settings)):
        weights = {name: p for name, p in network.named_parameters() if p.dim() > 1}
        assert sum("gain" in name for name in weights) == (6 if network is generator else 0)
        for name, parameter in weights.items():
            matrix = parameter.flatten(1)
            if kind == "orthogonal":
                gram = matrix @ matrix.t() if len(matrix) <= matrix.shape[1] else matrix.t() @ matrix
                torch.testing.assert_close(gram, torch.eye(len(gram)), atol=1e-5, rtol=0, msg=name)
            elif matrix.numel() >= 256:
                spread = 0.02 / math.sqrt(2 * matrix.numel())
                assert matrix.std().item() == pytest.approx(0.02, abs=5 * spread), name
        vectors = {name: p for name, p in network.named_parameters() if p.dim() == 1}
        assert all(torch.equal(v, torch.full_like(v, float(name == "output.0.weight"))) for name, v in vectors.items())


@pytest.mark.parametrize("classes", [0, 3])
def test_a_sample_is_the_same_in_batches_of_any_size(classes: int) -> None:
    """The released scripts sample CIFAR-10 in training mode, so that their FID depends on the batch size."""
    config = GeneratorConfig(
        architecture="biggan", width=2, latent_size=8, latent_distribution="normal", hierarchical=True,
        **({"shared_size": 4} if classes else {}),
    )  # fmt: skip
    shape = SampleShape(resolution=32, channels=3, num_classes=classes)
    network = build_generator(config, shape)
    source = LatentSource(config, 0, class_counts=[1] * classes or None)
    recompute_statistics(network, [source.draw("batch statistics", torch.arange(64))])
    with generating(network.eval(), shape, source, "evaluation") as generate:
        whole = generate(torch.arange(12))
        parts = torch.cat([generate(numbers) for numbers in torch.arange(12).split(5)])
    # Kernels sum in another order in another batch: a level of rounding.
    assert (whole.int() - parts.int()).abs().max() <= 1
    assert whole.float().std() > 1


@pytest.mark.parametrize(
    ("num_classes", "settings", "message"),
    [
        (0, {"hierarchical": True, "latent_size": 7},
         "generator.latent_size = 7: .* split into 4 parts .*; choose a multiple of 4"),
        (0, {"shared_size": 8}, "generator.shared_size = 8: has no effect without classes; set data.labels=true"),
        (3, {"hierarchical": True, "latent_size": 8}, "generator.hierarchical: .*; set generator.shared_size=128"),
        (0, {"attention": [64]}, "generator.attention: 64: .* end at 8, 16, 32 pixels"),
        (0, {"attention": [16], "width": 1}, "needs 8 channels or more, found 4 at 16 pixels; raise generator.width"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(num_classes: int, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        generator_of(32, num_classes, **{"width": 2, **settings})


def test_attention_of_a_discriminator_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"discriminator\.attention: 32: .* end at 16, 8 pixels; choose from these"):
        discriminator_of(32, attention=[32])
    with pytest.raises(UserError, match=r"data\.resolution = 16: the biggan discriminator supports 32, 64, 128, 256"):
        discriminator_of(16)


def test_facts_that_a_run_depends_on() -> None:
    generator = GeneratorConfig(architecture="biggan").facts
    assert generator.normalizes_batch
    assert generator.batch_statistics == {"normalization": "global"}
    assert GeneratorConfig(architecture="biggan", normalization="batch").facts.batch_statistics == {
        "normalization": "rank"
    }
    assert DiscriminatorConfig(architecture="biggan").facts.bounds_slope
    assert not DiscriminatorConfig(architecture="biggan", attention=[64]).facts.bounds_slope
    assert not DiscriminatorConfig(architecture="biggan").facts.normalizes_batch
