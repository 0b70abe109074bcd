"""What a device computes and copies, against the CPU: random draws, snapshots, the Fréchet distance, penalties."""

from __future__ import annotations

import threading
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from distgan import randomness
from distgan.checkpoint.loading import load_sets
from distgan.checkpoint.snapshot import Snapshot
from distgan.checkpoint.writer import CheckpointWriter
from distgan.errors import UserError
from distgan.evaluation.detectors.classifier import build_classifier
from distgan.evaluation.metrics.frechet import FrechetDistanceToReference, make_reference
from distgan.evaluation.moments import Moments
from distgan.evaluation.precision import plain_float32
from distgan.metrics import FrechetDistance, InceptionScore, KernelDistance, load_detector
from distgan.networks import build_discriminator
from distgan.networks.shape import SampleShape
from distgan.players.finite_differences import check_finite_differences
from distgan.players.samples import MicroBatch
from tests.unit.test_precision_by_stage import differences_config, players, update

pytestmark = pytest.mark.gpu

POSITIONS = torch.tensor([0, 1, 5, 2**32 + 7, 2**50])


def test_draws_are_the_cpus(device: torch.device) -> None:
    """Words, uniform numbers and integers bit for bit; normal ones to the last bit of float32."""
    for words in (1, 4, 37):
        assert torch.equal(
            randomness.words(3, "test", POSITIONS.to(device), words).cpu(),
            randomness.words(3, "test", POSITIONS, words),
        )
    uniform = randomness.uniform(3, "u", POSITIONS.to(device), (3, 5))
    assert uniform.device.type == device.type
    assert torch.equal(uniform.cpu(), randomness.uniform(3, "u", POSITIONS, (3, 5)))
    integers = randomness.integers(3, "i", POSITIONS.to(device), 2**31, (7,))
    assert torch.equal(integers.cpu(), randomness.integers(3, "i", POSITIONS, 2**31, (7,)))
    normal = randomness.normal(3, "n", POSITIONS.to(device), (1000,)).cpu()
    torch.testing.assert_close(normal, randomness.normal(3, "n", POSITIONS, (1000,)), rtol=2.0**-22, atol=2.0**-40)


def state(device: torch.device) -> dict[str, Tensor]:
    """Tensors as a checkpoint has them: large enough for a copy to take time, strided, small, on the CPU too."""
    generator = torch.Generator().manual_seed(1)
    large = torch.randn(64, 256, 32, 32, generator=generator)
    return {
        "large": large.to(device),
        "channels_last": large[:, :16].to(device, memory_format=torch.channels_last),
        "transposed": torch.arange(12.0, device=device).view(3, 4).T,
        "half": torch.full((7,), 0.5, device=device, dtype=torch.bfloat16),
        "count": torch.tensor(3, device=device),
        "host": torch.arange(5),
    }


def change(tensors: dict[str, Tensor], value: float) -> None:
    """As an optimizer does, on the stream that the copies are on."""
    for tensor in tensors.values():
        tensor.fill_(value)


def test_a_snapshot_is_of_its_moment(device: torch.device) -> None:
    """The tensors change right after the copy has begun, in the same memory, twice over the same pinned buffer."""
    tensors = state(device)
    snapshot = Snapshot()
    for value in (-1.0, 2.0):
        expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        snapshot.copy(tensors)
        assert snapshot._data.is_pinned() == (device.type == "cuda")
        change(tensors, value)
        held = safetensors.torch.load(b"".join(snapshot.chunks()))
        assert held.keys() == expected.keys()
        assert [name for name in held if not torch.equal(held[name], expected[name])] == []


def test_a_checkpoint_is_of_its_moment(tmp_path: Path, device: torch.device) -> None:
    """Copied by the writer's own thread while this one queues work, and written after the tensors have changed."""
    tensors = state(device)
    expected = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    size = 2048 if device.type == "cuda" else 256
    busy = torch.randn(size, size, device=device) / size**0.5
    with closing(CheckpointWriter(tmp_path, keep=1)) as writer:
        for _ in range(20):
            busy = torch.tanh(busy @ busy)
        assert writer.save(1, {"state": tensors}, {})
        writer.copied()
        change(tensors, -1.0)
    held = load_sets(tmp_path / "step-00000001", ["state"])["state"]
    assert [name for name in expected if not torch.equal(held[name], expected[name])] == []
    assert threading.active_count() < 20


def test_fid_is_the_cpus(device: torch.device) -> None:
    """Features of the same images by the same network, their moments, and the distance of the two halves."""
    images = randomness.integers(0, "images", torch.arange(400), 256, (3, 16, 16)).to(torch.uint8)
    images[200:] = images[200:] // 2 + 60
    found: dict[str, tuple[Tensor, float]] = {}
    for place in (torch.device("cpu"), device):
        network = build_classifier(16, 3, 10).eval().to(place)
        with torch.no_grad(), plain_float32(place):
            features = network(images.to(place))[0]
        reals = Moments(features.shape[1], sync_on_compute=False).to(place)
        reals.update(features[:200])
        distance = FrechetDistanceToReference(make_reference(reals.compute()), sync_on_compute=False).to(place)
        distance.update(features[200:])
        found[place.type] = features.cpu(), float(distance.compute())
    torch.testing.assert_close(found[device.type][0], found["cpu"][0], rtol=1e-4, atol=1e-5)
    assert found[device.type][1] == pytest.approx(found["cpu"][1], rel=1e-4)
    assert found["cpu"][1] > 1e-3


def test_metrics_of_images_are_the_cpus(device: torch.device) -> None:
    """The images come from the CPU, and one detector follows the metrics to each device and back."""
    images = randomness.integers(0, "images", torch.arange(400), 256, (3, 16, 16)).to(torch.uint8)
    images[200:] = images[200:] // 2 + 60
    detector = load_detector(build_classifier(16, 3, 10), image_shape=(3, 16, 16))
    for make in (FrechetDistance, partial(KernelDistance, subset_size=100), InceptionScore):
        found = []
        for place in (torch.device("cpu"), device):
            metric = make(detector).to(place)
            for part, real in ((images[:200], True), (images[200:], False)):
                metric.update(part, real=real, **({} if make is FrechetDistance else {"numbers": torch.arange(200)}))
            value = metric.compute()
            found.append([float(part) for part in (value if isinstance(value, tuple) else (value,))])
        assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_penalties_by_stage_are_those_of_float32_but_for_rounding(device: torch.device) -> None:
    """Grouped convolutions of the device have second derivatives in bfloat16."""
    gradients = []
    for precision in ("no", {"float32_below": 8}):
        objective, _, batch = players(precision)
        for network in (objective.network, objective.opponent):
            network.to(device)
        moved = MicroBatch(*(None if value is None else value.to(device) for value in batch))
        gradients.append(update(objective, moved)[1].cpu())
    error = ((gradients[1] - gradients[0]).norm() / gradients[0].norm()).item()
    assert 1e-5 < error < 0.05


def test_last_layers_in_bfloat16_are_found_as_on_the_cpu(device: torch.device) -> None:
    shape = SampleShape(resolution=32, channels=3, num_classes=3)
    for architecture, below, refused in (("r3gan", 4, True), ("r3gan", 8, False), ("gat", 4, False)):
        config = differences_config(below, architecture)
        network = build_discriminator(config.discriminator, shape).to(device)
        with pytest.raises(UserError, match="last layers") if refused else nullcontext():
            check_finite_differences(network, config, shape)
