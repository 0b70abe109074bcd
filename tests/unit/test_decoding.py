"""Decoders of latents: their contract, and the weights and description that an export holds of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distgan import extensions
from distgan.autoencoders.decoding import DecodedGenerator, LatentDecoder
from distgan.autoencoders.exporting import (
    ExportedDecoder,
    decoder_weights,
    describe_decoder,
    load_exported_decoder,
)
from distgan.autoencoders.loading import load_autoencoder
from distgan.config import AutoencoderConfig
from distgan.errors import UserError
from distgan.networks.shape import SampleShape
from tests.latents import LinearAutoencoder

SHAPE = SampleShape("latents", 8, 4, shift=(2.0, 1.0, 0.0, -1.0), scale=(0.5, 1.0, 2.0, 4.0))


def linear(name: str = "LinearAutoencoder") -> LatentDecoder:
    return LatentDecoder(load_autoencoder(AutoencoderConfig.model_validate(f"tests.latents:{name}")), SHAPE)


def test_a_decoder_undoes_shift_and_scale() -> None:
    images = torch.rand(20, 1, 16, 16) * 2 - 1
    latents = LinearAutoencoder().encode(images)[:, :4]
    as_seen = (latents - torch.tensor(SHAPE.shift)[:, None, None]) * torch.tensor(SHAPE.scale)[:, None, None]
    decoder = linear()
    assert (decoder.shape.kind, decoder.shape.sizes) == ("images", (1, 16, 16))
    torch.testing.assert_close(decoder(as_seen), images)
    torch.testing.assert_close(DecodedGenerator(nn.Identity(), decoder).decoder(as_seen), images)


def test_a_decoder_is_frozen_and_passes_gradients_on() -> None:
    decoder = linear()
    samples = torch.zeros(3, 4, 8, 8, requires_grad=True)
    decoder(samples).sum().backward()
    assert samples.grad is not None
    assert samples.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in decoder.parameters())
    assert not decoder.autoencoder.training


class FiveChannels(LinearAutoencoder):
    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 5, 16, 16)


def test_a_decoder_that_makes_no_images() -> None:
    with pytest.raises(UserError, match=r"decode returned .*\(1, 5, 16, 16\), expected floats \(n, 1 or 3, H, H\)"):
        LatentDecoder(load_autoencoder(AutoencoderConfig.model_validate(f"{__name__}:FiveChannels")), SHAPE)


def test_a_folder_of_diffusers_in_an_export(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=[8, 8], norm_num_groups=4, latent_channels=4,
        layers_per_block=1,
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "vae")
    decoder = LatentDecoder(load_autoencoder(AutoencoderConfig.model_validate(str(tmp_path / "vae"))), SHAPE)
    assert decoder.shape.sizes == (3, 16, 16)
    described = describe_decoder(decoder)
    assert str(tmp_path) not in str(described)
    (tmp_path / "decoder.safetensors").write_bytes(decoder_weights(decoder))
    parsed = ExportedDecoder.model_validate(described)
    loaded = load_exported_decoder(tmp_path / "decoder.safetensors", parsed, SHAPE)
    samples = torch.randn(2, 4, 8, 8)
    expected = model.decode(
        samples / torch.tensor(SHAPE.scale)[:, None, None] + torch.tensor(SHAPE.shift)[:, None, None]
    ).sample
    torch.testing.assert_close(loaded(samples), expected)
    wrong = parsed.model_copy(update={"architecture": {**described["architecture"], "block_out_channels": [16, 8]}})
    with pytest.raises(UserError, match="not the weights of its decoder"):
        load_exported_decoder(tmp_path / "decoder.safetensors", wrong, SHAPE)
    (tmp_path / "decoder.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(UserError, match="not the weights of a decoder"):
        load_exported_decoder(tmp_path / "decoder.safetensors", parsed, SHAPE)


def test_an_export_that_names_code_does_not_run_it(tmp_path: Path) -> None:
    (tmp_path / "decoder.safetensors").write_bytes(decoder_weights(linear()))
    with extensions.distrusting():
        described = ExportedDecoder(
            autoencoder=AutoencoderConfig.model_validate("webbrowser:open"), architecture=None, hash="0"
        )
    with pytest.raises(UserError, match="code of the package webbrowser, which was not run"):
        load_exported_decoder(tmp_path / "decoder.safetensors", described, SHAPE)
