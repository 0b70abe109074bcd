"""StyleGAN2's layers and networks, by hand."""

from __future__ import annotations

import copy
import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.inference.generation import generate_paths
from distgan.inference.generator import Generator
from distgan.inference.latents import LatentSource
from distgan.networks import build_discriminator, build_generator
from distgan.networks.moving import declare_moving, foreign_moving_buffers, moving_buffers
from distgan.networks.shape import SampleShape
from distgan.networks.stylegan2.generator import StyleGAN2Generator
from distgan.networks.stylegan2.mapping import Mapping
from distgan.networks.stylegan2.modulation import ModulatedConv2d
from distgan.networks.stylegan2.noise import AddressedNoise, constant_noise

SHAPE = SampleShape(resolution=16, channels=3, num_classes=3)
LABELS = torch.tensor([0, 2, 1, 1])


def generator(shape: SampleShape = SHAPE, *, strength: float = 0.3, **options: Any) -> StyleGAN2Generator:
    small = {"latent_size": 6, "width": 4, "max_width": 8, "style_size": 7, "mapping_layers": 2, "style_mixing": 0}
    config = GeneratorConfig(architecture="stylegan2", latent_distribution="normal", **{**small, **options})
    network = build_generator(config, shape)
    assert isinstance(network, StyleGAN2Generator)
    for layer in network.layers:
        layer.noise_strength.data.fill_(strength)
    return network


def latents(number: int = 4, size: int = 6) -> Tensor:
    return torch.randn(number, size, generator=torch.Generator().manual_seed(3))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_papers_networks_at_256_pixels() -> None:
    """Layer by layer from the paper's table of widths, min(16384 / r, 512) at r pixels."""
    shape = SampleShape(resolution=256, channels=3)
    with torch.device("meta"):
        config = GeneratorConfig(architecture="stylegan2", latent_distribution="normal", latent_size=512)
        images = build_generator(config, shape)
        logits = build_discriminator(
            DiscriminatorConfig.model_validate({"architecture": "stylegan2", "minibatch_stddev": {}}), shape
        )
    widths = [512, 512, 512, 512, 256, 128, 64]
    assert (
        count(images)
        == (
            8 * (512 * 512 + 512)
            + 512 * 16
            # A styled layer has a scale per input, weights, biases and one strength.
            + sum((512 + 1) * i + 9 * i * o + o + 1 for i, o in zip([512, *widths[:-1]], widths, strict=True))
            + sum((512 + 1) * o + 9 * o * o + o + 1 for o in widths[1:])
            + sum((512 + 1) * o + 3 * o + 3 for o in widths)
        )
    )
    falling = widths[::-1]
    assert count(logits) == (
        (3 * 64 + 64)
        + sum(9 * i * i + i + 9 * i * o + o + i * o for i, o in pairwise(falling))
        + (9 * 513 * 512 + 512) + (16 * 512 * 512 + 512) + (512 + 1)
    )  # fmt: skip


@pytest.mark.parametrize("resolution", [4, 8, 32])
@pytest.mark.parametrize("classes", [0, 3])
def test_shapes(resolution: int, classes: int) -> None:
    shape = SampleShape(resolution=resolution, channels=1, num_classes=classes)
    labels = LABELS if classes else None
    images = generator(shape, style_mixing=0.9)(latents(), labels)
    assert images.shape == (4, 1, resolution, resolution)
    for residual in (True, False):
        config = DiscriminatorConfig(architecture="stylegan2", width=4, max_width=8, residual=residual)
        assert build_discriminator(config, shape)(images, labels).shape == (4,)


@pytest.mark.parametrize("demodulate", [True, False])
def test_a_modulated_convolution_has_weights_of_each_sample(demodulate: bool) -> None:
    """Equations 1 and 3, with weights per sample and a loop."""
    layer = ModulatedConv2d(3, 5, 3, 4, demodulate=demodulate).double()
    activations, styles = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 4).double()
    for image, style, found in zip(activations, styles, layer(activations, styles), strict=True):
        scales = layer.affine.weight @ style / 4**0.5 + layer.affine.bias
        weights = layer.weight * scales[None, :, None, None]
        factors = (
            (weights.square().sum((1, 2, 3)) + 1e-8).sqrt() if demodulate else torch.full((5,), 27.0).double().sqrt()
        )
        expected = F.conv2d(image[None], weights / factors[:, None, None, None], padding=1)
        torch.testing.assert_close(found[None], expected, rtol=1e-10, atol=1e-12)


def test_an_upsampling_convolution_by_its_steps() -> None:
    """Zeros between the pixels, a true convolution, and the filter with a gain of 4."""
    layer = ModulatedConv2d(2, 3, 3, 4, upsample=True).double()
    activations, style = torch.randn(1, 2, 4, 4).double(), torch.randn(1, 4).double()
    scales = layer.affine(style)[0]
    weights = layer.weight * scales[None, :, None, None]
    weights = weights / (weights.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
    spread = torch.zeros(1, 2, 8, 8).double()
    spread[..., ::2, ::2] = activations
    line = torch.tensor([1.0, 3, 3, 1]).double() / 8
    kernel = 4 * torch.outer(line, line).expand(3, 1, 4, 4)
    expected = F.conv2d(F.conv2d(spread, weights.flip(2, 3), padding=2), kernel, groups=3)
    # 8 + 2 = 10 after the first, 7 after the second; the released code drops the last row of zeros, and pads by 1.
    padded = F.conv2d(F.conv2d(spread[..., :7, :7], weights.flip(2, 3), padding=2), kernel, padding=1, groups=3)
    torch.testing.assert_close(layer(activations, style), padded, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer(activations, style)[..., 1:, 1:], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("upsample", [True, False])
def test_outputs_keep_the_variance_for_any_scale(upsample: bool) -> None:
    """Section 2.2: of white noise, unit variance. Between zeros a quarter of the weights meet a pixel, and the filter
    multiplies the variance by 16 (20/64)^2."""
    torch.manual_seed(0)
    layer = ModulatedConv2d(64, 64, 3, 4, upsample=upsample)
    out = layer(torch.randn(8, 64, 16, 16), 100 * torch.randn(8, 4))[..., 2:-2, 2:-2]
    assert out.square().mean().item() == pytest.approx(16 * (20 / 64) ** 2 / 4 if upsample else 1.0, rel=0.1)


@pytest.mark.parametrize("upsample", [True, False])
def test_second_derivatives_of_a_modulated_convolution(upsample: bool) -> None:
    layer = ModulatedConv2d(2, 2, 3, 2, upsample=upsample).double()
    given = [torch.randn(2, 2, 3, 3).double(), torch.randn(2, 2).double(), layer.weight.detach().clone()]

    def run(activations: Tensor, style: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (activations, style))  # type: ignore[no-any-return]

    assert torch.autograd.gradgradcheck(run, [tensor.requires_grad_() for tensor in given])


def test_a_mapping_by_hand() -> None:
    layer = Mapping(2, 2, 3, 1).double()
    inputs, label = torch.tensor([[3.0, -1]]).double(), torch.tensor([1])
    vector = layer.embedding.weight[:, 1] / 2**0.5 + layer.embedding.bias
    normalized = torch.cat([inputs[0] / 5**0.5, vector / vector.square().mean().sqrt()])
    weights, bias = layer.layers[0].weight * 0.01 / 5**0.5, layer.layers[0].bias * 0.01
    dense = weights @ normalized + bias
    expected = 2**0.5 * torch.where(dense > 0, dense, 0.2 * dense)
    torch.testing.assert_close(layer(inputs, label)[0], expected, rtol=1e-6, atol=1e-8)


def test_a_mapping_starts_at_unit_scale_and_learns_slowly() -> None:
    torch.manual_seed(0)
    layer = Mapping(256, 0, 256, 1)
    assert layer.layers[0].weight.std().item() == pytest.approx(100.0, rel=0.02)
    # LeakyReLU(0.2) times sqrt(2) has the second moment (1 + 0.04) / 2 * 2.
    assert layer(torch.randn(500, 256), None).square().mean().item() == pytest.approx(1.04, rel=0.05)


def test_noise_is_of_the_latent_and_the_layer() -> None:
    layer = AddressedNoise([4, 64, 64])
    small, first, second = layer(latents(2))
    assert (small.shape, first.shape) == ((2, 1, 4, 4), (2, 1, 64, 64))
    assert torch.equal(layer(latents(2)[1:])[1], first[1:])
    drawn = torch.cat((first, second)).flatten(1)
    assert drawn.mean(1).abs().max() < 4 / 64
    assert drawn.std(1).numpy() == pytest.approx(1.0, rel=0.05)
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 4 / 64


def test_a_sample_is_a_function_of_its_latent_and_label() -> None:
    """In training with mixed styles too: alone, in another place, and in another batch."""
    network = generator(style_mixing=0.9)
    z = latents()
    for training in (True, False):
        network.train(training)
        whole = network(z, LABELS)
        for place in range(4):
            alone = network(z[place : place + 1], LABELS[place : place + 1])
            torch.testing.assert_close(alone, whole[place : place + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(z.flip(0), LABELS.flip(0)), whole.flip(0), rtol=1e-4, atol=1e-5)
    network.layers[3].noise_strength.data.zero_()
    assert not torch.allclose(network(z, LABELS), whole, atol=0.01), "there is noise"


def test_constant_noise_is_that_of_all_samples() -> None:
    network = generator().eval()
    with torch.no_grad():
        network.layers[0].convolution.affine.weight.zero_()  # so that the first layer differs in its noise only
        outputs: list[Tensor] = []
        network.layers[0].register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        network(latents(), LABELS)
        with constant_noise(network):
            network(latents(), LABELS)
        network(latents(), LABELS)
    assert not torch.allclose(outputs[0][0], outputs[0][1])
    assert torch.equal(outputs[1], outputs[1][:1].expand_as(outputs[1]))
    assert torch.equal(outputs[2], outputs[0])


def test_images_along_a_path_have_one_noise() -> None:
    shape = SampleShape(resolution=8, channels=1)
    network = generator(shape).eval()
    drawn: list[list[Tensor]] = []
    network.noise.register_forward_hook(lambda _module, _inputs, output: drawn.append(output))
    config = GeneratorConfig(architecture="stylegan2", latent_distribution="normal", latent_size=6)
    images = generate_paths(network, shape, LatentSource(config, 0, class_counts=None), "paths", paths=2, steps=3)
    assert images.shape == (6, 1, 8, 8)
    assert drawn[0][0].shape == (1, 1, 4, 4)
    assert not network.noise.constant, "inside only"


def test_styles_are_mixed_from_a_random_layer_on() -> None:
    """With the probability asked for, from each of layers 1 to L - 1 equally often, and in training only."""
    network = generator(SampleShape(resolution=16, channels=1), style_mixing=0.75)
    z = latents(4000)
    own = network.mapping(z, None)
    styles = network.styles(z).detach()
    assert styles.shape == (4000, 6, 7)
    kept = (styles == own[:, None]).all(2)
    assert kept[:, 0].all()
    assert torch.equal(kept, kept.cummin(1).values), "no style of the first latent after one of the second"
    lengths = kept.sum(1).bincount(minlength=7) / 4000
    assert lengths[1:6].numpy() == pytest.approx(0.75 / 5, abs=0.03)
    assert lengths[6].item() == pytest.approx(0.25, abs=0.03)
    mixed = styles[~kept[:, 5], 5]
    assert mixed.mean(0).numpy() == pytest.approx(own.detach().mean(0).numpy(), abs=0.06), "of one distribution"
    assert torch.equal(network.eval().styles(z), own[:, None].expand(-1, 6, -1))


def test_truncation_moves_styles_toward_their_average() -> None:
    network = generator()
    with torch.no_grad():
        for _ in range(2):
            network(latents(), LABELS)
        style = network.mapping(latents(), LABELS)
        # 0.995^t of the start, 0, and the rest of the mean style.
        torch.testing.assert_close(network.average_style, style.mean(0) * (1 - 0.995**2))
        network.eval()
        before = network.average_style.clone()
        network.style_truncation = 0.7
        found = network.styles(latents(), LABELS)
        torch.testing.assert_close(found[:, 0], before + 0.7 * (style - before))
        network.style_truncation = 0.0
        with constant_noise(network):
            images = network(latents(), LABELS)
        torch.testing.assert_close(images, images[:1].expand_as(images))
        assert torch.equal(network.average_style, before), "it is of training only"


def test_a_loaded_generator_truncates_styles_in_place_of_latents() -> None:
    config = GeneratorConfig(
        architecture="stylegan2", latent_distribution="normal", latent_size=6, width=4, max_width=8, style_size=7
    )
    facts = {"class_names": None, "class_counts": None, "step": 1, "images": 1, "versions": {}}
    found = Generator({**facts, "kind": "images", "resolution": 8, "channels": 1}, config)
    whole = found.latents(8)
    found.truncation = 0.5
    assert found.network.style_truncation == 0.5
    assert torch.equal(found.latents(8), whole)
    with pytest.raises(UserError, match="pass it to load_generator"):
        found.latents(8, truncation=0.7)
    with pytest.raises(UserError, match="truncation = -1"):
        found.truncation = -1.0
    found.truncation = None
    assert found.network.style_truncation == 1.0


def test_what_training_moves_is_declared_once() -> None:
    network = generator()
    assert [buffer.shape for buffer in moving_buffers(network)] == [(7,), ()]
    declare_moving(network, ["average_style"])
    assert foreign_moving_buffers(network) == []
    assert len(moving_buffers(copy.deepcopy(network))) == 2


def test_bfloat16_is_in_the_convolutions_only() -> None:
    network = generator(SampleShape(resolution=32, channels=3), width=16, max_width=32).eval()
    config = DiscriminatorConfig(architecture="stylegan2", width=16, max_width=32)
    judge = build_discriminator(config, SampleShape(resolution=32, channels=3))
    with torch.no_grad():
        full, expected = network(latents()), judge(network(latents()))
        with torch.autocast("cpu", torch.bfloat16):
            images, logits = network(latents()), judge(full)
            assert network.styles(latents()).dtype == torch.float32
    assert images.dtype == logits.dtype == torch.float32
    assert (images - full).square().mean().sqrt() < 0.01 * full.std()
    torch.testing.assert_close(logits, expected, rtol=0.1, atol=0.05)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++, with which torch.compile builds for CPUs")
def test_compiled_by_inductor_it_draws_the_same() -> None:
    network = generator(SampleShape(resolution=4, channels=1), style_mixing=0.9)
    torch.testing.assert_close(torch.compile(network)(latents()), network(latents()), rtol=1e-4, atol=1e-5)


def test_channels_last_changes_nothing() -> None:
    network = generator().eval()
    expected = network(latents(), LABELS)
    torch.testing.assert_close(
        network.to(memory_format=torch.channels_last)(latents(), LABELS), expected, rtol=1e-4, atol=1e-5
    )


def test_mixed_styles_need_normal_latents() -> None:
    with pytest.raises(ValidationError, match="latent_distribution: normal"):
        GeneratorConfig(architecture="stylegan2")
    GeneratorConfig(architecture="stylegan2", style_mixing=0)


def test_images_have_four_pixels_or_more() -> None:
    shape = SampleShape(resolution=2, channels=1)
    with pytest.raises(UserError, match="the stylegan2 generator supports powers of two from 4 up"):
        generator(shape)
    with pytest.raises(UserError, match="the stylegan2 discriminator supports powers of two from 4 up"):
        build_discriminator(DiscriminatorConfig(architecture="stylegan2"), shape)


def test_labels_change_images_and_logits() -> None:
    network = generator().eval()
    config = DiscriminatorConfig(architecture="stylegan2", width=4, max_width=8)
    judge = build_discriminator(config, SHAPE)
    images = network(latents(), LABELS)
    assert (network(latents(), (LABELS + 1) % 3) - images).abs().amax((1, 2, 3)).min() > 1e-3
    assert (judge(images, (LABELS + 1) % 3) - judge(images, LABELS)).abs().min() > 1e-4
