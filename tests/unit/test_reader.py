"""Reading samples: pixels against Pillow's, what is refused, what is tried again and what is replaced."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from distgan.config import DataConfig
from distgan.data import reader as reader_module
from distgan.data.index.table import KINDS, Index
from distgan.data.kinds.images import FORMATS, decode_into
from distgan.data.reader import Reader, read_samples, replacements
from distgan.data.replacements import Failure
from distgan.errors import UnreadableSampleError, UserError
from tests.shards import build_index, damage, numbered_index, numbered_png, numbers_of, write_tar


def config(resolution: int = 8, **changes: Any) -> DataConfig:
    return DataConfig(path="unused", resolution=resolution, **changes)


class Read(NamedTuple):
    numbers: list[int]
    samples: list[int]
    failures: list[Failure]


def read(index: Index, samples: list[int], *, seed: int = 0, **changes: Any) -> Read:
    """What a new reader makes of samples, with the numbers that the images spell."""
    reader = Reader(config(**changes), index, seed)
    out = np.zeros((len(samples), *reader.format.shape), reader.format.dtype)
    decoded = reader.read(np.array(samples), out)
    return Read(numbers_of(out.transpose(0, 3, 1, 2)), decoded.indices.tolist(), decoded.failures)


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes, extension: str, resolution: int, channels: int = 3, max_pixels: int = 10**6) -> np.ndarray:
    out = np.zeros((resolution, resolution, channels), np.uint8)
    decode_into(out, data, extension, max_pixels=max_pixels)
    return out


def photograph(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (max(1, height // 4), max(1, width // 4), 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def test_what_can_be_indexed_can_be_decoded_and_nothing_else() -> None:
    assert set(KINDS["images"]) == {"jpg", "jpeg", "png", "webp"}
    assert FORMATS == ("JPEG", "PNG", "WEBP")


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("JPEG", "jpeg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_are_pillows(kind: str, extension: str, mode: str) -> None:
    data = encode(photograph(32, 32, mode), kind)
    color = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    theirs = Image.open(io.BytesIO(data))
    theirs.draft("L", theirs.size)  # of a JPEG, its own luma plane
    gray = np.asarray(theirs.convert("L")).astype(int)
    tolerance = 1 if kind == "JPEG" else 0  # Pillow may bring another libjpeg
    assert np.abs(decode(data, extension, 32) - color).max() <= tolerance
    assert np.abs(decode(data, extension, 32, channels=1)[..., 0] - gray).max() <= tolerance


def test_unusual_modes() -> None:
    photo = photograph(16, 16)
    rgb = np.asarray(photo)
    transparent = photo.copy()
    transparent.putalpha(Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))))
    share = np.arange(16)[:, None] * 16 / 255
    composed = rgb * share + 255 * (1 - share)
    for data in (encode(transparent, "PNG"), encode(transparent, "WEBP", lossless=True, exact=True)):
        assert np.abs(decode(data, "png", 16) - composed).max() <= 1
    palette = photo.quantize(7)
    assert np.array_equal(decode(encode(palette, "PNG"), "png", 16), np.asarray(palette.convert("RGB")))
    hidden = np.where((np.asarray(palette) == 0)[..., None], 255, np.asarray(palette.convert("RGB")))
    assert np.array_equal(decode(encode(palette, "PNG", transparency=0), "png", 16), hidden)
    bits = Image.fromarray(rgb[..., 0]).convert("1")
    assert set(np.unique(decode(encode(bits, "PNG"), "png", 16, 1))) == {0, 255}
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert np.array_equal(decode(encode(Image.fromarray(deep), "PNG"), "png", 16, 1)[..., 0], deep >> 8)
    assert np.array_equal(decode(encode(Image.fromarray(deep), "PNG"), "png", 16)[..., 2], deep >> 8)
    cmyk = encode(photo.convert("CMYK"), "JPEG")
    assert np.array_equal(decode(cmyk, "jpg", 16), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    progressive = encode(photo, "JPEG", progressive=True, subsampling=2)
    assert np.array_equal(decode(progressive, "jpg", 16), np.asarray(Image.open(io.BytesIO(progressive))))


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize(("width", "height"), [(48, 32), (32, 48), (33, 32), (100, 60), (7, 9), (16, 16), (1, 50)])
def test_other_sizes_are_cropped_to_the_centre_and_resized(kind: str, width: int, height: int) -> None:
    data = encode(photograph(width, height), "JPEG" if kind == "jpg" else "PNG")
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = Image.open(io.BytesIO(data)).crop((left, top, left + side, top + side))
    resampling = Image.Resampling.LANCZOS if side > 32 else Image.Resampling.BICUBIC
    expected = np.asarray(square.resize((32, 32), resampling)).astype(int)
    assert np.abs(decode(data, kind, 32) - expected).max() <= (1 if kind == "jpg" else 0)


def test_shrinking_does_not_alias() -> None:
    """Columns of 0 and 255 in turn are gray at a quarter of the size; nearest or plain bilinear would give stripes."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (128, 64)))
    small = decode(encode(stripes, "PNG"), "png", 32, 1)[4:-4, 4:-4].astype(int)
    assert np.abs(small - 127).max() < 12


@pytest.mark.parametrize("extension", KINDS["images"])
def test_the_content_says_which_of_the_formats_it_is_and_nothing_else_is_read(extension: str) -> None:
    photo = photograph(8, 8)
    for kind in FORMATS:
        data = encode(photo, kind)
        assert np.abs(decode(data, extension, 8) - np.asarray(Image.open(io.BytesIO(data))).astype(int)).max() <= 1
    others = [encode(photo, kind) for kind in ("GIF", "TIFF", "BMP", "PPM", "ICO", "TGA")]
    for data in (*others, b"", b"\x80\x04\x95pickle", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBPVP8 ", b"\xff\xd8\xff"):
        with pytest.raises(UnreadableSampleError) as error:
            decode(data, extension, 8)
        assert str(error.value)
        assert "\n" not in str(error.value)
        assert " at 0x" not in str(error.value)


def test_reasons_are_printable(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("\x1b[2J.png", b"no image"), ("b.png", numbered_png(1))])
    (failure,) = read(build_index(str(tmp_path)), [0]).failures
    assert failure.reason.startswith("a.tar:?[2J: is not a JPEG, PNG or WebP image")


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_cut_images_are_refused(kind: str, extension: str) -> None:
    data = encode(photograph(32, 32), kind)
    for cut in (len(data) // 2, len(data) * 3 // 4, 30):
        with pytest.raises(UnreadableSampleError):
            decode(data[:cut], extension, 32)


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = bytearray(encode(photograph(8, 8), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("make", [png_that_claims, jpeg_that_claims])
def test_decompression_bombs_are_refused_by_their_header(make: Callable[[int, int], bytes]) -> None:
    extension = "png" if make is png_that_claims else "jpg"
    for width, height in ((2000, 501), (10_000, 8_000)):
        with pytest.raises(UnreadableSampleError, match=r"at most 1,000,000 \(data\.max_pixels\)"):
            decode(make(width, height), extension, 8)
    said = r"at most [\d,]+ \(data\.max_pixels\)" if extension == "jpg" else "decompression bomb"
    for most in (10**6, 2**40):  # simplejpeg counts in 32 bits; Pillow has a guard of its own
        with pytest.raises(UnreadableSampleError, match=said):
            decode(make(65500, 65500), extension, 8, max_pixels=most)


def test_a_jpeg_whose_header_says_another_size_writes_nothing_outside_the_buffer() -> None:
    guarded = np.full((24, 8, 8, 3), 99, np.uint8)
    for width, height in ((8, 9), (64, 64), (65500, 65500), (1, 1)):
        try:
            decode_into(guarded[12], jpeg_that_claims(width, height), "jpg", max_pixels=10**6)
        except UnreadableSampleError:
            continue
    assert (guarded[:12] == 99).all()
    assert (guarded[13:] == 99).all()


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return numbered_index(tmp_path, [10, 5, 20], classes=3)


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waits: list[float] = []
    monkeypatch.setattr(reader_module.time, "sleep", waits.append)
    return waits


def test_a_batch_holds_the_samples_asked_for(index: Index) -> None:
    samples = [34, 0, 9, 10, 14, 15, 9]
    batch = read_samples(config(), index, samples)
    assert batch.data.shape == (7, 3, 8, 8)
    assert batch.data.dtype == torch.uint8
    assert numbers_of(batch.data.numpy()) == samples
    assert batch.labels.tolist() == [sample % 3 for sample in samples]
    assert batch.indices.tolist() == batch.positions.tolist() == samples
    assert batch.failures == []
    assert read_samples(config(channels=1), index, torch.tensor([3])).data.shape == (1, 1, 8, 8)


def test_mirrored_samples_are_flipped_left_right(tmp_path: Path) -> None:
    photo = photograph(16, 16)
    index = build_index(str(write_tar(tmp_path / "a.tar", {"0.png": encode(photo, "PNG")})))
    out = np.zeros((2, 16, 16, 3), np.uint8)
    Reader(config(16), index, 0).read(np.array([0, 0]), out, np.array([True, False]))
    assert np.array_equal(out[1], np.array(photo))
    assert np.array_equal(out[0], np.array(photo)[:, ::-1])


def test_unlabelled_data_have_labels_of_minus_one(tmp_path: Path) -> None:
    assert read_samples(config(), numbered_index(tmp_path, [2]), [0, 1]).labels.tolist() == [-1, -1]


def test_an_unreadable_sample_is_replaced_by_one_that_a_hash_chooses(index: Index, slept: list[float]) -> None:
    first, second = replacements(5, 12, range(len(index)))[:2]
    damage(index, 12)
    one = read(index, [3, 12, 4], seed=5)
    assert one.samples == [3, first, 4] == one.numbers
    (failure,) = one.failures
    assert (failure.sample, failure.replacement) == (12, first)
    assert failure.reason.startswith("001.tar:0002: ")
    batch = read_samples(config(), index, [12])
    assert batch.labels.tolist() == [batch.indices[0] % 3]
    assert numbers_of(batch.data.numpy()) == batch.indices.tolist() == [replacements(0, 12, range(len(index)))[0]]

    damage(index, first)
    other = read(index, [12], seed=5)
    assert other.samples == [second] == other.numbers
    assert slept == []  # waiting does not mend what cannot be decoded


def test_a_failed_read_is_tried_again_with_backoff(
    index: Index, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, pread = [], os.pread

    def flaky(descriptor: int, length: int, offset: int) -> bytes:
        reads.append(offset)
        if len(reads) <= 3:
            raise OSError(5, "Input/output error")
        return pread(descriptor, length, offset)

    monkeypatch.setattr(reader_module.os, "pread", flaky)
    assert read(index, [7], retries=3) == ([7], [7], [])
    assert slept == [0.5, 1.0, 2.0]
    assert len(set(reads)) == 1


def test_a_lost_shard_is_waited_for_once(index: Index, slept: list[float]) -> None:
    os.unlink(index.shards[1].url)
    found = read(index, [10, 11, 12, 10], retries=2)
    assert slept == [0.5, 1.0]
    assert [failure.sample for failure in found.failures] == [10, 11, 12, 10]
    assert all(not 10 <= sample < 15 for sample in found.samples)
    assert found.samples[0] == found.samples[3]
    assert "No such file" in found.failures[0].reason


def test_nothing_readable_at_all(index: Index, slept: list[float]) -> None:
    for shard in index.shards:
        os.unlink(shard.url)
    with pytest.raises(UserError, match="32 other samples"):
        read(index, [10], retries=1)


def test_a_tar_that_changed_after_indexing(index: Index) -> None:
    shard, offset, _, _, _ = index.entry(3)
    with open(index.shards[shard].url, "r+b") as file:
        file.seek(offset - 512)
        file.write(b"renamed.png\0")
    found = read(index, [3, 4])
    assert "differs from its index" in found.failures[0].reason
    assert found.samples[1] == 4
    with open(index.shards[0].url, "r+b") as file:
        file.truncate(offset)
    assert "differs from its index" in read(index, [4]).failures[0].reason


def test_caps_on_bytes_and_pixels(tmp_path: Path) -> None:
    members = {f"{i}.png": numbered_png(i) for i in range(5)}
    flat = np.zeros((64, 64, 3), np.uint8)
    members["5.png"] = encode(Image.fromarray(flat), "PNG", compress_level=0)
    index = build_index(str(write_tar(tmp_path / "a.tar", members)))
    assert "data.max_bytes=1,000" in read(index, [5], max_bytes=1000).failures[0].reason
    assert "at most 4,095 (data.max_pixels)" in read(index, [5], max_pixels=4095).failures[0].reason
    assert read(index, [5], max_pixels=4096) == ([0], [5], [])


def test_few_files_stay_open(tmp_path: Path) -> None:
    index = numbered_index(tmp_path, [1] * 200)
    reader, out = Reader(config(), index, 0), np.zeros((200, 8, 8, 3), np.uint8)
    before = len(os.listdir("/proc/self/fd"))
    samples = np.random.default_rng(0).permutation(200)
    for order in (samples, samples[::-1].copy()):
        reader.read(order, out)
        assert numbers_of(out.transpose(0, 3, 1, 2)) == order.tolist()
        assert len(os.listdir("/proc/self/fd")) - before <= 128
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
