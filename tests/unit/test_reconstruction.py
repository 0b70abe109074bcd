"""The loss of an autoencoder against hand calculations, and when its adversarial term starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.distributions import kl_divergence as torchs_divergence

from distgan.config import Config, parse_config
from distgan.errors import UserError
from distgan.losses.reconstruction import adaptive_weight, kl_divergence
from distgan.networks import build_discriminator, build_generator
from distgan.networks.contract import check_networks
from distgan.networks.shape import sample_shape
from distgan.players.objective import DiscriminatorObjective, GeneratorObjective
from distgan.players.samples import MicroBatch
from distgan.schedule import statistics_sizes
from tests.unit.test_lpips import reference, weights  # noqa: F401

N = 4
SIZE = 2 * 16


def config(*overrides: str, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "run_dir": "unused",
        "data": {"path": "unused", "resolution": 16, "channels": 1},
        "generator": {
            "architecture": "autoencoder", "width": 4, "depth": 1, "downsampling": 4, "latent_size": SIZE,
            "latent_distribution": "normal",
        },
        "discriminator": {"architecture": "patchgan", "layers": 1, "width": 4},
        "objective": {"adversarial": "hinge", "reconstruction": {}},
        "training": {"steps": 10, "batch_size": N, "generator_reals": "last"},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return parse_config(values, overrides)


def players(settings: Config) -> tuple[GeneratorObjective, DiscriminatorObjective]:
    shape = sample_shape(settings.data)
    generator = build_generator(settings.generator, shape).double()
    discriminator = build_discriminator(settings.discriminator, shape).double()
    return (
        GeneratorObjective(generator, discriminator, settings, None),
        DiscriminatorObjective(discriminator, generator, settings, None),
    )


def batch() -> MicroBatch:
    fixed = torch.Generator().manual_seed(3)
    reals = torch.rand(N, 1, 16, 16, generator=fixed, dtype=torch.float64) * 2 - 1
    noise = torch.randn(N, SIZE, generator=fixed, dtype=torch.float64)
    return MicroBatch(torch.arange(N), noise, None, reals, None)


def test_kl_is_that_of_torchs_distributions() -> None:
    moments = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    posterior = Normal(moments[:, :2], (0.5 * moments[:, 2:]).exp())
    expected = torchs_divergence(posterior, Normal(torch.zeros(()).double(), torch.ones(()).double()))
    torch.testing.assert_close(kl_divergence(moments), expected.sum((1, 2, 3)).mean())
    assert kl_divergence(torch.zeros(1, 2, 3, 3)) == 0


def test_gradients_of_norm_2_and_1_at_the_last_layer_give_weight_2() -> None:
    """Whatever the gradients of the other layers are."""
    first, last = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    reconstruction = last @ torch.tensor([1.2, 1.6], dtype=torch.float64) + 100 * first.sum()
    adversarial = last @ torch.tensor([0.0, -1.0], dtype=torch.float64) + first.square().sum()
    weight = adaptive_weight(reconstruction, adversarial, last)
    assert weight.item() == pytest.approx(2 / (1 + 1e-4), rel=1e-12)
    assert not weight.requires_grad
    assert adaptive_weight(1e9 * reconstruction, adversarial, last) == 1e4, "the clamp of the released code"
    assert adaptive_weight(reconstruction, 0.0 * adversarial, last).item() == pytest.approx(2e4 / 2)


def test_the_loss_of_the_autoencoder_by_hand() -> None:
    settings = config("objective.reconstruction={kl: 0.1, adversarial_weight: 0.7}")
    objective, _ = players(settings)
    given, network, discriminator = batch(), objective.network, objective.discriminator
    loss, parts = objective(given, 0)
    means, logarithms = network.encode(given.reals).chunk(2, dim=1)
    made = network.decode(means + (0.5 * logarithms).exp() * given.latents.view_as(means))
    l1 = (made - given.reals).abs().mean()
    divergence = 0.5 * (means**2 + logarithms.exp() - 1 - logarithms).sum() / N / (16 * 16)
    logits = discriminator(made)
    assert logits.shape == (N, 6, 6)
    last = network.decoder.output.weight
    norms = [torch.autograd.grad(of, last, retain_graph=True)[0].norm() for of in (l1, -logits.mean())]
    weight = 0.7 * norms[0] / (norms[1] + 1e-4)
    torch.testing.assert_close(loss, l1 - weight * logits.mean() + 0.1 * divergence)
    named = {"loss/l1": l1, "loss/kl": divergence, "loss/adversarial": -logits.mean(), "loss/generator": loss,
             "generator/adversarial_weight": weight}  # fmt: skip
    for name, value in named.items():
        torch.testing.assert_close(parts[name], value.detach())
    # The weight itself is a constant for the gradient.
    loss.backward()
    expected = torch.autograd.grad(l1 - weight.detach() * logits.mean() + 0.1 * divergence, last)[0]
    torch.testing.assert_close(last.grad, expected)
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_a_fixed_weight() -> None:
    objective, _ = players(config("objective.reconstruction={kl: 0, adaptive: false, adversarial_weight: 0.25}"))
    loss, parts = objective(batch(), 0)
    torch.testing.assert_close(loss.detach(), parts["loss/l1"] + 0.25 * parts["loss/adversarial"])


def test_weights_follow_their_schedules() -> None:
    curves = "{kl: {start: 0.4, end: 0}, adaptive: false, adversarial_weight: {start: 0, end: 2}}"
    objective, _ = players(config(f"objective.reconstruction={curves}"))
    for images, kl, adversarial in ((0, 0.4, 0.0), (10, 0.3, 0.5), (20, 0.2, 1.0), (40, 0.0, 2.0)):
        loss, parts = objective(batch(), images)
        assert parts["generator/adversarial_weight"] == adversarial
        rest = kl * parts["loss/kl"] + adversarial * parts["loss/adversarial"]
        torch.testing.assert_close(loss.detach(), parts["loss/l1"] + rest)
    objective.discriminator.output.bias.data.fill_(torch.inf)
    assert objective(batch(), 0)[0].isfinite(), "0 times an infinite value would not be 0"


def test_hinge_is_the_mean_over_patches() -> None:
    _, objective = players(config())
    given = batch()
    loss, _ = objective(given, 0, 0)
    made = objective.opponent(given.reals, given.latents)
    real, fake = objective.network(given.reals), objective.network(made)
    assert real.shape == (N, 6, 6)
    expected = (1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean()
    torch.testing.assert_close(loss, expected)


def test_the_adversarial_term_starts_at_an_image_count() -> None:
    generator, _ = players(config("objective.reconstruction.adversarial_start_kimg=0.05"))
    for images, started in ((0, False), (49, False), (50, True)):
        loss, parts = generator(batch(), images)
        rest = loss - 1e-6 * parts["loss/kl"] - parts["loss/l1"]
        assert (parts["generator/adversarial_weight"] > 0) == started
        assert (abs(rest.item()) > 1e-9) == started


def test_an_infinite_logit_does_not_matter_before_the_start() -> None:
    generator, discriminator = players(config("objective.reconstruction.adversarial_start_kimg=0.05"))
    discriminator.network.output.bias.data.fill_(torch.inf)
    loss, parts = generator(batch(), 0)
    assert parts["loss/adversarial"].isinf()
    assert loss.isfinite()


def test_lpips_enters_loss_and_weight(weights: Path) -> None:  # noqa: F811
    section = f"{{kl: 0, perceptual: {{weights: {weights}, weight: {{start: 2, end: 0}}}}}}"
    objective, _ = players(config(f"objective.reconstruction={section}"))
    reconstruction = objective.reconstruction
    assert reconstruction is not None
    assert reconstruction._perceptual is not None
    reconstruction._perceptual.double()
    given = batch()
    loss, parts = objective(given, 0)
    made = objective.network(given.reals, given.latents)
    distance = reconstruction._perceptual(made, given.reals).mean()
    torch.testing.assert_close(parts["loss/perceptual"], distance.detach())
    l1 = parts["loss/l1"]
    torch.testing.assert_close(
        loss.detach(), l1 + 2 * distance.detach() + parts["generator/adversarial_weight"] * parts["loss/adversarial"]
    )
    half_way, then = objective(given, 5 * N)
    rest = then["generator/adversarial_weight"] * parts["loss/adversarial"]
    torch.testing.assert_close(half_way.detach(), l1 + 1 * distance.detach() + rest)
    last = objective.network.decoder.output.weight  # type: ignore[union-attr]
    pulls = (made - given.reals).abs().mean() + 2 * distance, -objective.discriminator(made).mean()
    norms = [torch.autograd.grad(of, last, retain_graph=True)[0].norm() for of in pulls]  # type: ignore[arg-type]
    torch.testing.assert_close(parts["generator/adversarial_weight"], (0.5 * norms[0] / (norms[1] + 1e-4)).detach())
    assert not [name for name, _ in objective.named_parameters() if "features" in name and "network" not in name]


def test_the_ratio_is_of_a_micro_batch() -> None:
    """So a resume with another accumulation, which would change it, is refused like other batch statistics."""
    key, settings = "objective.reconstruction.adaptive", config("training.gradient_accumulation_steps=2")
    assert statistics_sizes(settings, 0, 1, "generator")[key] == N // 2
    assert key not in statistics_sizes(settings, 0, 1, "discriminator")
    assert key not in statistics_sizes(config(f"{key}=false"), 0, 1, "generator")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.reconstruction=null", r"objective\.reconstruction: missing, which .* autoencoder needs"),
        ("generator={architecture: dcgan, latent_distribution: normal}", "dcgan makes samples of latents"),
        ("generator.latent_distribution=uniform", r"generator\.latent_distribution: uniform: .* set .*=normal"),
        ("data.labels=true", r"data\.labels: does not work .* set data\.labels=false"),
        ("data.dequantize=true", r"data\.dequantize: does not work"),
        ("growth={}", r"growth"),
        ("objective.feature_matching={}", r"objective\.feature_matching: does not work"),
        ("training.compile=true", r"training\.compile: does not work"),
        ("evaluation.metrics=[{metric: ppl, space: z}]", r"evaluation\.metrics: ppl draws samples"),
        ("objective.r1={gamma: 1}", r"objective\.r1: is of one logit per sample, but patchgan has one per patch"),
        ("objective.gradient_penalty={}", r"objective\.gradient_penalty|discriminator\.normalization"),
        ("objective={adversarial: minimax, reconstruction: {}, label_smoothing: {}}", r"label_smoothing: is of one"),
        ("training.mixed_precision={dtype: bf16, float32_below: 8}", "autoencoder has no stages"),
        ("generator.normalization=virtual", r"generator\.normalization: no option of architecture: autoencoder"),
        ("data={path: x, kind: latents, resolution: 16, channels: 4}", "autoencoder does not make latents"),
    ],
)
def test_settings_that_do_not_fit(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config(override)
    assert "\n" not in str(caught.value)


class Own(nn.Module):
    """An autoencoder of somebody else's, with batch norm or without a last layer."""

    reconstructs = True

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), *layers)

    def encode(self, images: Tensor) -> Tensor:
        made: Tensor = self.layers(images)
        return made

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class WithBlocks(Own):
    blocks = (nn.Identity(),)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Conv2d(1, 1, 1), "Conv2d reconstructs, but has no method encode"),
        (Own(nn.BatchNorm2d(2)), "Own: found batch norm, .* use group norm"),
        (WithBlocks(), "WithBlocks: found blocks, .* remove the attribute blocks"),
        (Own(), r"objective\.reconstruction\.adaptive.*Own does not say which layer is its last"),
    ],
)
def test_networks_that_do_not_fit(network: nn.Module, said: str) -> None:
    settings = config()
    with pytest.raises(UserError, match=said):
        GeneratorObjective(network, nn.Identity(), settings, None)


def test_weights_of_lpips_that_are_missing_or_of_too_small_images(tmp_path: Path) -> None:
    key = "objective.reconstruction.perceptual"
    with pytest.raises(UserError, match=r"perceptual\.weights = .*no\.pth: cannot read PyTorch weights"):
        players(config(f"{key}={{weights: {tmp_path / 'no.pth'}}}"))
    with pytest.raises(UserError, match=r"LPIPS needs 16 pixels per side, found data\.resolution = 8"):
        config(f"{key}={{weights: x}}", "data.resolution=8")


def test_the_contract_of_networks_holds_for_autoencoders_and_patches() -> None:
    """Which is checked if one of the two networks is a user's."""
    settings = config()
    shape = sample_shape(settings.data)
    generator, discriminator = (
        build_generator(settings.generator, shape),
        build_discriminator(settings.discriminator, shape),
    )
    images, noise = torch.rand(4, 1, 16, 16), torch.randn(4, SIZE)
    names = ("generator", "discriminator")
    told: dict[str, Any] = {"noise": noise, "compares_batch": True}
    check_networks(generator, discriminator, shape, images, None, names, **told)
    discriminator.judges_patches = False  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"discriminator: forward returned .* expected floats of shape \(4,\)"):
        check_networks(generator, discriminator, shape, images, None, names, **told)
