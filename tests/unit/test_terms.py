"""Losses, terms and optimizers of a user's: what they see, and mistakes that are one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distgan.config import OptimizerConfig, parse_config
from distgan.distributed.engines.base import cancel_unless_finite
from distgan.errors import UserError
from distgan.networks import build_discriminator, build_generator
from distgan.networks.layers.virtual_batch_norm import set_reference
from distgan.networks.shape import SampleShape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.optimizers import build_optimizer
from distgan.players.samples import MicroBatch
from distgan.players.terms import TermView

SHAPE = SampleShape(resolution=16, channels=1)
HERE = __name__


class Watching:
    """Keeps what it sees."""

    needs_reals = True
    needs_features = True
    seen: TermView

    def __call__(self, view: TermView) -> Tensor:
        Watching.seen = view
        return view.judge(view.fakes, view.labels).mean()


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return real.mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean()

    def forward(self, view: TermView) -> Tensor:
        return view.fakes.mean()


class PerSample:
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake - real

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -fake


class Constant:
    """Looks at none of the logits that it should."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return real.detach().mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return torch.ones(())


class Refusing:
    def __init__(self, margin: float = 1.0) -> None:
        raise KeyError("no margin\nlike this")


class Peeking:
    """Looks at reals without saying so."""

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean() - real.mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return F.softplus(real - fake).mean()


class PeekingTerm:
    def __init__(self, attribute: str = "reals", function: str = "mean") -> None:
        self.attribute, self.function = attribute, function

    def __call__(self, view: TermView) -> Tensor:
        found = getattr(view, self.attribute)
        uses = {
            "mean": lambda: found.mean(),
            "minus": lambda: (view.fakes - found).mean(),
            "from": lambda: (found - view.fakes).mean(),
            "call": lambda: F.mse_loss(view.fakes, found),
            "item": lambda: found[0].mean(),
        }
        return uses[self.function]()  # type: ignore[no-any-return]


class Half:
    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean()


def objectives(**sections: Any) -> tuple[GeneratorObjective, DiscriminatorObjective]:
    values = {
        "run_dir": "r",
        "data": {"path": "d", "resolution": 16, "channels": 1},
        "training": {"steps": 1, "batch_size": 4},
        "generator": {"width": 4, "latent_size": 3},
        "discriminator": {"width": 4, "normalization": "none"},
    }
    config = parse_config({**values, **sections}, trust=True)
    generator = build_generator(config.generator, SHAPE)
    discriminator = build_discriminator(config.discriminator, SHAPE)
    if config.discriminator.facts.has_reference:
        set_reference(discriminator, torch.randn(4, 1, 16, 16), None)
    return (
        GeneratorObjective(generator, discriminator, config, None),
        DiscriminatorObjective(discriminator, generator, config, None),
    )


def micro_batch() -> MicroBatch:
    return MicroBatch(torch.arange(4), torch.randn(4, 3), None, torch.rand(4, 1, 16, 16) * 2 - 1, None)


@pytest.mark.parametrize("player", ["generator", "discriminator"])
def test_a_term_sees_samples_without_noise_and_can_ask_the_discriminator(player: str) -> None:
    """With virtual batch norm too, whose reference passes only once for all of an objective."""
    generator, discriminator = objectives(
        discriminator={"width": 4, "normalization": "virtual", "reference_size": 4},
        objective={
            "terms": [{"term": f"{HERE}:Watching", "player": player, "weight": 2}],
            "instance_noise": {"sigma": 1},
        },
    )
    batch = micro_batch()
    if player == "generator":
        loss, parts = generator(batch, 0)
    else:
        loss, parts = discriminator(batch, 0, 0)
    view = Watching.seen
    assert view.reals is batch.reals
    assert view.fakes.abs().max() <= 1, "a tanh, so that noise would show"
    assert view.real_logits is not None
    assert view.fake_features is not None
    assert view.fake_features.shape[0] == 4
    assert view.normal("x", 2, 3).shape == (4, 2, 3)
    assert torch.equal(view.uniform("x"), view.uniform("x"))
    if player == "discriminator":
        assert torch.isclose(loss, parts["loss/discriminator"] + 2 * parts["loss/discriminator.Watching"])
    loss.backward()


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        ({"terms": [{"term": f"{HERE}:Learned"}]}, ["objective.terms.0", "Learned has parameters"]),
        ({"adversarial": f"{HERE}:Learned"}, ["objective.adversarial", "Learned has parameters"]),
        ({"adversarial": f"{HERE}:Half"}, ["objective.adversarial", "no method generator"]),
        ({"adversarial": f"{HERE}:Refusing"}, ["Refusing: cannot be made", "KeyError", "like this", f"{__file__}:"]),
        ({"terms": [{"term": f"{HERE}:Refusing"}]}, ["Refusing: cannot be made", "KeyError", f"{__file__}:"]),
    ],
)
def test_what_cannot_be_made_holds_state_or_lacks_a_method_is_refused(
    objective: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        objectives(objective=objective)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_per_sample_is_refused() -> None:
    generator, discriminator = objectives(objective={"adversarial": f"{HERE}:PerSample"})
    for run in (lambda: generator(micro_batch(), 0), lambda: discriminator(micro_batch(), 0, 0)):
        with pytest.raises(UserError, match=r"PerSample: returned torch.float32 of shape \(4,\)"):
            run()


@pytest.mark.parametrize("function", ["mean", "minus", "from", "call", "item"])
@pytest.mark.parametrize("attribute", ["reals", "real_logits", "fake_features", "real_features"])
def test_what_a_term_did_not_ask_for_is_no_other_tensor(attribute: str, function: str) -> None:
    term = {"term": f"{HERE}:PeekingTerm", "attribute": attribute, "function": function}
    generator, _ = objectives(objective={"terms": [term]})
    asked = "needs_features" if attribute == "fake_features" else "needs_reals"
    with pytest.raises(UserError, match=rf"view\.{attribute}: is not there.* set {asked}"):
        generator(micro_batch(), 0)


def test_a_loss_that_looks_at_reals_has_to_say_so() -> None:
    generator, discriminator = objectives(objective={"adversarial": f"{HERE}:Peeking"})
    assert discriminator(micro_batch(), 0, 0)[0].isfinite()
    with pytest.raises(UserError, match=r"Peeking: real: is not there.* set needs_reals = True"):
        generator(micro_batch(), 0)


def test_a_loss_without_a_gradient_is_refused() -> None:
    generator, discriminator = objectives(objective={"adversarial": f"{HERE}:Constant"})
    for run in (lambda: generator(micro_batch(), 0), lambda: discriminator(micro_batch(), 0, 0)):
        with pytest.raises(UserError, match=r"Constant: returned a loss without a gradient"):
            run()


@pytest.mark.parametrize(
    "optimizer",
    [{"name": "torch.optim:SGD", "momentum": 0.9}, {"name": "torch.optim:AdamW"}, {"name": "torch.optim:RAdam"},
     {"name": "torch.optim:Adagrad"}, {"name": "torch.optim:AdamW", "fused": True},
     {"name": "torch.optim:SGD", "momentum": 0.9, "fused": True}],
)  # fmt: skip
def test_a_step_that_is_not_finite_changes_nothing(optimizer: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.ones(3))
    found = build_optimizer(OptimizerConfig.model_validate({**optimizer, "learning_rate": 0.1}), [weight])

    def step(gradient: float) -> None:
        weight.grad = torch.full((3,), gradient)
        cancel_unless_finite(found, weight.grad.norm())
        found.step()

    step(torch.nan)
    assert torch.equal(weight, torch.ones(3)), "the very first step too"
    step(1.0)
    assert weight.isfinite().all()
    before = weight.detach().clone()
    assert not torch.equal(before, torch.ones(3))
    state = {name: torch.as_tensor(value).clone() for name, value in found.state[weight].items() if value is not None}
    step(torch.nan)
    assert torch.equal(weight, before)
    for name, value in state.items():
        assert torch.equal(torch.as_tensor(found.state[weight][name]), value), name
    step(1.0)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize(
    ("optimizer", "part"),
    [
        ({"name": "torch.optim:LBFGS"}, "its step failed"),
        ({"name": "torch.optim:SparseAdam"}, "its step failed"),
        ({"name": "torch.optim:SGD", "momentum": -1}, "cannot be made with these options"),
        ({"name": "torch.nn:Linear"}, "expected a subclass of torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_do_not_fit_are_one_line(optimizer: dict[str, Any], part: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    with pytest.raises(UserError, match=part) as caught:
        build_optimizer(OptimizerConfig.model_validate(optimizer), [weight]).step()
    assert "\n" not in str(caught.value)
