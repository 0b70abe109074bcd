"""Networks that grow, against the paper's table, the released code's structure, and hand-made blends."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.equalized import EqualizedConv2d, EqualizedLinear
from distgan.networks.progressive import GrowingNetwork, blend, enlarge, fade_reals, shrink
from distgan.networks.shape import SampleShape

TOP = 3


def generator(resolution: int = 32, num_classes: int = 0, **changes: Any) -> Any:
    config = GeneratorConfig(
        **{"architecture": "progressive", "normalization": "none", "width": 4, "max_width": 8, "latent_size": 6}
        | changes
    )
    return build_generator(config, SampleShape(resolution=resolution, channels=2, num_classes=num_classes))


def discriminator(resolution: int = 32, num_classes: int = 0, **changes: Any) -> Any:
    config = DiscriminatorConfig(
        **{"architecture": "progressive", "normalization": "none", "width": 4, "max_width": 8} | changes
    )
    return build_discriminator(config, SampleShape(resolution=resolution, channels=2, num_classes=num_classes))


def images(level: int, number: int = 4, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(number, 2, 4 << level, 4 << level, dtype=dtype, generator=torch.Generator().manual_seed(1))


def latents(number: int = 4) -> Tensor:
    return torch.randn(number, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def lerp_clip(a: Tensor, b: Tensor, t: float) -> Tensor:
    return a + (b - a) * min(max(t, 0.0), 1.0)


GROWTHS = [(0, 1.0), (1, 0.25), (1, 1.0), (2, 0.5), (3, 1e-3), (3, 1.0)]


@pytest.mark.parametrize(("level", "fade"), GROWTHS)
def test_the_generator_is_the_released_codes_linear_structure(level: int, fade: float) -> None:
    """Which makes an image at every resolution, enlarges all and picks two by a level of detail counted from the top.

    With fade = 1 this is the network without any fading.
    """
    network = generator().double()
    detail = TOP - level + (1.0 - fade)
    activations = network.first(nn.functional.normalize(latents(), dim=1)[:, :, None, None] * 6**0.5)
    expected = network.to_rgb[0](activations)
    for number in range(1, TOP + 1):
        activations = network.blocks[number - 1](activations)
        image = network.to_rgb[number](activations)
        expected = lerp_clip(image, expected.repeat_interleave(2, 2).repeat_interleave(2, 3), detail - (TOP - number))
    network.set_growth(level, fade)
    found = network(latents())
    assert found.shape == (4, 2, 4 << level, 4 << level)
    torch.testing.assert_close(enlarge(found, 2 ** (TOP - level)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("level", "fade"), GROWTHS)
def test_the_discriminator_is_the_released_codes_linear_structure(level: int, fade: float) -> None:
    network = discriminator(minibatch_stddev={"group_size": 2}).double()
    detail = TOP - level + (1.0 - fade)
    image = enlarge(images(level), 2 ** (TOP - level))
    activations = network.from_rgb[TOP](image)
    for number in range(TOP, 0, -1):
        activations = network.blocks[number - 1](activations)
        image = image.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
        activations = lerp_clip(activations, network.from_rgb[number - 1](image), detail - (TOP - number))
    expected = network.logits(network.last(activations)).squeeze(1)
    network.set_growth(level, fade)
    torch.testing.assert_close(network(images(level)), expected, rtol=1e-6, atol=1e-6)


def convolved(activations: Tensor, layer: EqualizedConv2d, padding: int, gain: float = 2**0.5) -> Tensor:
    weight = layer.weight * (gain / (layer.weight[0].numel()) ** 0.5)
    return F.conv2d(activations, weight, layer.bias, padding=padding)


def rectified(activations: Tensor) -> Tensor:
    return torch.where(activations > 0, activations, 0.2 * activations)


def normalized(activations: Tensor) -> Tensor:
    return activations / (activations.square().mean(1, keepdim=True) + 1e-8).sqrt()


def convolutions(module: nn.Module) -> list[EqualizedConv2d]:
    return [layer for layer in module.modules() if isinstance(layer, EqualizedConv2d)]


def with_random_biases(network: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return network.double()


def test_the_generators_layers_written_out() -> None:
    """Table 2, with what the released code does between layers. Its first layer is dense there, of gain sqrt(2)/4."""
    network = with_random_biases(generator(8, latent_size=6))
    one, two = convolutions(network.first)
    # Output pixel (y, x) of a 4x4 convolution of one pixel has the kernel's weight (3 - y, 3 - x).
    dense = (one.weight.flip(2, 3) * (2**0.5 / 4 / 6**0.5)).permute(1, 0, 2, 3).reshape(6, -1)
    activations = (normalized(latents()) @ dense).view(4, -1, 4, 4) + one.bias[:, None, None]
    activations = normalized(rectified(activations))
    activations = normalized(rectified(convolved(activations, two, 1)))
    one, two = convolutions(network.blocks[0])
    activations = activations.repeat_interleave(2, 2).repeat_interleave(2, 3)
    activations = normalized(rectified(convolved(activations, one, 1)))
    activations = normalized(rectified(convolved(activations, two, 1)))
    torch.testing.assert_close(network(latents()), convolved(activations, network.to_rgb[1], 0, gain=1.0))


def test_the_discriminators_layers_written_out() -> None:
    network = with_random_biases(discriminator(8, minibatch_stddev={"group_size": 4}))
    activations = rectified(convolved(images(1), network.from_rgb[1][0], 0))
    one, two = convolutions(network.blocks[0])
    activations = rectified(convolved(rectified(convolved(activations, one, 1)), two, 1))
    activations = activations.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))
    spread = (activations.var(0, correction=0) + 1e-8).sqrt().mean()
    activations = torch.cat((activations, spread.expand(4, 1, 4, 4)), dim=1)
    one, two = convolutions(network.last)
    activations = rectified(convolved(rectified(convolved(activations, one, 1)), two, 0))
    assert activations.shape == (4, 8, 1, 1)
    logits = activations.flatten(1) @ network.logits.weight.T / 8**0.5 + network.logits.bias
    torch.testing.assert_close(network(images(1)), logits.squeeze(1))


def test_a_new_level_begins_as_the_old_one() -> None:
    g, d = generator().double(), discriminator().double()
    g.set_growth(1, 1.0)
    d.set_growth(1, 1.0)
    old_images, old_logits = g(latents()), d(images(1))
    g.set_growth(2, 1e-9)
    d.set_growth(2, 1e-9)
    torch.testing.assert_close(g(latents()), enlarge(old_images), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d(enlarge(images(1))), old_logits, rtol=1e-6, atol=1e-6)


def test_a_blend_by_hand() -> None:
    old, new = torch.tensor([0.0, 2.0, -1.0]), torch.tensor([1.0, 4.0, -1.0])
    assert blend(old, new, torch.tensor(0.25)).tolist() == [0.25, 2.5, -1.0]
    assert blend(old.bfloat16(), new.bfloat16(), torch.tensor(0.25)).dtype == torch.bfloat16


def test_reals_are_boxes_of_pixels() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    # The means of the four 2x2 boxes of 0..15 in rows of four.
    assert shrink(pixels, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert shrink(pixels, 1).item() == 7.5
    assert torch.equal(shrink(pixels, 4), pixels)
    assert enlarge(shrink(pixels, 2))[0, 0, 1].tolist() == [2.5, 2.5, 4.5, 4.5]


def test_reals_are_faded_like_images() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4)
    # Half way between 0, 1, 2, 3 and its boxes' means.
    assert fade_reals(pixels, 0.5)[0, 0, 0].tolist() == [1.25, 1.75, 3.25, 3.75]
    assert torch.equal(fade_reals(pixels, 1.0), pixels)
    torch.testing.assert_close(fade_reals(pixels, 0.3).mean(), pixels.mean())


TABLE_2 = {
    "generator": "4.2M 2.4M 2.4M 2.4M 2.4M 2.4M 2.4M 2.4M 1.2M 590k 295k 148k 74k 37k 18k 9.2k 4.6k 2.3k 51",
    "discriminator": "64 2.3k 4.6k 9.2k 18k 37k 74k 148k 295k 590k 1.2M 2.4M 2.4M 2.4M 2.4M 2.4M 2.4M 2.4M 4.2M 513",
}
"""Parameters of each layer of the networks for 1024x1024 CelebA-HQ, as the paper prints them."""


def as_printed(count: int) -> str:
    if count < 1000:
        return str(count)
    value, unit = (count / 1e6, "M") if count >= 10**6 else (count / 1e3, "k")
    return f"{value:.1f}{unit}" if value < 10 else f"{value:.0f}{unit}"


@pytest.mark.parametrize("role", ["generator", "discriminator"])
def test_the_papers_networks(role: str) -> None:
    """Table 2 of Karras et al.: layer by layer, and 23.1M parameters each."""
    sizes = {"width": 16, "max_width": 512}
    with torch.device("meta"):
        shape = SampleShape(resolution=1024, channels=3)
        common = {"architecture": "progressive", "normalization": "none", **sizes}
        network: Any = (
            build_generator(GeneratorConfig(latent_size=512, **common), shape)
            if role == "generator"
            else build_discriminator(DiscriminatorConfig(minibatch_stddev={"group_size": 16}, **common), shape)
        )
    modules = [inner for module in network.active_modules() for inner in module.modules()]
    layers = [module for module in modules if isinstance(module, (EqualizedConv2d, EqualizedLinear))]
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    if role == "discriminator":
        # Blocks are kept from 4x4 up, and the table goes down.
        blocks = [counts[place : place + 2] for place in range(1, len(counts) - 3, 2)]
        counts = [counts[0], *(count for block in blocks[::-1] for count in block), *counts[-3:]]
    assert " ".join(map(as_printed, counts)) == TABLE_2[role]
    assert round(sum(counts) / 1e6, 1) == 23.1
    assert sum(parameter.numel() for parameter in network.active_parameters()) == sum(counts)


@pytest.mark.parametrize("resolution", [4, 8, 64])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_shapes_at_every_level(resolution: int, num_classes: int) -> None:
    g = generator(resolution, num_classes, width=1, max_width=2)
    d = discriminator(resolution, num_classes, width=1, max_width=2, minibatch_stddev={"group_size": 2})
    labels = torch.tensor([0, 2]) if num_classes else None
    for level in range(resolution.bit_length() - 2):
        for fade in (0.5, 1.0):
            for network in (g, d):
                network.set_growth(level, fade)
            made = g(latents(2).float(), labels)
            assert made.shape == (2, 2, 4 << level, 4 << level)
            assert d(made, labels).shape == (2,)
    assert g(latents(2).float(), labels).shape[-1] == resolution


def test_a_new_network_is_whole() -> None:
    assert generator()(latents().float()).shape == (4, 2, 32, 32)


def test_outputs_are_not_bounded() -> None:
    network = generator()
    with torch.no_grad():
        network.to_rgb[TOP].bias.fill_(100.0)
    assert network(latents().float()).mean() > 50


def test_labels_matter() -> None:
    g, d = generator(num_classes=3).double(), discriminator(num_classes=3).double()
    one, other = g(latents(1), torch.tensor([0])), g(latents(1), torch.tensor([1]))
    assert not torch.allclose(one, other)
    repeated = images(TOP, 1).expand(3, -1, -1, -1)
    classes = torch.tensor([2, 0, 1])
    all_logits = d.logits(d.last(d.blocks[0](d.blocks[1](d.blocks[2](d.from_rgb[TOP](repeated[:1]))))))
    torch.testing.assert_close(d(repeated, classes), all_logits[0, classes])


@pytest.mark.parametrize("network", [generator(num_classes=2), discriminator(num_classes=2)])
@pytest.mark.parametrize(("level", "fade"), GROWTHS)
def test_active_parameters_are_those_with_a_gradient(network: GrowingNetwork, level: int, fade: float) -> None:
    network = network.float()
    network.set_growth(level, fade)
    network.zero_grad(set_to_none=True)
    inputs = latents().float() if hasattr(network, "to_rgb") else images(level).float()
    network(inputs, torch.tensor([0, 1, 0, 1])).square().sum().backward()
    active = set(network.active_parameters())
    assert len(active) == len(network.active_parameters())
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == (parameter in active), name
        if parameter in active:
            assert parameter.grad is not None
            assert parameter.grad.any(), name


def test_growth_changes_no_names() -> None:
    network = generator()
    before = {name: value.shape for name, value in network.state_dict().items()}
    network.set_growth(1, 0.5)
    assert {name: value.shape for name, value in network.state_dict().items()} == before
    assert "fade" not in before


def test_fading_compiles_once() -> None:
    torch._dynamo.reset()
    counter: Any = CompileCounter()
    network = generator(8)
    compiled = torch.compile(network, backend=counter)
    for fade in (0.25, 0.5, 0.75):
        network.set_growth(1, fade)
        expected = network(latents().float())
        torch.testing.assert_close(compiled(latents().float()), expected)
    assert counter.frame_count == 1
    network.set_growth(1, 1.0)
    compiled(latents().float())
    assert counter.frame_count == 2


def test_penalties_have_a_second_derivative() -> None:
    """d/dw of |dD/dx|^2 in the middle of a fade against central differences."""
    network = discriminator(8, minibatch_stddev={"group_size": 2}).double()
    network.set_growth(1, 0.3)

    def penalty() -> Tensor:
        points = images(1).requires_grad_(True)
        (gradient,) = torch.autograd.grad(network(points).sum(), points, create_graph=True)
        return gradient.square().sum()

    parameters = network.active_parameters()
    torch.manual_seed(0)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    slopes = torch.autograd.grad(penalty(), parameters, materialize_grads=True)
    found = sum((slope * way).sum().item() for slope, way in zip(slopes, directions, strict=True))
    values = []
    with torch.no_grad():
        for sign in (1.0, -2.0):
            for parameter, way in zip(parameters, directions, strict=True):
                parameter += sign * 1e-6 * way
            with torch.enable_grad():
                values.append(penalty().item())
    assert found == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_widths_double_towards_the_latents_up_to_a_limit() -> None:
    assert generator(64, width=3, max_width=20).widths == [20, 20, 12, 6, 3]
    widths = discriminator(256, width=64, max_width=512).widths
    assert widths == [min(8192 // 2**stage, 512) for stage in range(1, 8)]
    assert all(after <= before for before, after in pairwise(widths))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "synchronized"}, r"normalization\s+Input should be 'none'"),
        ({"spectral_norm": True}, "spectral_norm: no option of architecture: progressive"),
    ],
)
def test_other_normalizations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        generator(**changes)


def test_a_network_built_without_memory_can_fade_once_it_has_weights() -> None:
    weights = generator().state_dict()
    with torch.device("meta"):
        network = generator()
    network.load_state_dict(weights, assign=True)
    network.set_growth(2, 0.5)
    assert network(latents().float()).isfinite().all()
