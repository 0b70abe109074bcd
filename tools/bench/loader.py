"""Measure samples/s of distgan's stream, of a webdataset pipeline on the same shards, and of decoding alone.

Every pipeline yields batches of uint8 tensors and labels in the main process, in shuffled order.

- distgan: `open_rank_stream` with all checks, in a uniformly random order of all samples.
- distgan, stages: the same with `data.stages`, which decode with webdataset and simplejpeg.
- webdataset: shuffled shards, shuffle buffer of 1,000, its own decoder ("rgb8", which uses Pillow), batches stacked
  into one tensor.
- webdataset + simplejpeg: the same pipeline with distgan's JPEG decoder.
- Pillow alone, simplejpeg alone: one process decodes one image after another from memory.

Loaders stay open and take turns. Each turn first drains the batches that were loaded during the other turns. Speeds are
medians and quartiles over rounds. A ratio is the median of the ratios within a round. The shards are in a temporary
folder, so the page cache holds them.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image

from distgan.config import DataConfig
from distgan.data.index.loading import load_index
from distgan.data.packing.pack import pack
from distgan.data.stream import open_rank_stream

SHARDS = 8
MOSAIC = 4
"""Number of small images per side of a large image."""
REFILL_SECONDS = 1.0

Pixels = NDArray[np.uint8]
Batches = Iterator[Any]


@dataclass(frozen=True)
class Setting:
    """Shards with images of one size, and the parameters of their measurement."""

    name: str
    folder: Path
    resolution: int
    batch_size: int
    rounds: int
    seconds: float


def main() -> None:
    arguments = parse_arguments()
    rounds, seconds = (3, 1.0) if arguments.quick else (arguments.rounds, arguments.seconds)
    print(f"loader benchmark: {rounds} rounds of {seconds:g} s per loader", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="distgan-bench-") as scratch:
        small = write_small_set(Path(scratch), arguments.source, 4_000 if arguments.quick else 20_000)
        large = write_large_set(Path(scratch), small, 128 if arguments.quick else 512)
        settings = [
            Setting("32-pixel JPEG", small, 32, arguments.batch_size, rounds, seconds),
            Setting("512-pixel JPEG", large, 512, min(arguments.batch_size, 32), rounds, seconds),
        ]
        for setting in settings:
            print_table(setting, {workers: measure_loaders(setting, workers) for workers in arguments.workers})


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--source",
        metavar="ZIP_OR_FOLDER",
        help="32-pixel images to pack, such as CIFAR-10 as JPEGs (default: generated JPEGs with the spectrum of "
        "photographs); the 512-pixel images are mosaics of enlarged ones",
    )
    parser.add_argument(
        "--workers", metavar="N", type=int, nargs="+", default=[0, 1, 2], help="data loader workers (default: 0 1 2)"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=256,
        help="samples per batch at 32 pixels; at 512 pixels at most 32 (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=5, help="turns of each loader (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=3.0, help="length of a turn in seconds (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer images, 3 rounds of 1 s: one minute, not seven")
    return parser.parse_args()


# Images


def write_small_set(scratch: Path, source: str | None, count: int) -> Path:
    """Write shards of the 32-pixel images of `source`, or of `count` generated ones. Return their folder."""
    if source is None:
        source = str(scratch / "made-up.zip")
        generator = np.random.default_rng(0)
        with zipfile.ZipFile(source, "w") as archive:
            for number in range(count):
                archive.writestr(f"{number % 10}/{number:05d}.jpg", encode(natural_noise(generator, 32)))
    folder = scratch / "small"
    pack(source, folder, shard_size=count // SHARDS)
    return folder


def write_large_set(scratch: Path, small: Path, count: int) -> Path:
    """Write shards of 512-pixel mosaics of enlarged images, with a little camera noise. Return their folder."""
    images = first_images(small, count + MOSAIC**2)
    generator = np.random.default_rng(1)
    side = 512 // MOSAIC
    with zipfile.ZipFile(scratch / "mosaics.zip", "w") as archive:
        for number in range(count):
            mosaic = Image.new("RGB", (512, 512))
            for tile in range(MOSAIC**2):
                picture = Image.open(io.BytesIO(images[(number + tile) % len(images)])).convert("RGB")
                place = (tile % MOSAIC * side, tile // MOSAIC * side)
                mosaic.paste(picture.resize((side, side), Image.Resampling.BICUBIC), place)
            pixels = np.asarray(mosaic) + generator.normal(0, 3, (512, 512, 1))
            archive.writestr(f"{number % 10}/{number:05d}.jpg", encode(pixels))
    folder = scratch / "large"
    pack(scratch / "mosaics.zip", folder, shard_size=count // SHARDS)
    return folder


def natural_noise(generator: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Return an image with correlated channels, whose amplitude falls as 1/frequency (Field, JOSA A 4, 1987).

    Returns:
        float64, shape (side, side, 3), with values around 128 that may exceed [0, 255].
    """
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(generator.normal(size=(3, side, side))) / frequency
    shared, own = np.fft.irfft2(noise[:1], (side, side)), np.fft.irfft2(noise, (side, side))
    pixels = shared / shared.std() + 0.3 * own / own.std()
    return np.asarray(128 + 50 * pixels.transpose(1, 2, 0))


def encode(pixels: NDArray[Any]) -> bytes:
    image = np.ascontiguousarray(pixels.clip(0, 255).astype(np.uint8))
    return bytes(simplejpeg.encode_jpeg(image, 85, colorsubsampling="420"))


def first_images(folder: Path, count: int) -> list[bytes]:
    """Return the first `count` encoded images of the shards in a folder."""
    images: list[bytes] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and member.name.endswith(".jpg"):
                    images.append(file.read())
                if len(images) == count:
                    return images
    return images


# Loaders


def open_distgan(setting: Setting, workers: int, stack: ExitStack, **options: Any) -> Batches:
    values = {"path": str(setting.folder), "resolution": setting.resolution, "num_workers": workers, "labels": True}
    config = DataConfig.model_validate(values | options)
    stream = open_rank_stream(config, 0, load_index(config.path), start=0, micro_batch=setting.batch_size)
    stack.callback(stream.close)
    return ((batch.data, batch.labels) for batch in stream)


def open_webdataset(setting: Setting, workers: int, stack: ExitStack, codec: str) -> Batches:
    shards = sorted(str(path) for path in setting.folder.glob("*.tar"))
    pipeline = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).repeat().shuffle(1000)
    pipeline = pipeline.decode(codec) if codec == "rgb8" else pipeline.decode(decode_with_simplejpeg)
    pipeline = pipeline.to_tuple("jpg", "cls").batched(setting.batch_size, collation_fn=collate)
    return iter(webdataset.WebLoader(pipeline, num_workers=workers, batch_size=None))


def stages() -> list[Any]:
    return [webdataset.decode(decode_with_simplejpeg), webdataset.to_tuple("jpg")]


def decode_with_simplejpeg(key: str, data: bytes) -> Pixels | None:
    return simplejpeg.decode_jpeg(data) if key.endswith("jpg") else None


def collate(samples: list[tuple[Pixels, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples into tensors. This is faster than webdataset's collation, because tensors use shared memory."""
    return torch.from_numpy(np.stack([image for image, _ in samples])), torch.tensor([label for _, label in samples])


def decode_with_pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


# Measuring


def measure_loaders(setting: Setting, workers: int) -> dict[str, list[float]]:
    """Return the samples per second of each loader in each round."""
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        loaders: dict[str, Batches] = {
            "distgan": open_distgan(setting, workers, stack),
            "distgan, stages": open_distgan(setting, workers, stack, stages=stages),
            "webdataset": open_webdataset(setting, workers, stack, "rgb8"),
            "webdataset + simplejpeg": open_webdataset(setting, workers, stack, "simplejpeg"),
        }
        for batches in loaders.values():
            check(next(batches), setting)
        images = first_images(setting.folder, 1000)
        for number in range(setting.rounds):
            for name, batches in loaders.items():
                rates.setdefault(name, []).append(measure_batches(batches, setting, workers))
            if workers == 0:
                for name, decode in (
                    ("Pillow alone", decode_with_pillow),
                    ("simplejpeg alone", simplejpeg.decode_jpeg),
                ):
                    rates.setdefault(name, []).append(measure_decoding(decode, images, setting.seconds))
            print(f"{setting.name}, {workers} workers: round {number + 1} of {setting.rounds}", file=sys.stderr)
    return rates


def check(batch: tuple[torch.Tensor, torch.Tensor], setting: Setting) -> None:
    images, labels = batch
    assert images.dtype == torch.uint8
    assert images.numel() == setting.batch_size * 3 * setting.resolution**2
    assert labels.shape == (setting.batch_size,)


def measure_batches(batches: Batches, setting: Setting, workers: int) -> float:
    time.sleep(REFILL_SECONDS if workers else 0)  # wait until the workers of other loaders have filled their queues
    for _ in range(2 * workers + 1):
        next(batches)
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < setting.seconds:
        count += len(next(batches)[1])
    return count / elapsed


def measure_decoding(decode: Callable[[bytes], Pixels], images: list[bytes], seconds: float) -> float:
    count = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        decode(images[count % len(images)])
        count += 1
    return count / elapsed


def print_table(setting: Setting, measured: dict[int, dict[str, list[float]]]) -> None:
    print(f"\n{setting.name}, batches of {setting.batch_size}\n")
    print("| workers | loader | samples/s (quartiles) | speedup of distgan |")
    print("| ---: | --- | ---: | ---: |")
    for workers, rates in measured.items():
        for name, values in rates.items():
            ratios = [own / other for own, other in zip(rates["distgan"], values, strict=True)]
            ratio = "" if name == "distgan" else f"{statistics.median(ratios):.2f} x"
            print(f"| {workers} | {name} | {quartiles(values)} | {ratio} |")
    sys.stdout.flush()


def quartiles(values: list[float]) -> str:
    low, median, high = np.percentile(values, (25, 50, 75))
    return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"


if __name__ == "__main__":
    main()
