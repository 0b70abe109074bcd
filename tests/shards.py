"""Small WebDataset tars, written with Python's own tarfile, whose images tell which sample they are."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distgan.data.index.build import index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index, Shard
from distgan.data.storage.shard_cache import ShardCache
from distgan.errors import UserError


def numbered_png(number: int, side: int = 8) -> bytes:
    """A PNG of one color that spells the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers_of(images: np.ndarray) -> list[int]:
    """The numbers that images (n, 3, height, width) spell."""
    assert all(len(np.unique(image.reshape(3, -1), axis=1).T) == 1 for image in images)
    return [int(image[0, 0, 0]) + 256 * int(image[1, 0, 0]) for image in images]


def write_tar(
    path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_numbered(folder: Path, counts: Sequence[int], *, classes: int = 0, first: int = 0) -> Path:
    """One tar for each count, with samples numbered on from `first`; sample i has label i % classes."""
    number = first
    for shard, count in enumerate(counts):
        members: dict[str, bytes] = {}
        for i in range(count):
            members[f"{i:04d}.png"] = numbered_png(number)
            if classes:
                members[f"{i:04d}.cls"] = str(number % classes).encode()
            number += 1
        write_tar(folder / f"{shard:03d}.tar", members)
    return folder


def build_index(shards: str | Sequence[str], **options: Any) -> Index:
    """The index of shards, without notes."""
    return index_shards(shards, **options).index


def numbered_index(folder: Path, counts: Sequence[int], *, classes: int = 0) -> Index:
    """Shards as `write_numbered` makes them, with their index, loaded from its file."""
    write_numbered(folder, counts, classes=classes)
    save_index(build_index(str(folder)), folder)
    return load_index(str(folder))


def damage(index: Index, sample: int) -> None:
    """Overwrite a sample's data, not its header, in its shard."""
    shard, offset, size, _, _ = index.entry(sample)
    with open(index.shards[shard].url, "r+b") as file:
        file.seek(offset)
        file.write(b"\xaa" * size)


def read_whole_shards(folder: str, shards: tuple[Shard, ...], barrier: Any, results: Any) -> None:
    """What a process does to a cache that others use too; here, so that it starts without importing torch."""
    cache = ShardCache(Path(folder), 10**6)
    barrier.wait(60)
    sizes = []
    for shard in shards:
        descriptor = cache.open(shard)
        sizes.append(len(os.pread(descriptor, shard.size + 1, 0)))
        os.close(descriptor)
    results.put(sizes)


def refusal(action: Any, *arguments: Any) -> str:
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def entries(index: Index) -> list[tuple[int, int, int, int, str]]:
    """All entries of an index."""
    return [index.entry(sample) for sample in range(len(index))]


def held(index: Index) -> dict[str, bytes]:
    """Key and bytes of each sample, as they lie in the tars."""
    found = {}
    for sample in range(len(index)):
        shard, offset, size, *_ = index.entry(sample)
        content = Path(index.shards[shard].url).read_bytes()
        assert 0 < offset <= len(content) - size
        found[index.key(sample)] = content[offset : offset + size]
    return found


def one(folder: Path, name: str, key: str) -> bytes:
    """A tar of one image, as GNU tar writes it."""
    (folder / f"{key}.png").write_bytes(key.encode())
    path = folder / f"{name}.tar"
    subprocess.run(["tar", "-C", str(folder), "-cf", str(path), f"{key}.png"], check=True)
    return path.read_bytes()
