"""Names of places where shards are: local paths and URLs.

Only ever whole files are named: a shell (`pipe:`) or a chain of filesystems (`a::b`) is refused, because data and
their indexes come from strangers.

In an `http(s)` URL, `?` begins a query, which may hold a token and names no other file, and other special characters
are percent-encoded. In all other URLs a key may hold any character: `?`, `#` and `%` stand for themselves.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote, urlsplit

from distgan.errors import UserError

PROTOCOLS = frozenset(
    ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "oci", "oss")
)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_PATH_CHARACTERS = "/:@!$&'()*+,;=~"
"""Characters that the path of an HTTP URL may hold as they are (RFC 3986, 3.3), besides letters, digits and `-._`."""


def is_remote(url: str) -> bool:
    """Whether a normalized location is a URL rather than an absolute local path."""
    return _SCHEME.match(url) is not None


def protocol_of(url: str) -> str:
    """The protocol of a URL in lower case; empty for a local path."""
    scheme = _SCHEME.match(url)
    return scheme[1].lower() if scheme else ""


def is_http(url: str) -> bool:
    """Whether a location is an HTTP or HTTPS URL."""
    return protocol_of(url) in ("http", "https")


def bucket_of(url: str) -> str:
    """What follows the protocol of a URL: a bucket, or a host."""
    return url.partition("://")[2].partition("/")[0]


def normalize(url: str) -> str:
    """An absolute local path, or a URL of an accepted protocol. Raises UserError for anything else."""
    if not url.strip():
        raise UserError("the path of the shards is empty; name a folder of *.tar, a glob, a brace expansion or a URL")
    if url.strip().lower().startswith("pipe:"):
        raise UserError(f"{url}: `pipe:` would run a shell command and is never followed; give a path or URL of a tar")
    scheme = _SCHEME.match(url)
    if scheme is None and "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    protocol = protocol_of(url)
    if scheme and protocol == "file":
        return os.path.abspath(url[len(scheme[0]) :])
    if scheme is None or protocol not in PROTOCOLS or "::" in url:
        raise UserError(f"{public_name(url)}: this kind of URL is not read; accepted: {', '.join(sorted(PROTOCOLS))}")
    url = f"{protocol}://{url[len(scheme[0]) :]}"
    if is_http(url):
        return _normalise_http(url)
    if not bucket_of(url) or "*" in bucket_of(url):
        raise UserError(f"{url}: names no bucket or host; give one after ://, without a `*`")
    if "?versionId=" in url:
        raise UserError(f"{url}: reads of one version of an object are not supported; copy that version to its own key")
    return url.rstrip("/")


def _normalise_http(url: str) -> str:
    """Percent-encode what a path may not hold, so that equal files have equal names."""
    name, query = _split(url)
    if query.startswith("#"):
        raise UserError(
            f"{public_name(url)}: `#` in an HTTP URL begins a fragment, which no server gets; write %23 for a `#` in "
            "the name of a file"
        )
    try:
        urlsplit(name).port  # noqa: B018 - raises for a host or port that cannot be
    except ValueError as error:
        raise UserError(f"{public_name(url)}: not a valid URL: {error}") from None
    scheme, _, rest = name.partition("://")
    host, slash, path = rest.rstrip("/").partition("/")
    return f"{scheme}://{host}{slash}{quote(path, safe=_PATH_CHARACTERS + '%{}')}{query}"


def _split(url: str) -> tuple[str, str]:
    """The part of a location that names a file, and the query (or fragment) of an HTTP URL with its `?`."""
    if not is_http(url):
        return url, ""
    name = re.split("[?#]", url, maxsplit=1)[0]
    return name, url[len(name) :]


def without_query(url: str) -> str:
    """The part of a location that names a file: all of it but the query of an HTTP URL."""
    return _split(url)[0]


def public_name(url: str) -> str:
    """The location as messages show it, without what may be a secret: an HTTP URL's query, a user's password.

    For printing only: it says neither where a file is nor whether two files are the same.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return url
    keeps_keys = protocol_of(url) in PROTOCOLS and not is_http(url)
    name = url if keeps_keys else re.split("[?#]", url, maxsplit=1)[0]
    host, slash, path = name[len(scheme[0]) :].partition("/")
    user, at, bare = host.rpartition("@")
    # In `abfs://container@account` what comes before the `@` is no secret.
    shown = bare if at and not (keeps_keys and ":" not in user) else host
    return f"{scheme[0]}{shown}{slash}{path}"


def folder_of(url: str) -> str:
    """The parent folder of a normalized location; the query of an HTTP URL stays."""
    name, query = _split(url)
    return (name.rpartition("/")[0] or "/") + query


def join(folder: str, name: str) -> str:
    """`name` inside `folder`, both normalized or relative; percent-encoded in an HTTP URL."""
    place, query = _split(folder)
    if is_http(folder):
        name = quote(name, safe=_PATH_CHARACTERS, errors="surrogateescape")
    return f"{place.rstrip('/')}/{name}{query}"


def common_folder(urls: Sequence[str]) -> str:
    """The deepest folder that holds all of the given normalized locations ('' when they share none)."""
    names, queries = zip(*(_split(folder_of(url)) for url in urls), strict=True)
    split = [name.split("/") for name in names]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    if is_remote(urls[0]) and len(shared) < 3:
        return ""
    return "/".join(shared) + (queries[0] if len(set(queries)) == 1 else "")


def relative_name(url: str, folder: str) -> str:
    """A location's name within a folder that holds it, not percent-encoded; else the whole name without a query."""
    name, prefix = without_query(url), without_query(folder).rstrip("/") + "/"
    if not folder or not name.startswith(prefix):
        return public_name(url)
    relative = name[len(prefix) :]
    return unquote(relative, errors="surrogateescape") if is_http(url) else relative


def is_printable(url: str) -> bool:
    """Return True if neither a URL nor the name that it encodes has control characters."""
    return url.isprintable() and (not is_http(url) or unquote(url, errors="surrogateescape").isprintable())


def is_inside(url: str, folder: str) -> bool:
    """Whether the location's relative name leads to it from that folder."""
    name = relative_name(url, folder)
    return name != public_name(url) and without_query(join(folder, name)) == without_query(url)
