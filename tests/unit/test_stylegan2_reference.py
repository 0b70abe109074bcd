"""StyleGAN2's networks and losses against numbers of NVIDIA's code, with the same weights.

stylegan2_reference.json holds what stylegan2-ada-pytorch (commit d72cc7d, training/networks.py and training/loss.py)
computes with its reference operators on a CPU. All of its `torch.float32` were read as `torch.float64` for that. Its
networks were given the weights of `fill`, by name, with its buffers of constant noise set to those of `AddressedNoise`,
in training mode, without mixed styles. The losses are its phases Greg and Dreg, with `torch.randn_like` returning the
draws below. Each array is stored as its dot product with `direction`, which any change of an entry changes; gradients
of zero are left out.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from distgan import randomness
from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.losses.gradient_penalties import zero_centered
from distgan.losses.path_length import PathLength
from distgan.networks import build_discriminator, build_generator
from distgan.networks.shape import SampleShape
from distgan.networks.stylegan2.noise import constant_noise

REFERENCE: dict[str, dict[str, float]] = json.loads((Path(__file__).parent / "stylegan2_reference.json").read_text())
CASES: dict[str, dict[str, Any]] = {
    "conditional, residual": {
        "shape": SampleShape(resolution=16, channels=3, num_classes=3),
        "generator": {"width": 4, "max_width": 8, "style_size": 6, "mapping_layers": 3},
        "discriminator": {"width": 4, "max_width": 8, "residual": True, "minibatch_stddev": {"group_size": 2}},
    },
    "unconditional, plain": {
        "shape": SampleShape(resolution=8, channels=1),
        "generator": {"width": 6, "max_width": 6, "style_size": 5, "mapping_layers": 2},
        "discriminator": {"width": 6, "max_width": 6, "residual": False, "minibatch_stddev": {"group_size": 4}},
    },
}
LATENT = 5
COMMON = {"architecture": "stylegan2"}
PATH_MEAN = 0.75
PSI = 0.6


def draw(name: str, *shape: int) -> Tensor:
    """float64 of N(0, 1), a function of the name."""
    return randomness.normal(0, f"reference/{name}", torch.zeros(1, dtype=torch.int64), shape)[0].double()


def direction(name: str, values: Tensor) -> float:
    return float((draw(f"direction/{name}", *values.shape) * values.detach()).sum())


def fill(network: nn.Module) -> None:
    """Give a network weights of N(0, 1), biases of N(0, 0.1), around 1 for scales, and its buffers other values."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        weight = name.endswith(("weight", "first"))
        values = draw(name, *tensor.shape) * (1.0 if weight else 0.1) + ("affine.bias" in name)
        tensor.data = values * (100.0 if "mapping.layers" in name else 1.0)  # stored so, for a rate of 0.01
    if hasattr(network, "path_length"):
        network.path_length.fill_(PATH_MEAN)


class View(NamedTuple):
    network: nn.Module
    latents: Tensor
    labels: Tensor | None

    def normal(self, purpose: str, *shape: int) -> Tensor:
        return draw("path noise", len(self.latents), *shape)


def networks(case: dict[str, Any]) -> tuple[nn.Module, nn.Module, Tensor, Tensor | None]:
    shape = case["shape"]
    latent = {"latent_size": LATENT, "latent_distribution": "normal", "style_mixing": 0}
    generator = build_generator(GeneratorConfig.model_validate({**COMMON, **latent, **case["generator"]}), shape)
    discriminator = build_discriminator(DiscriminatorConfig.model_validate({**COMMON, **case["discriminator"]}), shape)
    fill(generator)
    fill(discriminator)
    labels = torch.tensor([0, 2, 1, 2]) if shape.num_classes else None
    return generator, discriminator, draw("latents", 4, LATENT), labels


def ours(case: dict[str, Any]) -> dict[str, float]:
    generator, discriminator, latents, labels = networks(case)
    found: dict[str, float] = {}

    def keep(name: str, values: Tensor) -> None:
        found[name] = direction(name, values)

    def keep_gradients(loss: Tensor, name: str, network: nn.Module) -> None:
        network.zero_grad()
        loss.backward()
        for key, parameter in network.named_parameters():
            if parameter.grad is not None:
                keep(f"{name}/{key}", parameter.grad)

    latents.requires_grad_()
    with constant_noise(generator):
        images = generator(latents, labels)
        keep("images", images)
        keep("average_style", generator.average_style)
        keep_gradients((images * draw("objective", *images.shape)).sum(), "generator", generator)
        assert latents.grad is not None
        keep("generator/latents", latents.grad)
        term = PathLength()(View(generator, latents.detach(), labels))
        found["path_length"] = term.item()
        found["path_length mean"] = generator.path_length.item()
        keep_gradients(term, "path_length", generator)
        generator.eval()
        with torch.no_grad():
            generator.style_truncation = PSI
            keep("truncated", generator(latents, labels))
    reals = draw("reals", *images.shape).requires_grad_()
    logits = discriminator(reals, labels)
    keep("logits", logits)
    penalty = zero_centered(logits, reals, 2.0)
    found["r1"] = penalty.item()
    keep_gradients(logits.square().sum() + penalty, "discriminator", discriminator)
    assert reals.grad is not None
    keep("discriminator/reals", reals.grad)
    return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_regularizers_are_those_of_the_released_code(name: str) -> None:
    found, expected = ours(CASES[name]), REFERENCE[name]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert math.isclose(found[key], value, rel_tol=1e-9, abs_tol=1e-11), key
