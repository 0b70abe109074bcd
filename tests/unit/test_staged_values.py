"""Data stages: which values they may make, and which stages break the contract."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from distgan.data.reader import read_samples
from tests.shards import build_index, numbered_png, numbers_of, refusal, write_tar
from tests.stages import SIDE, batches, png, settings

HERE = __name__


def decoded() -> list[Any]:
    return [wds.decode("rgb8"), wds.to_tuple("png")]


def tensors() -> list[Any]:
    return [wds.decode("torchrgb8"), wds.map(lambda sample: sample["png"])]


def pictures() -> list[Any]:
    return [wds.decode("pil"), wds.map(lambda sample: sample["png"])]


@pytest.mark.parametrize("stages", ["decoded", "tensors", "pictures"])
def test_images_come_in_the_forms_of_webdataset(tmp_path: Path, stages: str) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": numbered_png(300 + number) for number in range(9)})
    index = build_index(str(tmp_path))
    batch = read_samples(settings(f"{HERE}:{stages}", channels=3), index, range(9))
    assert numbers_of(batch.data.numpy()) == list(range(300, 309))


@pytest.mark.parametrize("kind", ["wide", "gray"])
def test_images_are_cropped_and_converted_as_those_of_shards(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 33, 3) if kind == "wide" else (11, 9), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", {"a.png": png(pixels)})
    index = build_index(str(tmp_path))
    staged = read_samples(settings(f"{HERE}:decoded", channels=3), index, [0]).data
    assert torch.equal(staged, read_samples(settings(None, channels=3), index, [0]).data)


def lazy() -> list[Any]:
    return [wds.map(lambda sample: Image.open(io.BytesIO(sample["png"])))]


def test_an_image_that_is_decoded_late_is_replaced_if_it_is_damaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = {f"{n}.png": png(rng.integers(0, 256, (64, 64, 3), np.uint8)) for n in range(6)}
    damaged = bytearray(members["2.png"])
    damaged[100:140] = b"\xaa" * 40
    members |= {"2.png": bytes(damaged), "4.png": members["4.png"][:500]}
    write_tar(tmp_path / "a.tar", members)
    index = build_index(str(tmp_path))
    config = settings(f"{HERE}:lazy", channels=3, max_failure_rate=1.0)
    started = time.monotonic()
    failures = read_samples(config, index, range(6)).failures
    assert time.monotonic() - started < 1  # a damaged image is no fault of the disk, whose reads are repeated
    assert [failure.sample for failure in failures] == [2, 4]
    assert all(f"{HERE}:lazy" in failure.reason for failure in failures)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[0] = 255
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(buffer, "PNG", exif=exif)
    write_tar(tmp_path / "a.tar", {"a.png": buffer.getvalue()})
    index = build_index(str(tmp_path))
    turned = read_samples(settings(f"{HERE}:lazy", channels=3), index, [0]).data
    assert turned[0, 0, -1].min() == 255
    assert torch.equal(turned, read_samples(settings(None, channels=3), index, [0]).data)


def shuffled() -> list[Any]:
    return [wds.shuffle(100, rng=random.Random(0)), *decoded()]


def batched() -> list[Any]:
    return [*decoded(), wds.batched(4)]


def unseeded() -> list[Any]:
    generator = np.random.default_rng()
    return [wds.map(lambda sample: generator.integers(0, 256, (SIDE, SIDE), dtype=np.uint8))]


def remembering() -> list[Any]:
    def stage(samples: Iterator[Any]) -> Iterator[Any]:
        for place, _ in enumerate(samples):
            yield np.full((SIDE, SIDE), place, np.uint8)

    return [stage]


def dicts() -> list[Any]:
    return [wds.decode("rgb8")]


def floats() -> list[Any]:
    return [wds.decode("rgb"), wds.to_tuple("png")]


def real_numbers() -> list[Any]:
    return [wds.map(lambda sample: Image.new("F", (SIDE, SIDE), 0.5))]


def nothing() -> list[Any]:
    return []


def a_stage() -> Any:
    return wds.decode("rgb8")


def refusing() -> list[Any]:
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        ("shuffled", ["another value of a sample alone", "shuffles"]),
        ("unseeded", ["another value of a sample alone", "default generators"]),
        ("remembering", ["another value of a sample alone", "remembers"]),
        ("batched", ["uint8 of shape (1, 8, 8, 3)"]),
        ("dicts", ["a dict of png", "wds.to_tuple"]),
        ("floats", ["a.tar:", "float32 of shape (8, 8, 3)", "uint8"]),
        ("real_numbers", ["a.tar:", "mode F", "L or RGB"]),
        ("nothing", ["expected a list of WebDataset stages"]),
        ("a_stage", ["expected a list of WebDataset stages"]),
        ("refusing", ["cannot be made", "ValueError: not today", "test_staged_values.py:"]),
    ],
)
def test_stages_that_break_the_contract_are_refused(tmp_path: Path, stages: str, parts: list[str]) -> None:
    write_tar(tmp_path / "a.tar", {f"{number}.png": numbered_png(number) for number in range(24)})
    index = build_index(str(tmp_path))
    said = refusal(lambda: batches(1, index, settings(f"{HERE}:{stages}")))
    assert all(part in said for part in [f"{HERE}:{stages}", *parts]), said


def halves() -> list[Any]:
    return [wds.decode(), wds.map(lambda sample: sample["npy"] / 2)]


def lower() -> list[Any]:
    return [wds.decode(), wds.map(lambda sample: sample["txt"].lower())]


lower.members = ("txt",)  # type: ignore[attr-defined]


def test_points_and_text(tmp_path: Path) -> None:
    points = np.arange(12, dtype=np.float32).reshape(6, 2)
    with wds.TarWriter(str(tmp_path / "points.tar")) as writer:
        for number, point in enumerate(points):
            writer.write({"__key__": str(number), "npy": point})
    config = settings(f"{HERE}:halves", kind="points", resolution=0, channels=3, dimensions=2)
    assert torch.equal(
        read_samples(config, build_index(str(tmp_path / "points.tar")), range(6)).data, torch.from_numpy(points / 2)
    )
    write_tar(tmp_path / "lines.tar", {"a.txt": b"ab", "b.txt": b"ABB"})
    index = build_index(str(tmp_path / "lines.tar"))
    config = settings(f"{HERE}:lower", kind="text", resolution=0, channels=3, length=4)
    assert index.vocabulary is not None
    a, b, pad = (index.vocabulary.index(one) for one in "ab`")
    assert read_samples(config, index, [0, 1]).data.tolist() == [[a, b, pad, pad], [a, b, b, pad]]
