"""Networks against released implementations: the same outputs and gradients from the same weights, in float64.

`reference_networks.json` was made by running the code of these repositories on a CPU, outside this one:

- ajbrock/BigGAN-PyTorch 98459431a5d6: `Generator` and `Discriminator` of BigGAN.py, in training mode. `ortho` of
  utils.py at a strength of 1e-4 on the generator of `biggan-128`, without its shared embedding, gave `orthogonal`.
- kwotsin/mimicry a7fda06c4aff: `CGANPDGenerator32` and `CGANPDDiscriminator32`, changed in four points to what the code
  of its paper does (pfnet-research/sngan_projection): enlarged by repeating pixels instead of bilinearly, no ReLU in
  place, which would also change the shortcuts, eps 2e-5 in conditional batch norm, and no bias of the logit.

A script there copied the numbers of `fill` into its networks by name: BigGAN's `blocks.0.0.conv1` is `blocks.0.first`
here, `bn1.gain` is `first_norm.gain`, and so on, and vectors of spectral norm and inputs are those of `fill` and
`inputs`. Biases that are left out here were 0 there, and the script saw that their gradients were below 1e-12. What is
kept of each tensor is the `digest` below.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.spectral_norm import SpectralNorm
from distgan.networks.shape import SampleShape

FIXTURE = Path(__file__).with_name("reference_networks.json")
CASES: dict[str, dict[str, Any]] = {
    "biggan-32": {
        "classes": 10, "resolution": 32, "samples": 3,
        "generator": {"architecture": "biggan", "latent_size": 8, "width": 4},
        "discriminator": {"architecture": "biggan", "width": 4},
    },
    "biggan-128": {
        "classes": 5, "resolution": 128, "samples": 2,
        "generator": {"architecture": "biggan", "latent_size": 12, "width": 8, "attention": [64], "shared_size": 6,
                      "hierarchical": True},
        "discriminator": {"architecture": "biggan", "width": 8, "attention": [64]},
    },
    "cgan-pd-32": {
        "classes": 10, "resolution": 32, "samples": 3,
        "generator": {"architecture": "resnet", "latent_size": 8, "width": 16},
        "discriminator": {"architecture": "resnet", "width": 8, "normalization": "none", "spectral_norm": True},
    },
}  # fmt: skip


def numbers(name: str, *shape: int) -> Tensor:
    """Uniform in [-1, 1), float64, by name: splitmix64 of place + 2^32 crc32(name)."""
    state = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1).view(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniform, of a variance of 1 / (3 fan in) for matrices, else in [-1/2, 1/2), or [1/2, 3/2) for the last scale."""
    if len(shape) > 1:
        return numbers(name, *shape) / math.sqrt(math.prod(shape[1:]))
    return numbers(name, *shape) / 2 + (name == "output.0.weight")


def singular_vector(layer: str, size: int) -> Tensor:
    drawn = numbers(f"{layer}.u", size)
    return drawn / drawn.norm()


def digest(name: str, tensor: Tensor) -> list[float]:
    """Products with a fixed vector, and with itself."""
    flat = tensor.detach().flatten()
    return [(flat @ numbers(f"{name}/probe", len(flat))).item(), (flat @ flat).item()]


def inputs(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, images and labels of a case."""
    case = CASES[name]
    samples, side = case["samples"], case["resolution"]
    latents = 2 * numbers("latents", samples, case["generator"]["latent_size"])
    return latents, numbers("images", samples, 3, side, side), torch.arange(samples) * 3 % case["classes"]


def name_of(parameter: str) -> str:
    return parameter.replace("parametrizations.", "").replace(".original", "")


@torch.no_grad()
def fill(network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        parameter.copy_(weight(name_of(name), tuple(parameter.shape)))
    for name, module in network.named_modules():
        if isinstance(module, SpectralNorm):
            module.u.copy_(singular_vector(name.partition(".parametrizations")[0], len(module.u)))


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    case = CASES[name]
    shape = SampleShape(resolution=case["resolution"], channels=3, num_classes=case["classes"])
    generator = build_generator(GeneratorConfig(**case["generator"]), shape).double()
    discriminator = build_discriminator(DiscriminatorConfig(**case["discriminator"]), shape).double()
    for network in (generator, discriminator):
        fill(network)
    return generator, discriminator


@pytest.mark.parametrize("role", ["generator", "discriminator"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_the_references(name: str, role: str) -> None:
    latents, images, labels = inputs(name)
    network = networks(name)[role == "discriminator"]
    given = (latents if role == "generator" else images).requires_grad_()
    output = network(given, labels)
    (output * numbers("output gradient", *output.shape)).sum().backward()
    found = {"output": digest("output", output), "input": digest("input", given.grad)}
    found |= {name_of(key): digest(name_of(key), p.grad) for key, p in network.named_parameters()}
    expected = json.loads(FIXTURE.read_text())[name][role]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert found[key] == pytest.approx(values, rel=1e-9, abs=1e-12), key
