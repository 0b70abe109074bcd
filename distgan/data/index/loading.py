"""Find, check and join the indexes of shards.

An index is untrusted input. Loading checks every bound before reading through it. An index may name only files in its
own folder, or URLs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distgan.config.data import DataPath, SourceConfig
from distgan.data.index.checks import find_problem
from distgan.data.index.file import INDEX_NAME, SUFFIX, read_file
from distgan.data.index.table import ARRAYS, EXTENSIONS, Index, Shard, concatenate, kind_of
from distgan.data.kinds.latents import StoredLatents
from distgan.data.mixture import whole_weights
from distgan.data.storage import filesystem, locations, patterns
from distgan.errors import UserError
from distgan.files import cache_folder, reason

_MAX_FILE_BYTES = 64 << 30


def load_index(path: DataPath | Sequence[str], cache: str | None = None) -> Index:
    """Load and check the index of the shards that `data.path` names.

    Args:
        path: a folder with an index, an index file, or shards beside an index (path, glob, brace expansion), local or
            URLs; or a list of these, which are joined in order; or a list of sources, which are mixed by weight.
        cache: folder for copies of remote indexes (`data.cache_dir`). None uses the node's default cache.

    Raises:
        UserError: the index is missing or damaged, or does not match the shards.
    """
    given = [path] if isinstance(path, str) else list(path)
    if not given:
        raise UserError("data.path: the list is empty; name a folder of shards")
    kept = cache_folder(cache) / "indexes"
    sources = [item for item in given if isinstance(item, SourceConfig)]
    if not sources:
        return _open(tuple(_locate(str(item), kept) for item in given), (), check=True)
    parts = []
    for number, source in enumerate(sources):
        if not source.path:
            raise UserError(f"data.path.{number}.path is empty; name a folder of shards")
        paths = [source.path] if isinstance(source.path, str) else source.path
        parts += [replace(_locate(item, kept), source=number) for item in paths]
    weights = whole_weights([source.weight for source in sources]) if len(sources) > 1 else ()
    return _open(tuple(parts), weights, check=True)


class Listed(NamedTuple):
    """Shard locations, class names and latents that an index file lists. The shards need not exist."""

    urls: list[str]
    class_names: list[str] | None
    latents: StoredLatents | None = None


def read_listed(path: str) -> Listed | None:
    """Return what an index file (see `index_path`) lists, or None if it is missing or damaged."""
    if not filesystem.exists(path):
        return None
    part = _part(path, locations.folder_of(path), cache_folder(None) / "indexes")
    try:
        table, _ = read_file(part.file, part.name)
        return Listed([_resolve(name, part) for name, *_ in table.shards], table.class_names, table.latents)
    except UserError:
        return None


@dataclass(frozen=True)
class _Part:
    """Shards of one index file: those in `urls`, or all if it is None. Messages show the file as `name`."""

    file: str
    name: str
    folder: str
    urls: tuple[str, ...] | None = None
    source: int = 0
    """Number of the source that the shards belong to."""


class _Opened(NamedTuple):
    """The contents of a part."""

    shards: list[Shard]
    arrays: dict[str, NDArray[Any]]
    class_names: list[str] | None
    vocabulary: list[str] | None
    left_out: list[str]
    latents: StoredLatents | None

    @property
    def kind(self) -> str:
        return kind_of(EXTENSIONS[self.arrays["extensions"][0]])

    @property
    def is_labeled(self) -> bool:
        return bool(self.arrays["labels"][0] >= 0)


def _locate(item: str, kept: Path) -> _Part:
    url = locations.normalize(item)
    if locations.without_query(url).endswith(SUFFIX):
        return _part(url, locations.folder_of(url), kept)
    if patterns.is_folder(item):
        return _part(locations.join(url, INDEX_NAME), url, kept)
    urls = patterns.expand(item)
    folder = locations.common_folder(urls)
    return _part(locations.join(folder, INDEX_NAME), folder, kept, tuple(urls))


def _part(file: str, folder: str, kept: Path, urls: tuple[str, ...] | None = None) -> _Part:
    name, build = locations.public_name(file), "build the index of the shards with `distgan index`"
    if not locations.is_remote(file):
        if not os.path.isfile(file):
            raise UserError(f"{name}: index not found: {_tars_beside(folder, build)}")
        return _Part(file, name, folder, urls)
    try:
        # Download it to the node because processes map it into memory.
        return _Part(filesystem.fetch(file, kept, _MAX_FILE_BYTES), name, folder, urls)
    except OSError as error:
        fix = f"; {build}" if getattr(error, "status", None) == 404 else ""
        raise UserError(f"{name}: cannot read the index: {reason(error)}{fix}") from None


def _tars_beside(folder: str, build: str) -> str:
    """Return what the folder of a missing index holds, with the fix."""
    if not os.path.isdir(folder):
        return f"its folder does not exist either; {build}"
    try:
        return f"found {len(patterns.expand(folder))} tars in its folder; {build}"
    except UserError:
        return f"found no tar in its folder either; {patterns.what_is_there(folder)}"


def _open(parts: tuple[_Part, ...], weights: tuple[int, ...], check: bool) -> Index:
    """Open and join all parts. `weights` are those of the sources, empty for one source."""
    opened = [_open_part(part, check) for part in parts]
    origin = (_reopen, (parts, weights))
    if len(opened) == 1:
        return Index(*opened[0], origin=origin)
    shards = [shard for part in opened for shard in part.shards]
    urls = {shard.url for shard in shards}
    if len(urls) < len(shards):
        raise UserError("data.path: a shard is named twice; name each shard once")
    first, firsts = opened[0], {part.source: number for number, part in reversed([*enumerate(parts)])}
    for part, other in zip(parts, opened, strict=True):
        same = opened[firsts[part.source]]
        if (other.is_labeled, other.class_names) != (same.is_labeled, same.class_names):
            raise UserError(
                f"{part.name}: labels or class names differ from those of {parts[firsts[part.source]].name}; "
                "label both alike, or train on one of them"
            )
        if other.kind != first.kind or other.vocabulary != first.vocabulary:
            raise UserError(
                f"{part.name}: the kind of samples ({other.kind}) or the vocabulary differs from that of "
                f"{parts[0].name} ({first.kind}); index text shards together with `distgan index`"
            )
        if other.latents != first.latents:
            raise UserError(
                f"{part.name}: the shape, shift or scale of its latents differs from that of {parts[0].name}; index "
                "the shards together with `distgan index`, or with the same --shift and --scale"
            )
    arrays, left_out = concatenate([part.arrays for part in opened]), [url for part in opened for url in part.left_out]
    sources = [[opened[i] for i, part in enumerate(parts) if part.source == source] for source in range(len(weights))]
    names = first.class_names
    if any(_classes(source) != _classes(sources[0]) for source in sources):
        # A number would mean another class in each. A conditional run is refused: it finds no labels.
        arrays["labels"][:], names = -1, None
    mixed = [(weight, sum(len(part.shards) for part in own)) for weight, own in zip(weights, sources, strict=True)]
    return Index(shards, arrays, names, first.vocabulary, left_out, first.latents, origin, mixed)


def _classes(source: list[_Opened]) -> tuple[int, list[str] | None]:
    """Return number and names of the classes of a source. The number is 0 without labels."""
    highest = max(int(part.arrays["labels"].max()) for part in source)
    return max(highest + 1, len(source[0].class_names or ())), source[0].class_names


def _reopen(
    given: tuple[tuple[_Part, ...], tuple[int, ...]],
    fingerprint: str,
    vocabulary: tuple[str, ...] | None,
    latents: StoredLatents | None,
) -> Index:
    """Open an index that another process opened before. Raises UserError if it has changed since."""
    parts, weights = given
    index = _open(parts, weights, check=False)
    if (index.fingerprint, index.vocabulary, index.latents) != (fingerprint, vocabulary, latents):
        names = " or ".join(part.name for part in parts)
        raise UserError(f"{names}: the index changed while it was in use; restore the old index, or start a new run")
    return index


def _open_part(part: _Part, check: bool) -> _Opened:
    table, arrays = read_file(part.file, part.name)
    shards = [
        Shard(_resolve(name, part), size, count, digest, sha256) for name, size, count, digest, sha256 in table.shards
    ]
    if check:
        problem = find_problem(shards, arrays, table.class_names, table.vocabulary, table.latents)
        if problem:
            raise UserError(f"{part.name}: damaged index: {problem}; build it again with `distgan index`")
    left_out = [_resolve(name, part) for name in table.left_out]
    if part.urls is not None and list(part.urls) != [shard.url for shard in shards]:
        shards, arrays = _select(part, shards, arrays, left_out)
    if check:
        for shard in shards:
            _check_shard(shard, part.name)
    return _Opened(shards, arrays, table.class_names, table.vocabulary, left_out, table.latents)


def _select(
    part: _Part, shards: list[Shard], arrays: dict[str, NDArray[Any]], left_out: Sequence[str]
) -> tuple[list[Shard], dict[str, NDArray[Any]]]:
    """Return the shards that were named, in that order, and their arrays."""
    number = {shard.url: i for i, shard in enumerate(shards)}
    missing = [url for url in part.urls or () if url not in number and url not in left_out]
    if missing:
        raise UserError(
            f"{locations.public_name(missing[0])}: not listed in {part.name}; run `distgan index` on all shards"
        )
    starts = np.cumsum([0, *(shard.count for shard in shards)])
    chosen = [number[url] for url in part.urls or () if url in number]
    if not chosen:
        raise UserError(
            f"{locations.public_name(next(iter(part.urls or ())))}: {part.name} lists this shard without samples; "
            "name another shard"
        )
    pieces = []
    for i in chosen:
        rows = slice(starts[i], starts[i + 1])
        first = int(arrays["key_ends"][rows.start - 1]) if rows.start else 0
        piece = {name: arrays[name][rows] for name in ARRAYS if name != "keys"}
        piece["key_ends"] = piece["key_ends"] - first
        pieces.append(piece | {"keys": arrays["keys"][first : first + int(piece["key_ends"][-1])]})
    return [shards[i] for i in chosen], concatenate(pieces)


def _check_shard(shard: Shard, file: str) -> None:
    if locations.is_remote(shard.url):
        return
    try:
        size = os.stat(shard.url).st_size
    except OSError as error:
        raise UserError(f"{shard.url}: listed in {file}, but {error.strerror}; run `distgan index` again") from None
    if size != shard.size:
        raise UserError(
            f"{shard.url}: the shard changed after indexing: found {size:,} bytes, expected {shard.size:,}; "
            "run `distgan index` again"
        )


def _resolve(name: str, part: _Part) -> str:
    if locations.is_remote(name) or name.lower().startswith("pipe:"):
        try:
            url = locations.normalize(name)
        except UserError as error:
            raise UserError(f"{part.name}: invalid shard in the index: {error}") from None
        if locations.is_remote(url) and locations.is_printable(name):
            return url
    elif not name.startswith("/") and not {"", ".", ".."} & set(name.split("/")) and name.isprintable():
        return locations.join(part.folder, name)
    raise UserError(
        f"{part.name}: invalid shard name: found {name!r}, expected a relative path inside the index's folder; "
        "run `distgan index` on the shards"
    )
