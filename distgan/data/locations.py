"""Names of places where shards are: local paths and URLs.

Only ever whole files are named: a shell (`pipe:`) or a chain of filesystems (`a::b`) is refused, because data and
their indexes come from strangers.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from distgan.errors import UserError

PROTOCOLS = frozenset(
    ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "oci", "oss")
)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")


def is_remote(url: str) -> bool:
    """Whether a normalised location is a URL rather than an absolute local path."""
    return _SCHEME.match(url) is not None


def normalise(url: str) -> str:
    """An absolute local path, or a URL of an accepted protocol. Raises UserError for anything else."""
    if not url.strip():
        raise UserError("the path of the shards is empty; name a folder of *.tar, a glob, a brace expansion or a URL")
    if url.strip().lower().startswith("pipe:"):
        raise UserError(f"{url}: `pipe:` would run a shell command and is never followed; give a path or URL of a tar")
    scheme = _SCHEME.match(url)
    if scheme is None and "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    protocol = scheme[1].lower() if scheme else ""
    if scheme and protocol == "file":
        return os.path.abspath(url[len(scheme[0]) :])
    if protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{public_name(url)}: this kind of URL is not read; accepted: {', '.join(sorted(PROTOCOLS))}")
    return url.rstrip("/")


def public_name(url: str) -> str:
    """The location as messages show it: without a query or password, which may be secrets."""
    if not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def folder_of(url: str) -> str:
    """The parent folder of a normalised location."""
    path = public_name(url) if is_remote(url) else url
    return path.rpartition("/")[0] or "/"


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, both normalised or relative."""
    return f"{folder.rstrip('/')}/{name}"


def common_folder(urls: Sequence[str]) -> str:
    """The deepest folder that holds all of the given normalised locations ('' when they share none)."""
    split = [folder_of(url).split("/") for url in urls]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    folder = "/".join(shared)
    return folder if not is_remote(urls[0]) or len(shared) > 2 else ""


def relative_name(url: str, folder: str) -> str:
    """A location's name within a folder that holds it; the whole public name when the folder does not."""
    path, prefix = public_name(url), folder.rstrip("/") + "/"
    return path[len(prefix) :] if folder and path.startswith(prefix) else path
