"""Shards of 16-bit scans with captions, and reading them with stages."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from distgan.config import DataConfig
from distgan.data.index.table import Index
from distgan.data.reader import Batch
from distgan.data.stream import open_rank_stream
from tests.shards import build_index

SEED = 3
SIDE = 8


def scan(number: int) -> np.ndarray:
    """A 16-bit picture of one level that spells the number."""
    return np.full((SIDE, SIDE), 1000 + 900 * number, np.uint16)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def developed(number: int, gamma: float) -> int:
    """What `lab.data:stages` makes of a scan: every third one is a negative."""
    light = (1000 + 900 * number) / 65535
    return round(255 * ((1 - light) if number % 3 == 0 else light) ** gamma)


def write_scans(folder: Path, count: int = 40, without_caption: int | None = None) -> Index:
    folder.mkdir(parents=True, exist_ok=True)
    with wds.ShardWriter(str(folder / "%03d.tar"), maxcount=15, verbose=0) as writer:
        for number in range(count):
            caption = {} if number == without_caption else {"txt": "a negative" if number % 3 == 0 else "a scan"}
            writer.write({"__key__": f"{number:04d}", "png": png(scan(number)), "cls": number % 5, **caption})
    return build_index(str(folder))


def settings(stages: Any, **changes: Any) -> DataConfig:
    given = {"path": "unused", "resolution": SIDE, "channels": 1, "num_workers": 0, "stages": stages}
    return DataConfig.model_validate(given | changes)


def batches(count: int, index: Index, config: DataConfig, start: int = 0, **options: Any) -> list[Batch]:
    stream = open_rank_stream(config, SEED, index, start=start, micro_batch=12, **options)
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()
