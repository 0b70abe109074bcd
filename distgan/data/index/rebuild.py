"""Indexing shards for good: what stands in the way of it is said before they are read, and no earlier index is lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from distgan.data.index.build import ReportProgress, index_shards
from distgan.data.index.file import index_path
from distgan.data.index.loading import read_listed
from distgan.data.index.saving import check_place, save_index
from distgan.data.index.table import Index
from distgan.data.storage import filesystem, locations, patterns
from distgan.errors import UserError


@dataclass(frozen=True)
class Written:
    """An index, the path that it was written to, and lines about what was done on the way."""

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
    progress: ReportProgress | None = None,
) -> Written:
    """Index shards (see `index_shards`) and write their index, in place of an earlier one of the same shards.

    Class names are kept from the earlier one.

    Args:
        where: a folder, or a path ending in .safetensors; None is the folder that all shards share.

    Raises:
        UserError: an index cannot be written there, or one that is there lists other shards too; or as `index_shards`
            says.
    """
    urls = patterns.expand(shards)
    destination = os.fspath(where) if where is not None else locations.common_folder(urls)
    if not destination or locations.is_http(destination):
        raise UserError(
            f"{locations.public_name(urls[0])}: an index cannot be written beside these shards; "
            "name a folder with --out"
        )
    path = index_path(destination)
    check_place(urls, path)
    class_names = _inherit(urls, path)
    built = index_shards(shards, verify=verify, strict=strict, last_dot=last_dot, progress=progress)
    index, notes = built.index, list(built.notes)
    if class_names and 0 < index.num_classes <= len(class_names):
        index = index.with_class_names(class_names)
        notes.append(f"the names of {len(class_names)} classes are kept from the index that was there")
    elif class_names:
        notes.append(
            f"the names of {len(class_names)} classes in the index that was there are dropped: "
            f"the shards now have {index.num_classes} classes"
        )
    return Written(index, save_index(index, path), tuple(notes))


def _inherit(urls: Sequence[str], path: str) -> list[str] | None:
    """The class names of the earlier index. Raises UserError if it lists more that is there than these shards."""
    earlier = read_listed(path)
    if earlier is None:
        return None
    indexed = {locations.without_query(url) for url in urls}  # the same shard may be named with another token
    others = [url for url in earlier.urls if locations.without_query(url) not in indexed]
    lost = next((url for url in others if filesystem.exists(url)), None)
    if lost is not None:
        raise UserError(
            f"{locations.public_name(path)}: lists {len(others):,} more shards than are being indexed, such as "
            f"{locations.public_name(lost)}; index all of them, or name another file with --out"
        )
    return earlier.class_names if len(others) < len(earlier.urls) else None
