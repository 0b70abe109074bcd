"""Expand patterns of shards: folders, globs, and brace expansions of local paths and URLs.

Braces expand everywhere. In a local path, `*`, `?` and `[...]` are shell wildcards. In a URL, only `*` is a wildcard.
An existing file or folder with the literal name takes precedence over the pattern. HTTP servers are not checked for
literal names, because `{` and `*` in their URLs can be percent-encoded.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import braceexpand

from distgan.data.storage import filesystem
from distgan.data.storage.locations import (
    bucket_of,
    common_folder,
    is_http,
    is_remote,
    normalize,
    public_name,
    relative_name,
    without_query,
)
from distgan.errors import UserError
from distgan.files import reason

_MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?\}")


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Return the normalized locations of all shards that the patterns name, in the order given.

    The shards of a glob or folder are sorted by name. Raises UserError if a pattern matches nothing, or if a shard is
    named twice.
    """
    shards = [shard for pattern, literal in _each(patterns) for shard in _expand_one(pattern, literal)]
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"{public_name(shard)}: the shard is named twice; name each shard once")
        seen.add(shard)
    folder = common_folder(shards)
    for shard in shards:
        if not relative_name(shard, folder).isprintable():
            raise UserError(
                f"{public_name(shard)!a}: the shard name is not printable, and an index cannot hold it; rename the file"
            )
    return shards


def is_folder(item: str) -> bool:
    """Return True if this names a folder, rather than a shard or a pattern of shards.

    Raises UserError as in `locations.normalize`, and if a store does not answer.
    """
    url = normalize(item)
    if not is_remote(url):
        return os.path.isdir(url)
    if without_query(url).endswith(".tar"):
        return False
    return not _is_pattern(url) or _kind_of_literal(url) == "directory"


def _is_pattern(url: str) -> bool:
    return bool(set("*{") & set(without_query(url)))


def _kind_of_literal(pattern: str) -> str | None:
    """Return "file" or "directory" if a remote object has the pattern as its literal name, else None."""
    url = normalize(pattern)
    if is_http(url) or not _is_pattern(url) or "{" in bucket_of(url):
        return None
    try:
        return filesystem.kind_of(url)
    except OSError as error:
        # Without the right to list, stores answer 403 for a missing object.
        if getattr(error, "status", None) == 403:
            return None
        raise UserError(f"{public_name(url)}: cannot be listed: {reason(error)}") from None


def _each(patterns: str | Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each path or URL, with its kind if it looks like a pattern but exists under its literal name."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not given:
        raise UserError("shards: the list is empty; name a folder, a glob, a brace expansion, a path or a URL")
    for pattern in given:
        literal = _kind_of_literal(pattern) if is_remote(pattern) else None
        if literal or (not is_remote(pattern) and os.path.exists(pattern)):
            yield pattern, literal
            continue
        try:
            # Check lengths first: braceexpand builds the whole list of a range before it yields a name.
            fits = all(_range_length(*match.groups()) <= _MAX_SHARDS for match in _RANGE.finditer(pattern))
            expanded = list(itertools.islice(_braces(pattern), _MAX_SHARDS + 1)) if fits else []
        except ValueError as error:
            raise UserError(f"{public_name(pattern)}: invalid brace expansion: {error}; write {{000..015}}") from None
        if not fits or len(expanded) > _MAX_SHARDS:
            raise UserError(
                f"{public_name(pattern)}: the pattern names too many shards, expected at most {_MAX_SHARDS:,}; "
                "shorten the range"
            )
        for name in expanded:
            yield name, None


def _range_length(first: str, last: str, step: str | None) -> int:
    return abs(int(last) - int(first)) // max(abs(int(step or 1)), 1) + 1


def _braces(pattern: str) -> Iterable[str]:
    return braceexpand.braceexpand(pattern, escape=False)


def _expand_one(pattern: str, literal: str | None) -> list[str]:
    url = normalize(pattern)
    try:
        found = _list_remote(url, literal) if is_remote(url) else _list_local(url)
    except OSError as error:
        raise UserError(f"{public_name(url)}: cannot be listed: {reason(error)}") from None
    if not found:
        raise UserError(f"{public_name(url)}: found no tar; {what_is_there(url)}")
    return found


def tars_in(folder: str) -> list[str]:
    """Return the tars of a local folder, except hidden files, sorted by name. Raises OSError."""
    return sorted(
        entry.path
        for entry in os.scandir(folder)
        if entry.name.endswith(".tar") and not entry.name.startswith(".") and entry.is_file()
    )


def what_is_there(path: str) -> str:
    """Return what a path without tars holds instead, judged by its first files, with the fix."""
    if not is_remote(path) and not glob.has_magic(path) and not os.path.exists(path):
        return "no file or folder has this name; correct the path"
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if is_remote(path) or not os.path.isdir(folder):
        return "name a folder of *.tar, a glob, a brace expansion or a URL"
    names = []
    with contextlib.suppress(OSError):
        files = (name for _, _, found in os.walk(folder) for name in sorted(found) if not name.startswith("."))
        names = list(itertools.islice(files, _LOOKED_AT))
    for endings, (what, fix) in _INSTEAD.items():
        found = [name for name in names if name.lower().endswith(endings)]
        if found:
            return f"{folder} holds {what}, such as {found[0]!r}; {fix.replace('FOLDER', folder)}"
    return "name a folder of *.tar, a glob, a brace expansion or a URL"


_LOOKED_AT = 1000
_INSTEAD = {
    (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".tar.lz4"): (
        "compressed tars, which cannot be read by offset", "decompress them (images are compressed anyway)",
    ),
    (".jpg", ".jpeg", ".png", ".webp"): ("images", "make shards of them: distgan pack FOLDER DEST"),
    (".zip",): ("zips", "make shards of each: distgan pack ZIP DEST"),
    (".txt", ".npy"): ("files to be packed", "make shards of each: distgan pack FILE DEST"),
}  # fmt: skip
"""What is often taken for shards, and what to do about it."""


def _list_local(path: str) -> list[str]:
    if os.path.isdir(path):
        return tars_in(path)
    if os.path.exists(path):
        return [path]
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def _list_remote(url: str, literal: str | None) -> list[str]:
    """Raises OSError."""
    if is_http(url):
        if "*" in without_query(url):
            raise UserError(
                f"{public_name(url)}: found `*`, but HTTP servers cannot be listed; name the shards, for example "
                "with {000..015}"
            )
        return [url]
    if literal == "file" or (literal is None and url.endswith(".tar") and "*" not in url):
        return [url]
    if literal == "directory" or "*" not in url:
        return filesystem.matching(url, "*.tar")
    folder = url[: url.index("*")].rpartition("/")[0]
    return filesystem.matching(folder, url[len(folder) + 1 :])
