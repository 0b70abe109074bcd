"""Latents as data: what is read and measured, the draws from their posteriors, mirrored sets, and hostile files."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distgan import randomness
from distgan.config import Config, DataConfig
from distgan.data.index.build import index_shards
from distgan.data.index.rebuild import write_index
from distgan.data.index.table import Index
from distgan.data.kinds import latents, npy_file, posterior
from distgan.data.order import make_order
from distgan.data.reader import read_samples
from distgan.data.stream import open_rank_stream
from distgan.errors import UnreadableSampleError, UserError
from distgan.inference.generation import from_network, picture_of, to_network
from distgan.networks.shape import SampleShape
from distgan.training.state import run_shape
from tests.latents import CHANNELS, SIDE, latent_shards, moments
from tests.shards import numbered_png, write_tar

DATA = {"kind": "latents", "path": "unused", "channels": CHANNELS, "resolution": SIDE, "num_workers": 0}


def read(index: Index, **data: object) -> np.ndarray:
    batch = read_samples(DataConfig(**(DATA | data)), index, range(len(index)))
    assert batch.failures == []
    return batch.data.numpy()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("extension", ["moments.npy", "latent.npy"])
def test_what_is_stored_is_read(tmp_path: Path, dtype: type, extension: str) -> None:
    arrays = [one.astype(dtype) for one in moments(10)]
    index = latent_shards(tmp_path, arrays, extension=extension, classes=3)
    assert (index.kind, len(index.shards), index.labels.tolist()) == ("latents", 2, [i % 3 for i in range(10)])
    channels = CHANNELS if extension == "moments.npy" else 2 * CHANNELS
    assert index.latents is not None
    assert (index.latents.channels, index.latents.resolution, index.latents.flipped) == (channels, SIDE, False)
    np.testing.assert_array_equal(read(index, channels=channels), np.stack(arrays).astype(np.float32))


def test_shift_and_scale_are_those_of_draws(tmp_path: Path) -> None:
    """The variance of a draw is that of the means plus the mean of the variances (law of total variance)."""
    arrays = moments(20)
    index = latent_shards(tmp_path, arrays)
    assert index.latents is not None
    means, variances = np.split(np.stack(arrays).astype(np.float64), 2, axis=1)
    np.testing.assert_allclose(index.latents.shift, means.mean((0, 2, 3)), rtol=1e-9)
    expected = means.var((0, 2, 3)) + np.exp(variances).mean((0, 2, 3))
    np.testing.assert_allclose(index.latents.scale, expected**-0.5, rtol=1e-9)


def test_given_shift_and_scale(tmp_path: Path) -> None:
    index = latent_shards(tmp_path, moments(4), shift=[0.0], scale=[0.18215, 0.5])
    assert index.latents is not None
    assert (index.latents.shift, index.latents.scale) == ((0.0, 0.0), (0.18215, 0.5))
    again = write_index(str(tmp_path))
    assert again.index.latents == index.latents
    assert any("kept the shift and scale" in note for note in again.notes)
    assert write_index(str(tmp_path), shift=[1.0], scale=[2.0]).index.latents != index.latents
    for numbers, said in (([1.0] * 3, "found 3 numbers, expected 1, or 1 for each of 2"), ([0.0], "above 0")):
        with pytest.raises(UserError, match=said):
            index_shards(str(tmp_path), scale=numbers)


def test_plain_arrays_are_latents_where_told(tmp_path: Path) -> None:
    index = latent_shards(tmp_path, moments(4), extension="npy", latents="moments")
    assert index.latents is not None
    assert index.latents.moments
    np.testing.assert_array_equal(read(index), np.stack(moments(4)))


def test_images_beside_latents_are_not_samples(tmp_path: Path) -> None:
    (one,) = moments(1)
    write_tar(tmp_path / "a.tar", {"0.moments.npy": npy_file.to_bytes(one), "0.png": numbered_png(1), "0.cls": b"0"})
    built = index_shards(str(tmp_path))
    assert (built.index.kind, len(built.index)) == ("latents", 1)
    assert any(".png" in note for note in built.notes)


def test_what_was_decoded_in_inference_mode_has_gradients_later() -> None:
    """Constants that one call makes and another one uses would be of the first one's mode."""
    shift, scale = [0.5, -1.0], [2.0, 4.0]
    with torch.inference_mode():
        posterior.denormalize(torch.zeros(1, CHANNELS, 2, 2), shift, scale)
    samples = torch.ones(1, CHANNELS, 2, 2, requires_grad=True)
    found = posterior.denormalize(samples, shift, scale)
    assert found[0, :, 0, 0].tolist() == [1.0, -0.75]
    found.sum().backward()
    assert samples.grad is not None
    assert samples.grad[0, :, 0, 0].tolist() == [0.5, 0.25]


def test_draws_have_the_posterior_of_their_moments() -> None:
    """Mean and variance over many positions, to five standard errors (of a variance: sqrt(2/n) of itself)."""
    (one,) = moments(1)
    count = 20_000
    shape = SampleShape("latents", SIDE, CHANNELS, shift=(1.0, -3.0), scale=(0.5, 2.0))
    values = torch.from_numpy(one).expand(count, -1, -1, -1)
    drawn = to_network(shape, values, 3, torch.arange(count)).double()
    scale = np.array(shape.scale)[:, None, None]
    mean = (one[:CHANNELS] - np.array(shape.shift)[:, None, None]) * scale
    deviation = np.exp(0.5 * one[CHANNELS:]) * scale
    assert (abs(drawn.mean(0).numpy() - mean) < 5 * deviation / count**0.5).all()
    np.testing.assert_allclose(drawn.var(0).numpy(), deviation**2, rtol=5 * (2 / count) ** 0.5)
    back = drawn.numpy() / scale + np.array(shape.shift)[:, None, None]
    np.testing.assert_allclose(from_network(shape, drawn).numpy(), back, atol=1e-5)


@settings(max_examples=20)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_draw_is_a_function_of_seed_and_position(seed: int, position: int) -> None:
    values = torch.from_numpy(np.stack(moments(3)))
    shape = SampleShape("latents", SIDE, CHANNELS, shift=(0.0, 0.0), scale=(1.0, 1.0))
    places = torch.tensor([position, position + 1, position])
    together = to_network(shape, values, seed, places)
    alone = to_network(shape, values[1:2], seed, places[1:2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(to_network(shape, values[:1], seed, places[1:2]), together[:1])


def test_latents_without_moments_are_not_drawn() -> None:
    values = torch.from_numpy(np.stack(moments(2)))[:, :CHANNELS]
    shape = SampleShape("latents", SIDE, CHANNELS, shift=(1.0, 0.0), scale=(2.0, 1.0))
    expected = (values - torch.tensor([1.0, 0.0])[:, None, None]) * torch.tensor([2.0, 1.0])[:, None, None]
    assert torch.equal(to_network(shape, values), expected)


def test_variances_do_not_overflow() -> None:
    values = torch.full((1, 2 * CHANNELS, SIDE, SIDE), 3e4)
    shape = SampleShape("latents", SIDE, CHANNELS, shift=(0.0, 0.0), scale=(1.0, 1.0))
    assert to_network(shape, values, 0, torch.zeros(1, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("workers", [0, 1])
def test_mirrored_latents_are_those_of_the_second_set(tmp_path: Path, workers: int) -> None:
    arrays = moments(20, flips=True)
    index = latent_shards(tmp_path, arrays)
    config = DataConfig(**DATA | {"mirror": True, "num_workers": workers})
    order, whole = make_order(config, 5, index), np.stack(arrays)
    for rank in (0, 1)[: 2 - workers]:
        stream = open_rank_stream(config, 5, index, start=3, micro_batch=8, rank=rank, world_size=2)
        for _ in range(6):
            batch = next(stream)
            coins = randomness.uniform(5, "data/mirror", batch.positions) < 0.5
            samples = order.samples(batch.positions.numpy())
            assert len(coins) == 4
            np.testing.assert_array_equal(batch.data.numpy(), whole[samples, coins.long().numpy()])
        stream.close()


def test_latents_are_not_mirrored_by_themselves(tmp_path: Path) -> None:
    index = latent_shards(tmp_path, moments(3))
    with pytest.raises(UserError, match=r"data\.mirror = true: .* encode them with --flips"):
        read(index, mirror=True)


@pytest.mark.parametrize(("key", "value"), [("channels", 4), ("resolution", 16)])
def test_sizes_are_those_of_the_shards(tmp_path: Path, key: str, value: int) -> None:
    index = latent_shards(tmp_path, moments(3))
    right = DATA[key]
    with pytest.raises(UserError, match=rf"data\.{key} = {value}: .* set data\.{key}={right}"):
        read(index, **{key: value})


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


def _file(header: str, body: bytes = b"") -> bytes:
    encoded = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + body


def _objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([_Evil()], dtype=object), allow_pickle=True)
    return file.getvalue()


_OK = "{'descr': '<f4', 'fortran_order': %s, 'shape': %s, }"
HOSTILE = {
    "pickle": (_objects(), "expected <f2 or <f4"),
    "bare pickle": (pickle.dumps(_Evil()), "NumPy's format"),
    "empty": (b"", "NumPy's format"),
    "long header": (_file("{" + "(" * 60_000), "NumPy's format"),
    "huge": (_file(_OK % (False, (2**40, 2**20, 2**20))), "wrong size"),
    "negative": (_file(_OK % (False, (-4, -8, 8)), bytes(4 * 4 * 8 * 8)), "wrong size"),
    "Fortran order": (_file(_OK % (True, (4, 8, 8)), bytes(4 * 4 * 8 * 8)), "Fortran"),
    "too short": (npy_file.to_bytes(moments(1)[0])[:-1], "wrong size"),
    "too long": (npy_file.to_bytes(moments(1)[0]) + b"\0", "wrong size"),
    "double": (npy_file.to_bytes(np.zeros((4, 8, 8))), "found <f8"),
    "not finite": (npy_file.to_bytes(np.full((4, 8, 8), np.nan, np.float32)), "not finite"),
    "odd channels": (npy_file.to_bytes(np.zeros((3, 8, 8), np.float32)), "wrong array"),
    "not square": (npy_file.to_bytes(np.zeros((4, 8, 4), np.float32)), "wrong array"),
    "three sets": (npy_file.to_bytes(np.zeros((3, 4, 8, 8), np.float32)), "wrong array"),
    "no axis": (npy_file.to_bytes(np.zeros((), np.float32)), "wrong array"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_unreadable(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, said = HOSTILE[name]
    with pytest.raises(UnreadableSampleError, match=said):
        latents.read(data, "moments.npy")
    assert "unpickled" not in capsys.readouterr().out


def test_unreadable_latents_are_noted_and_replaced(tmp_path: Path) -> None:
    arrays: list[np.ndarray | bytes] = [*moments(9)]
    arrays[2], arrays[5] = HOSTILE["pickle"][0], np.zeros((8, 4, 4), np.float32)
    index = latent_shards(tmp_path, arrays)
    notes = " ".join(index_shards(str(tmp_path)).notes)
    assert "1 latents cannot be read" in notes
    assert f"1 latents have another shape than {(4, 8, 8)}" in notes
    batch = read_samples(DataConfig(**DATA), index, range(9))
    assert {failure.sample for failure in batch.failures} == {2, 5}
    good = {i: one for i, one in enumerate(arrays) if i not in (2, 5)}
    for value, sample in zip(batch.data.numpy(), batch.indices.tolist(), strict=True):
        np.testing.assert_array_equal(value, good[sample])


def test_a_constant_channel_has_no_scale(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.latent.npy": npy_file.to_bytes(np.ones((2, 8, 8), np.float32))})
    with pytest.raises(UserError, match=r"channel 0 has the same value everywhere.*--scale"):
        index_shards(str(tmp_path))
    assert index_shards(str(tmp_path), scale=[1.0]).index.latents is not None


CONFIG = {
    "run_dir": "r",
    "data": DATA,
    "generator": {"architecture": "r3gan"},
    "discriminator": {"architecture": "r3gan"},
    "training": {"steps": 1, "batch_size": 8},
}


def test_networks_and_metrics_that_are_not_for_latents() -> None:
    assert Config(**CONFIG).metrics == []
    for changes, said in (
        ({"generator": {}}, "generator.architecture: dcgan does not make latents"),
        ({"evaluation": {"metrics": ["fid"]}}, "of images, but data.kind is latents"),
        ({"evaluation": {"every": 5}}, "latents .* have none by default"),
        ({"data": DATA | {"resolution": 12}}, "12 is not a power of two"),
        ({"data": DATA | {"dequantize": True}}, "dequantize"),
    ):
        with pytest.raises(UserError, match=said):
            Config(**(CONFIG | changes))


def test_a_picture_shows_deviations_from_the_mean() -> None:
    shape = SampleShape("latents", 4, 4, shift=(1.0, 0.0, 0.0, 9.0), scale=(2.0, 1.0, 1.0, 1.0))
    samples = torch.zeros(1, 4, 4, 4)
    samples[:, 0], samples[:, 1], samples[:, 2] = 1.0, 3.0, -30.0
    picture = picture_of(shape, samples)
    assert picture.shape == (3, 4, 4)
    assert picture[:, 0, 0].tolist() == [128, 255, 0]


def test_the_shape_of_a_run_has_the_shift_and_scale_of_its_index(tmp_path: Path) -> None:
    index = latent_shards(tmp_path, moments(3), classes=3, scale=[2.0])
    shape = run_shape(Config(**CONFIG | {"data": DATA | {"labels": True}}), index)
    assert (shape.sizes, shape.num_classes, shape.scale) == ((CHANNELS, SIDE, SIDE), 3, (2.0, 2.0))
