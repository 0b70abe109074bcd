"""Write the latents of image shards, one shard of latents for each shard of images, on any number of ranks.

A shard appears by a rename when it is complete, and the index, last, when all are. An encode that was killed goes on
with the shards that are missing. Each image is encoded in a batch of the same shape wherever it is encoded, so that the
shards do not depend on kills or on the number of ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distgan.autoencoders.decoding import IMAGES
from distgan.autoencoders.loading import Autoencoder, load_autoencoder
from distgan.config import AutoencoderConfig, DataConfig
from distgan.data.index.build import index_shards
from distgan.data.index.loading import load_index
from distgan.data.index.saving import save_index
from distgan.data.index.table import Index
from distgan.data.kinds import npy_file
from distgan.data.kinds.latents import LATENT, MOMENTS, StoredLatents
from distgan.data.packing.tar_writer import ShardSize, ShardWriter
from distgan.data.reader import Reader
from distgan.data.storage.locations import local_path
from distgan.distributed.runtime import Runtime
from distgan.errors import UserError, counted, within_memory
from distgan.evaluation.precision import ieee_float32
from distgan.evaluation.samples import pad_batch
from distgan.extensions import code_digest_of
from distgan.files import locked, read_bounded, sync_folder, write_atomically, writing

PLAN = "encode.json"
"""File with the settings that all shards of a folder are encoded with."""
_TEMPORARY = ".encode-"
_MAX_PLAN = 1 << 20
_MINUTES = 24 * 60.0
"""How long ranks wait for the slowest one."""


@dataclass(frozen=True)
class Encoded:
    """Result of an encode."""

    index: Index
    stored: StoredLatents
    notes: tuple[str, ...]


def encode(
    shards: str | Sequence[str],
    dest: str | os.PathLike[str],
    encoder: AutoencoderConfig,
    *,
    resolution: int,
    channels: int = 3,
    flips: bool = False,
    float16: bool = False,
    images: bool = False,
    batch_size: int = 32,
    shift: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Encoded:
    """Encode image shards into shards of latents with their index in the folder `dest`.

    Collective: call on every rank. Labels and class names are kept. The key of a sample is its number in `shards`.

    Args:
        resolution, channels: of the images, as in `data.resolution` and `data.channels`.
        flips: store the latents of the mirror images too.
        float16: store half precision.
        images: store the files of the images beside their latents, with an index of their own (`IMAGES`).
        batch_size: images per forward pass.
        shift, scale: see `index_shards`.
        progress: called on rank 0 with the numbers of finished shards of its own and of all its shards.

    Raises:
        UserError: the shards hold no images, more than 1 % of them cannot be read, the encoder fails, or `dest` holds
            something else.
    """
    if not 4 <= resolution <= 2**16 or not 1 <= batch_size <= 2**17:
        raise UserError(
            f"--resolution {resolution} --batch-size {batch_size}: expected 4 to {2**16} pixels, 1 to {2**17} images",
            everywhere=True,
        )
    folder = local_path(dest, "DEST")
    runtime = Runtime()
    runtime.set_timeout(_MINUTES)
    with ExitStack() as stack:
        with runtime.raise_on_all_ranks():
            index = load_index(shards)
            if index.kind != "images":
                raise UserError(f"{shards}: found {index.kind}, expected shards of images")
            autoencoder = load_autoencoder(encoder).to(runtime.device)
            data = DataConfig(path=list(shards) if not isinstance(shards, str) else shards, resolution=resolution,
                              channels=channels, num_workers=0)  # fmt: skip
            plan = {
                "format": "distgan encode", "version": 1, "images": index.fingerprint, "encoder": autoencoder.hash,
                "resolution": resolution, "channels": channels, "flips": flips, "float16": float16,
                "with images": images, "batch_size": batch_size, **_code_of(encoder),
            }  # fmt: skip
            if runtime.is_main:
                stack.enter_context(_prepared(folder, plan))
        runtime.check_equal("the encoder", autoencoder.hash, "give every rank the same weights")
        mine = range(runtime.rank, len(index.shards), runtime.world_size)
        dtype = np.float16 if float16 else np.float32
        writer = _Writer(
            folder, index, data, autoencoder, batch_size, dtype, runtime.device, flips=flips, images=images
        )
        memory = within_memory(f"--batch-size {batch_size}", "lower it")
        with runtime.raise_on_all_ranks(), torch.no_grad(), ieee_float32(), memory, closing(writer):
            for done, shard in enumerate(mine, 1):
                if not writer.path(shard).exists():
                    writer.write(shard)
                if progress is not None and runtime.is_main:
                    progress(done, len(mine))
        with runtime.raise_on_all_ranks():
            written = _write_index(folder, index, images, shift, scale) if runtime.is_main else None
        found: tuple[StoredLatents, tuple[str, ...]] = runtime.broadcast_object(written)
        with runtime.raise_on_all_ranks():
            return Encoded(load_index(os.fspath(folder)), *found)


class _Writer:
    """Encodes the images of one shard after another."""

    def __init__(
        self, folder: Path, index: Index, data: DataConfig, autoencoder: Autoencoder, batch_size: int, dtype: Any,
        device: torch.device, *, flips: bool, images: bool,
    ) -> None:  # fmt: skip
        self._folder, self._index, self._autoencoder = folder, index, autoencoder
        self._batch_size, self._flips, self._dtype = batch_size, flips, dtype
        self._reader = Reader(data, index, seed=0)
        self._device, self._images = device, images

    def close(self) -> None:
        self._reader.close()

    def path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:06d}.tar"

    def write(self, shard: int) -> None:
        """Write the latents of a shard's readable images."""
        temporary = self._folder / f"{_TEMPORARY}{os.getpid()}-{shard}"
        with writing(self._folder, "the latents"):
            temporary.mkdir()
            try:
                with ShardWriter(temporary, ShardSize(samples=2**62)) as tar:
                    for sample, label, array in self._samples(shard):
                        extension = MOMENTS if self._autoencoder.moments else LATENT
                        members = {extension: npy_file.to_bytes(array)}
                        if label >= 0:
                            members["cls"] = str(label).encode()
                        if self._images:
                            content, image_extension = self._reader.read_file(sample)
                            members[image_extension] = content
                        tar.add(f"{sample:09d}", members)
                if not tar.paths:
                    raise UserError(f"{self._index.shard_name(shard)}: none of its images can be read; leave it out")
                os.replace(tar.paths[0], self.path(shard))
                sync_folder(self._folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _samples(self, shard: int) -> Iterator[tuple[int, int, NDArray[Any]]]:
        first, end = self._index.shard_starts[shard : shard + 2].tolist()
        for start in range(first, end, self._batch_size):
            batch = self._reader.read_batch(np.arange(start, min(end, start + self._batch_size)))
            arrays = self._encode(batch.data)
            for place, sample in enumerate(batch.positions.tolist()):
                if batch.indices[place] == sample:  # otherwise it cannot be read, and was replaced
                    yield sample, int(batch.labels[place]), arrays[place]

    def _encode(self, pixels: Tensor) -> NDArray[Any]:
        images = pad_batch(pixels, self._batch_size).to(self._device).float() / 127.5 - 1.0
        sets = [self._autoencoder.encode(images)]
        if self._flips:
            sets.append(self._autoencoder.encode(images.flip(-1)))
        wide = torch.stack(sets, dim=1) if self._flips else sets[0]
        with np.errstate(over="ignore"):
            arrays = wide[: len(pixels)].cpu().numpy().astype(self._dtype)
        if not np.isfinite(arrays).all():
            raise UserError("--half: the latents have numbers that float16 does not hold; leave it out")
        return arrays


def _code_of(encoder: AutoencoderConfig) -> dict[str, Any]:
    """Return what the moments depend on beside the weights: options and code of the user's encoder."""
    if encoder.is_built_in:
        return {}
    return {"options": encoder.model_dump(mode="json"), "code": code_digest_of(encoder.path)}


def _prepared(folder: Path, plan: dict[str, Any]) -> ExitStack:
    """Make the folder ready for these settings, and hold its lock until the stack is closed.

    Raises:
        UserError: it holds something else or latents of other settings, or another encode is writing there.
    """
    with writing(folder, "the latents"), ExitStack() as stack:
        folder.mkdir(parents=True, exist_ok=True)
        if not stack.enter_context(locked(folder / f"{_TEMPORARY}lock")):
            raise UserError(f"{folder}: another encode is writing there; wait for it, or name another folder")
        names = {path.name for path in folder.iterdir()} - {f"{_TEMPORARY}lock"}
        killed = {name for name in names if name.startswith((_TEMPORARY, f".{PLAN}."))}
        if PLAN in names:
            _check_plan(folder, plan)
        elif names - killed:
            raise UserError(f"{folder}: the folder is not empty, and encode did not write it; name another folder")
        for path in (folder / name for name in killed):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomically(folder / PLAN, json.dumps(plan, indent=1).encode())
        return stack.pop_all()


def _check_plan(folder: Path, plan: dict[str, Any]) -> None:
    try:
        earlier = json.loads(read_bounded(folder / PLAN, _MAX_PLAN))
    except (ValueError, RecursionError):
        earlier = None
    earlier = earlier if isinstance(earlier, dict) else {}
    for key, value in plan.items():
        if earlier.get(key) != value:
            raise UserError(
                f"{folder}: holds latents of other settings: {key}: found {str(earlier.get(key))[:80]}, now "
                f"{str(value)[:80]}; go on with those, or name another folder"
            )


def _write_index(
    folder: Path, index: Index, images: bool, shift: Sequence[float] | None, scale: Sequence[float] | None
) -> tuple[StoredLatents, tuple[str, ...]]:
    """Index the finished shards. Raises UserError if too many images were not readable."""
    built = index_shards(os.fspath(folder), class_names=index.class_names, shift=shift, scale=scale)
    unreadable, notes = len(index) - len(built.index), list(built.notes)
    if unreadable > 0.01 * len(index):
        raise UserError(
            f"{index.folder}: {unreadable} of {len(index)} images cannot be read; repair or pack them again, and "
            "encode into another folder"
        )
    if unreadable:
        notes.append(f"left out: {counted(unreadable, 'image')} that cannot be read")
    if images:
        own = index_shards(os.fspath(folder), class_names=index.class_names, kind="images")
        save_index(own.index, folder / IMAGES)
        notes = [note for note in notes if not note.startswith("skipped ")]  # the images
    save_index(built.index, folder)
    assert built.index.latents is not None
    return built.index.latents, tuple(notes)
