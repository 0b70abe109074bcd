"""What a run needs of a user's networks: each mistake is one line, and the check leaves no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config import DiscriminatorConfig, GeneratorConfig
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.contract import check_networks
from distgan.networks.layers.normalization import recompute_statistics
from distgan.networks.moving import declare_moving, moving_buffers
from distgan.networks.shape import SampleShape
from distgan.training.ema import EMAGenerator

SHAPE = SampleShape(resolution=4, channels=1)


class Net(nn.Module):
    """A generator of 4x4 images whose parts a test replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 16)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        return self.norm(self.layer(latents)).view(-1, 1, 4, 4)


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 8))
        self.logit = nn.Linear(8, 1)

    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return self.logit(F.relu(self.layer(images.flatten(1)))).squeeze(1)


def check(generator: nn.Module, discriminator: nn.Module) -> None:
    check_networks(generator, discriminator, SHAPE, torch.randn(4, 3), None, ("generator G", "discriminator D"))


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Declaring(Net):
    moving_buffers = ("passes",)


class DeclaringLate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.moving_buffers = ("passes",)


class Forgetful(Net):
    """Counts its passes in a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()), persistent=False)
        self.passes: Tensor

    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        self.passes += 1
        return super().forward(latents, labels) * (1 + 0 * self.passes)


class Wrapped(Net):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        return self.change(super().forward(latents, labels))


class Comparing(Critic):
    """Has a statistic of the batch, and no buffer that tells."""

    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return super().forward(images, labels) + images.std(0).mean()


class Dropping(Critic):
    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return super().forward(F.dropout(F.dropout(images)), labels)


class Column(Critic):
    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return super().forward(images, labels)[:, None]


def fail(images: Tensor) -> Tensor:
    raise KeyError("no such block")


class Masked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))


class Counted(Net):
    """Keeps state that no checkpoint has."""

    passes = 0

    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        self.passes += 1
        return super().forward(latents, labels) + self.passes


class Late(Net):
    """Has a buffer that moves from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0
        self.register_buffer("late", torch.zeros(()), persistent=False)
        self.late: Tensor

    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        self.passes += 1
        self.late += self.passes > 2
        return super().forward(latents, labels)


class Made(Net):
    def forward(self, latents: Tensor, labels: Tensor | None) -> Any:
        self.register_buffer("seen", torch.ones(()))
        return super().forward(latents, labels)


class ColumnOfTwo(Critic):
    """Its logits have another shape for other batches than the first."""

    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        logits = super().forward(images, labels)
        return logits if len(images) == 4 else logits[:, None]


class Detached(Critic):
    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return super().forward(images.detach(), labels)


class InPlace(Critic):
    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        return super().forward(images.mul_(2), labels)


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.LazyLinear(3)


class Skipping(Critic):
    """Calls a block's method and not the block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, images: Tensor, labels: Tensor | None) -> Any:
        first, second = self.blocks
        values = F.linear(first(images.flatten(1)), second.weight, second.bias)  # type: ignore[arg-type]
        return super().forward(values, labels)


class Nested(Critic):
    def __init__(self) -> None:
        super().__init__()
        inner = nn.Linear(16, 16)
        self.blocks = nn.ModuleList([nn.Sequential(inner), inner])


def leave(images: Tensor) -> Tensor:
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("generator", "discriminator", "parts"),
    [
        (Unused, Critic, ["generator G", "2 parameters get no gradient", "spare.weight", "requires_grad_(False)"]),
        (Forgetful, Critic, ["generator G", "buffer passes", "persistent=True"]),
        (Declaring, Critic, ["generator G", "Declaring.moving_buffers = ('passes',)", "tuple of names"]),
        (DeclaringLate, Critic, ["generator G", "DeclaringLate.moving_buffers", "attribute of the class"]),
        (lambda: Wrapped(lambda x: x.flatten(1)), Critic, ["generator G", "(4, 16)", "(4, 1, 4, 4)"]),
        (lambda: Wrapped(lambda x: (x, x)), Critic, ["generator G", "returned tuple", "(4, 1, 4, 4)"]),
        (lambda: Wrapped(lambda x: x.long()), Critic, ["generator G", "torch.int64", "floats"]),
        (lambda: Wrapped(lambda x: x.detach()), Critic, ["generator G", "no gradient", "detach"]),
        (lambda: Wrapped(fail), Critic, ["generator G", "forward pass on (4, 3)", "KeyError", "test_contract"]),
        (Lazy, Critic, ["generator G", "late.weight has no shape", "lazy"]),
        (lambda: Net().double(), Critic, ["generator G", "layer.weight", "float64", "float32"]),
        (Masked, Critic, ["generator G", "mask", "not finite", "persistent=False"]),
        (Counted, Critic, ["generator G", "two passes", "buffers"]),
        (Late, Critic, ["generator G", "buffer late", "persistent=True"]),
        (Made, Critic, ["generator G", "buffer seen", "__init__"]),
        (lambda: Wrapped(lambda x: x * torch.nan), Critic, ["generator G", "not finite"]),
        (lambda: Wrapped(leave), Critic, ["generator G", "SystemExit"]),
        (Net, ColumnOfTwo, ["discriminator D", "(2, 1)", "(2,)", "squeeze(1)"]),
        (Net, Detached, ["discriminator D", "no gradient in its input"]),
        (Net, InPlace, ["discriminator D", "forward pass on (4, 1, 4, 4)", "in-place"]),
        (Net, Skipping, ["discriminator D", "does not call blocks[1]"]),
        (Net, Nested, ["discriminator D", "none inside another"]),
        (Net, Comparing, ["discriminator D", "other samples of the batch", "compares_batch = True"]),
        (Net, Column, ["discriminator D", "(4, 1)", "(4,)", "squeeze(1)"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    generator: Callable[[], nn.Module], discriminator: Callable[[], nn.Module], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check(generator(), discriminator())
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_frozen_parameter_may_be_unused() -> None:
    network = Unused()
    network.spare.requires_grad_(False)
    check(network, Critic())


def test_a_declared_comparison_and_dropout_pass() -> None:
    check_networks(Net(), Comparing(), SHAPE, torch.randn(4, 3), None, ("G", "D"), compares_batch=True)
    check(Net(), Dropping())


def test_the_check_leaves_no_trace() -> None:
    networks = Net(), Critic()
    networks[0].eval()
    before = [copy.deepcopy(network.state_dict()) for network in networks]
    latents = torch.randn(4, 3)
    state = torch.get_rng_state()
    check_networks(*networks, SHAPE, latents, None, ("G", "D"))
    assert torch.equal(torch.get_rng_state(), state)
    for network, tensors in zip(networks, before, strict=True):
        assert all(torch.equal(value, tensors[name]) for name, value in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())
    assert not networks[0].training
    assert networks[1].training


def test_the_buffers_that_move_are_found() -> None:
    generator, discriminator = Net(), Critic()
    check(generator, discriminator)
    assert {buffer.data_ptr() for buffer in moving_buffers(generator)} == {
        buffer.data_ptr() for name, buffer in generator.named_buffers() if name.startswith("norm.")
    }
    assert len(moving_buffers(discriminator)) == 2, "u and v of torch's spectral norm"
    assert len(moving_buffers(copy.deepcopy(generator))) == 3, "the copy that is the average has them too"


@pytest.mark.parametrize("architecture", ["dcgan", "resnet"])
def test_built_in_networks_keep_the_contract(architecture: str) -> None:
    shape = SampleShape(resolution=32, channels=3, num_classes=3)
    common = {"architecture": architecture, "width": 4, "spectral_norm": True, "normalization": "none"}
    generator = build_generator(GeneratorConfig.model_validate({**common, "latent_size": 5}), shape)
    discriminator = build_discriminator(DiscriminatorConfig.model_validate(common), shape)
    labels = torch.tensor([0, 1, 2, 0])
    check_networks(generator, discriminator, shape, torch.randn(4, 5), labels, ("G", "D"))


def test_statistics_of_torchs_batch_norm_are_recomputed() -> None:
    """The mean and variance of the only batch, by torch itself in training mode with momentum 1."""
    network, batch = Net().eval(), torch.randn(64, 3)
    recompute_statistics(network, [(batch, None)])
    activations = network.layer(batch)
    torch.testing.assert_close(network.norm.running_mean, activations.mean(0))
    torch.testing.assert_close(network.norm.running_var, activations.var(0, correction=0))
    assert int(network.norm.num_batches_tracked) == 0
    expected = F.batch_norm(activations, None, None, network.norm.weight, network.norm.bias, training=True)
    torch.testing.assert_close(network(batch, None).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_the_average_divides_by_the_norm_of_the_live_weights() -> None:
    """With torch's spectral norm, an average with vectors of its own would divide by another number."""
    live = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False)))
    with torch.no_grad():
        live[0].parametrizations.weight.original.copy_(torch.diag(torch.tensor([6.7, 1.0, 1.0, 1.0, 1.0, 1.0])))
    declare_moving(live, [name for name, _ in live.named_buffers()])
    average = EMAGenerator(live)
    for _ in range(50):
        live(torch.zeros(1, 6))
    average.update(0.0, torch.ones(()))
    assert float(average.network(torch.eye(6))[0, 0]) == pytest.approx(1.0, rel=1e-5)
