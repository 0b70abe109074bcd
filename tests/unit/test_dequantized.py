"""Images that are trained as (x + u)/128 - 1 come back by floor(128 (y + 1)), wherever samples are made or shown."""

from __future__ import annotations

import json
import zipfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from distgan import schedule
from distgan.checkpoint.contents import load_description
from distgan.checkpoint.loading import find_checkpoint
from distgan.config import GeneratorConfig, load_config, parse_config
from distgan.data.index.loading import load_index
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError
from distgan.evaluation.samples import read_reals
from distgan.inference.export import export, load_generator
from distgan.inference.generation import dequantize, from_network, generate_paths, generating, to_network
from distgan.inference.latents import LatentSource
from distgan.inference.probe import View
from distgan.inference.sample import sample
from distgan.inference.torch_export import export_program
from distgan.monitoring.pictures import grid
from distgan.networks.shape import SampleShape
from distgan.training.inputs import Feed
from distgan.training.loop import train
from distgan.training.setup import assemble
from tests.runs import recipe
from tests.unit.test_export import DESCRIPTION, TEXT, write

LEVELS = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
PLAIN = SampleShape(resolution=16, channels=1)
DEQUANTIZED = SampleShape(resolution=16, channels=1, dequantized=True)


@given(st.floats(0, 1, exclude_max=True, width=32))
def test_every_level_comes_back(noise: float) -> None:
    made = dequantize(LEVELS, torch.full(LEVELS.shape, noise))
    assert ((LEVELS.double() / 128 - 1 <= made) & (made < (LEVELS.double() + 1) / 128 - 1)).all()
    assert torch.equal(from_network(DEQUANTIZED, made), LEVELS)


def test_levels_survive_a_shift() -> None:
    """By 1e-3, which is an eighth of a level: a truncation in place of the rounding would lose a level."""
    for shift in (-1e-3, 0.0, 1e-3):
        assert torch.equal(from_network(PLAIN, to_network(PLAIN, LEVELS) + shift), LEVELS)
        middle = dequantize(LEVELS, torch.full(LEVELS.shape, 0.5))
        assert torch.equal(from_network(DEQUANTIZED, middle + shift), LEVELS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_output_has_the_level_of_its_exact_value(dtype: torch.dtype) -> None:
    outputs = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    outputs = outputs[outputs.abs() < 4][:, None, None, None]
    exact = outputs.double().numpy()
    # A fraction below 0 keeps its sign in 128 y, where 1 + y in float64 may round to 1.
    floored = (np.floor(exact * 128) + 128).clip(0, 255)
    assert np.array_equal(from_network(DEQUANTIZED, outputs).numpy(), floored)
    scaled = (exact + 1) * 127.5
    tied = np.abs(scaled - np.floor(scaled) - 0.5) < 1e-4  # between two levels, where float32 may choose either
    assert np.array_equal(from_network(PLAIN, outputs).numpy()[~tied], np.rint(scaled).clip(0, 255)[~tied])
    assert tied[np.abs(exact) > 2**-7].mean() < 0.01


class Constant(nn.Module):
    """10.9/128 - 1, which is level 10 after dequantization, and without it 10.9 127.5/128, which rounds to 11."""

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.full((len(latents), 1, 16, 16), 10.9 / 128 - 1)


@pytest.mark.parametrize(("shape", "level"), [(PLAIN, 11), (DEQUANTIZED, 10)])
def test_evaluations_and_pictures_get_these_levels(shape: SampleShape, level: int) -> None:
    source = LatentSource(GeneratorConfig(latent_size=4), 0, class_counts=None)
    with generating(Constant(), shape, source, "evaluation") as generate:
        assert generate(torch.arange(2)).unique().tolist() == [level]
    assert generate_paths(Constant(), shape, source, "interpolation", 1, 2).unique().tolist() == [level]


def test_exports_keep_it(tmp_path: Path) -> None:
    source = write(tmp_path / "source", {**DESCRIPTION, "dequantized": True})
    export(source, tmp_path / "export")
    generator = load_generator(tmp_path / "export")
    made = generator(generator.latents(2), generator.labels(2))
    expected = (np.floor(made.double().numpy() * 128) + 128).clip(0, 255).astype(np.uint8)
    assert np.array_equal(generator.to_uint8(made).numpy(), expected)
    sample(tmp_path / "export", tmp_path / "pictures", number=2)
    for path, pixels in zip(sorted((tmp_path / "pictures").iterdir()), expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), pixels[0])
    plain = load_generator(write(tmp_path / "plain"))
    assert torch.equal(plain.to_uint8(made), ((made + 1) * 127.5).round().to(torch.uint8))
    for name, formula in (("export", "floor(128 (x + 1))"), ("plain", "round(127.5 (x + 1))")):
        program = export_program(tmp_path / name, tmp_path / f"{name}.pt2")
        with zipfile.ZipFile(program) as archive:
            (member,) = [member for member in archive.namelist() if member.endswith("generator.json")]
            assert json.loads(archive.read(member))["pixels"] == f"clamp({formula}, 0, 255)"
    text = {**DESCRIPTION, **TEXT}
    with pytest.raises(UserError, match=r"dequantized: is of images, found kind: text"):
        load_generator(write(tmp_path / "text", {**text, "dequantized": True}, weights_of=text))
    with pytest.raises(UserError, match=r"to_uint8: needs a generator of images, found one of text"):
        load_generator(write(tmp_path / "lines", text, weights_of=text)).to_uint8(made)


def test_all_reals_that_a_network_gets_are_dequantized(tmp_path: Path, digits: Path) -> None:
    """Those of updates, of virtual batch norm's reference, and of a probe; the run's grid shows its levels."""
    path = recipe(
        tmp_path, digits, data={"dequantize": True}, discriminator={"normalization": "virtual"},
        objective={"r1": None}, training={"steps": 1, "critic_steps": 1},
    )  # fmt: skip
    config, index, runtime = load_config(path), load_index(str(digits)), Runtime()
    state = assemble(config, index, runtime)
    with closing(Feed(state, runtime)) as feed:
        update = next(schedule.discriminator_updates(config, 0, schedule.Used(0, 0)))
        (first,) = feed.discriminator_inputs(update)
    assert first.reals is not None
    assert torch.equal(state.discriminator.network.get_buffer("reference"), first.reals)
    assert len((first.reals * 128).frac().unique()) > first.reals.numel() / 2, "levels are no points"
    run = train(config)
    assert run.outcome == "finished"
    generator = load_generator(config.run_dir)
    assert generator.shape.dequantized
    latents, _ = LatentSource(config.generator, config.seed, class_counts=None).draw("sample grid", torch.arange(4))
    picture = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000001.png")).astype(int)
    made = generator(latents)
    expected, other = (
        np.asarray(grid(from_network(shape, made))).reshape(picture.shape) for shape in (DEQUANTIZED, PLAIN)
    )
    # Kernels may add up differently, which moves few pixels by a level.
    assert (picture != expected).mean() < 0.1 * (picture != other).mean()
    found = find_checkpoint(tmp_path / "run")
    description = load_description(found)
    view = View(found, description, parse_config(description.config))
    [reals] = read_reals(config.data, index, [torch.arange(5)])
    shown, _ = view.inputs(reals)
    assert len(shown) == 16
    assert torch.equal(from_network(DEQUANTIZED, shown)[:5], reals.samples)
    assert len((shown[:5] * 128).frac().unique()) > shown[:5].numel() / 2
    [again] = read_reals(config.data, index, [torch.tensor([3])])
    assert torch.equal(view.inputs(again)[0][0], shown[3]), "whatever batch an image is in"
