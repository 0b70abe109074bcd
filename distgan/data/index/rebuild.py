"""Index shards and write the index. Problems are reported before the shards are read; no other index is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from distgan.data.index.build import ReportProgress, index_shards
from distgan.data.index.file import index_path
from distgan.data.index.loading import Listed, read_listed
from distgan.data.index.members import LatentMembers
from distgan.data.index.saving import check_place, save_index
from distgan.data.index.table import Index
from distgan.data.storage import filesystem, locations, patterns
from distgan.errors import UserError


@dataclass(frozen=True)
class Written:
    """A written index, its path, and notes for the user."""

    index: Index
    path: str
    notes: tuple[str, ...]


def write_index(
    shards: str | Sequence[str],
    where: str | os.PathLike[str] | None = None,
    *,
    verify: bool = False,
    strict: bool = False,
    last_dot: bool = False,
    extension: str | None = None,
    progress: ReportProgress | None = None,
    latents: LatentMembers | None = None,
    shift: Sequence[float] | None = None,
    scale: Sequence[float] | None = None,
) -> Written:
    """Index shards (see `index_shards`), write the index and return it.

    Replaces an earlier index of the same shards and keeps its class names, and its shift and scale of latents.

    Args:
        where: a folder, or a path ending in .safetensors; None is the folder that all shards share.

    Raises:
        UserError: the index cannot be written, or the earlier index also lists other shards that exist; or as in
            `index_shards`.
    """
    urls = patterns.expand(shards)
    destination = os.fspath(where) if where is not None else locations.common_folder(urls)
    if not destination or locations.is_http(destination):
        raise UserError(
            f"{locations.public_name(urls[0])}: cannot write an index beside these shards; name a folder with --out"
        )
    path = index_path(destination)
    check_place(urls, path)
    earlier = _earlier(urls, path)
    class_names = earlier.class_names if earlier else None
    kept = earlier.latents if earlier and shift is None and scale is None else None
    if kept is not None:
        shift, scale = kept.shift, kept.scale
    built = index_shards(
        shards, verify=verify, strict=strict, last_dot=last_dot, extension=extension, progress=progress,
        latents=latents, shift=shift, scale=scale,
    )  # fmt: skip
    index, notes = built.index, list(built.notes)
    if kept is not None:
        notes.append("kept the shift and scale of latents from the earlier index; give --shift and --scale to change")
    if class_names and 0 < index.num_classes <= len(class_names):
        index = index.with_class_names(class_names)
        notes.append(f"kept the names of {len(class_names)} classes from the earlier index")
    elif class_names:
        notes.append(
            f"dropped the names of {len(class_names)} classes in the earlier index: "
            f"the shards now have {index.num_classes} classes"
        )
    return Written(index, save_index(index, path), tuple(notes))


def _earlier(urls: Sequence[str], path: str) -> Listed | None:
    """Return what the earlier index of these shards says, or None without one.

    Raises UserError if it lists other shards that still exist.
    """
    earlier = read_listed(path)
    if earlier is None:
        return None
    indexed = {locations.without_query(url) for url in urls}  # a query may hold a token, which can change
    others = [url for url in earlier.urls if locations.without_query(url) not in indexed]
    lost = next((url for url in others if filesystem.exists(url)), None)
    if lost is not None:
        raise UserError(
            f"{locations.public_name(path)}: the earlier index lists {len(others):,} other shards, such as "
            f"{locations.public_name(lost)}; index all shards, or name another file with --out"
        )
    return earlier if len(others) < len(earlier.urls) else None
