"""Write index files. An index may name local shards only inside its own folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence

from distgan.data.index.file import Table, index_path, pack_file
from distgan.data.index.table import ARRAYS, Index
from distgan.data.storage import filesystem, locations
from distgan.errors import UserError
from distgan.files import reason

_LINKS = "if you cannot write there, index a folder of symlinks to the shards"


def check_place(urls: Sequence[str], path: str) -> None:
    """Raise UserError if an index of these shards cannot be written there. Writes no index."""
    for url in urls:
        _stored_name(url, path)
    if not locations.is_remote(path):
        with _write_errors(path):
            filesystem.check_writable(path)


def save_index(index: Index, where: str | os.PathLike[str]) -> str:
    """Write the index atomically into a folder (or to a path ending in .safetensors) and return its path.

    Raises UserError for local shards outside that folder, because an index may name only files in its own folder.
    """
    path = index_path(where)
    table = Table(
        version=2,
        shards=[
            (_stored_name(shard.url, path), shard.size, shard.count, shard.header_digest, shard.sha256)
            for shard in index.shards
        ],
        class_names=list(index.class_names) if index.class_names is not None else None,
        vocabulary=list(index.vocabulary) if index.vocabulary is not None else None,
        latents=index.latents,
        left_out=[_stored_name(url, path) for url in index.left_out],
    )
    with _write_errors(path):
        filesystem.write(path, pack_file(table, {name: getattr(index, name) for name in ARRAYS}))
    return path


@contextlib.contextmanager
def _write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        forbidden = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not locations.is_remote(path)
        fix = f"; {_LINKS}" if forbidden else ""
        raise UserError(f"{locations.public_name(path)}: cannot write the index: {reason(error)}{fix}") from None


def _stored_name(url: str, path: str) -> str:
    folder = locations.folder_of(path)
    if locations.is_inside(url, folder):
        return locations.relative_name(url, folder)
    if not locations.is_remote(url):
        raise UserError(f"{path}: the shard {url} is outside this folder; save the index beside its shards; {_LINKS}")
    return url
