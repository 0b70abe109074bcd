"""The autoencoder and PatchGAN against what the papers and released codes say of their layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distgan.data.kinds import latents
from distgan.errors import UserError
from distgan.networks.autoencoder.network import LOG_VARIANCES, Autoencoder, reconstruct
from distgan.networks.autoencoder.patchgan import PatchGANDiscriminator
from distgan.networks.shape import SampleShape


def shape(resolution: int, channels: int = 3, num_classes: int = 0) -> SampleShape:
    return SampleShape(resolution=resolution, channels=channels, num_classes=num_classes)


def test_patchgan_is_the_released_one() -> None:
    """3-64-128-256 with stride 2, 512 and 1 with stride 1; 2.77 M parameters, as of pix2pix's code."""
    network = PatchGANDiscriminator(shape(256))
    assert network(torch.zeros(2, 3, 256, 256)).shape == (2, 30, 30)
    convolutions = 4 * 4 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    biases, normalization = 64 + 1, 2 * (128 + 256 + 512)
    assert sum(parameter.numel() for parameter in network.parameters()) == convolutions + biases + normalization
    first = network.features[0].weight.std()
    assert first.item() == pytest.approx(0.02, rel=0.05)


def test_a_logit_of_patchgan_sees_70_pixels() -> None:
    network = PatchGANDiscriminator(shape(256, 1), width=4, normalization="none")
    images = torch.randn(1, 1, 256, 256, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(images)[0, 15, 15], images)
    rows = gradient[0, 0].abs().sum(1).nonzero()
    assert rows.max() - rows.min() + 1 == 70


@pytest.mark.parametrize(
    ("resolution", "classes", "options", "said"),
    [
        (32, 3, {}, "patchgan takes no labels"),
        (16, 0, {}, "layers = 3: data.resolution = 16 leaves no patches, expected at least 24"),
    ],
)
def test_patchgan_refuses(resolution: int, classes: int, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        PatchGANDiscriminator(shape(resolution, 1, classes), **options)


def small(latent_size: int = 2 * 16, **options: Any) -> Autoencoder:
    return Autoencoder(
        shape(16, 1), latent_size, **{"width": 8, "max_width": 16, "depth": 1, "downsampling": 4} | options
    )


def test_latents_have_the_channels_of_latent_size() -> None:
    network = small()
    moments = network.encode(torch.randn(3, 1, 16, 16))
    assert moments.shape == (3, 4, 4, 4)
    assert network.decode(moments[:, :2]).shape == (3, 1, 16, 16)
    assert network.get_submodule(network.last_layer).weight.shape[0] == 1
    # 256 pixels, f = 8 and 4 channels, as of latent diffusion: widths 1, 2, 4, 4 times the first.
    with torch.device("meta"):
        large = Autoencoder(shape(256), 4 * 32 * 32, width=128)
        assert large.encode(torch.zeros(1, 3, 256, 256)).shape == (1, 8, 32, 32)
    assert large.encoder.output.weight.shape == (8, 512, 3, 3)


def test_a_reconstruction_decodes_mean_plus_deviation_times_noise() -> None:
    network, images = small(), torch.randn(3, 1, 16, 16)
    noise = torch.randn(3, 32)
    made, moments = reconstruct(network, images, noise)
    means, logarithms = network.encode(images).chunk(2, dim=1)
    torch.testing.assert_close(moments, torch.cat((means, logarithms), 1))
    torch.testing.assert_close(made, network.decode(means + logarithms.exp().sqrt() * noise.view(3, 2, 4, 4)))
    torch.testing.assert_close(network(images, noise), made)
    torch.testing.assert_close(network(images), network.decode(means))


def test_variances_are_bounded_as_those_of_data() -> None:
    assert LOG_VARIANCES == latents.LOG_VARIANCES
    network = small()
    with torch.no_grad():
        network.encoder.output.bias.fill_(1e6)  # type: ignore[union-attr]
    _, moments = reconstruct(network, torch.zeros(1, 1, 16, 16), None)
    assert moments[:, 2:].max() == 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"downsampling": 3}, r"generator\.downsampling = 3: expected a power of two that divides .* = 16"),
        ({"downsampling": 32}, r"generator\.downsampling = 32"),
        ({"latent_size": 100}, r"latent_size = 100: expected a multiple of 4 x 4 = 16, .* set 96"),
        ({"latent_size": 5}, r"set 16"),
    ],
)
def test_sizes_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small(**options)
