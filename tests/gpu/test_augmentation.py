"""Augmentation on a device: the images of the CPU, no wait for the device, and deterministic derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distgan import randomness
from distgan.config import ControllerConfig
from distgan.losses.augmentation import Augmentation, AugmentationDraws
from distgan.losses.augmentation.ada import Ada
from distgan.losses.augmentation.controller import AugmentationController
from distgan.losses.augmentation.diffaugment import DiffAugment

pytestmark = pytest.mark.gpu

PIPES = {"ada": Ada(frequency_filter=1.0, noise=1.0, cutout=1.0), "diffaugment": DiffAugment()}
every_pipe = pytest.mark.parametrize("pipe", PIPES.values(), ids=list(PIPES))


def draws_on(device: torch.device, probability: float | Tensor = 0.8) -> AugmentationDraws:
    places = torch.arange(16, device=device)
    return AugmentationDraws(
        uniform=lambda purpose, *shape: randomness.uniform(0, purpose, places, shape),
        normal=lambda purpose, *shape: randomness.normal(0, purpose, places, shape),
        probability=probability,
    )


@pytest.fixture
def images() -> Tensor:
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def _no_waiting(device: torch.device) -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")


@every_pipe
def test_images_are_the_cpus(device: torch.device, pipe: Augmentation, images: Tensor) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    found = pipe(images.to(device), draws_on(device)).cpu()
    assert torch.allclose(found, pipe(images, draws_on(torch.device("cpu"))), atol=1e-3)


def test_the_host_never_waits(device: torch.device, images: Tensor, request: pytest.FixtureRequest) -> None:
    controller = AugmentationController(ControllerConfig(every=1), device)
    samples, applied = images.to(device), torch.ones((), device=device)
    for attempt in range(2):  # the first one copies the matrices of this size
        for pipe in PIPES.values():
            augmented = pipe(samples, draws_on(device, controller.probability))
            controller.update([augmented.sign().mean()], applied, index=0, images=16)
        if attempt == 0:
            request.getfixturevalue("_no_waiting")


@every_pipe
def test_second_derivatives_are_deterministic(device: torch.device, pipe: Augmentation, images: Tensor) -> None:
    def gradient() -> Tensor:
        samples = images.to(device).requires_grad_()
        augmented = pipe(samples, draws_on(device))
        (first,) = torch.autograd.grad(augmented.pow(3).sum(), samples, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), samples)
        return second

    free = gradient()
    torch.use_deterministic_algorithms(True)
    try:
        one, other = gradient(), gradient()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(one, other)
    assert torch.allclose(one, free, rtol=1e-3, atol=1e-3 * float(free.abs().max()))
