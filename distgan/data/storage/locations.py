"""Normalize, join and compare locations of shards: local paths and URLs.

A location names one file. Shell commands (`pipe:`) and chained filesystems (`a::b`) raise an error, because data and
indexes are untrusted.

In an `http(s)` URL, `?` begins a query. The query may hold a token and does not change which file is named. Other
special characters are percent-encoded. In all other URLs, `?`, `#` and `%` are literal characters of a key.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from distgan.errors import UserError

PROTOCOLS = frozenset(
    ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "hf", "hdfs", "webhdfs", "oci", "oss")
)
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_PATH_CHARACTERS = "/:@!$&'()*+,;=~"
"""Characters that need no percent-encoding in an HTTP path (RFC 3986, 3.3), besides letters, digits and `-._`."""


def is_remote(url: str) -> bool:
    """Return True if a normalized location is a URL, False if it is an absolute local path."""
    return _SCHEME.match(url) is not None


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in lower case, or an empty string for a local path."""
    scheme = _SCHEME.match(url)
    return scheme[1].lower() if scheme else ""


def is_http(url: str) -> bool:
    """Return True if a location is an HTTP or HTTPS URL."""
    return protocol_of(url) in ("http", "https")


def bucket_of(url: str) -> str:
    """Return the bucket or host of a URL."""
    return url.partition("://")[2].partition("/")[0]


def normalize(url: str) -> str:
    """Return an absolute local path, or a URL with an accepted protocol. Raises UserError for other input."""
    if not url.strip():
        raise UserError("shards: the path is empty; name a folder of *.tar, a glob, a brace expansion or a URL")
    if url.strip().lower().startswith("pipe:"):
        raise UserError(f"{url}: found `pipe:`, which would run a shell command; give the path or URL of a tar")
    scheme = _SCHEME.match(url)
    if scheme is None and "://" not in url:
        return os.path.abspath(os.path.expanduser(url))
    protocol = protocol_of(url)
    if scheme and protocol == "file":
        return os.path.abspath(url[len(scheme[0]) :])
    if scheme is None or protocol not in PROTOCOLS or "::" in url:
        raise UserError(
            f"{public_name(url)}: unsupported kind of URL, expected one of {', '.join(sorted(PROTOCOLS))}; "
            "copy the shards to such a store, or to a local disk"
        )
    url = f"{protocol}://{url[len(scheme[0]) :]}"
    if is_http(url):
        return _normalize_http(url)
    if not bucket_of(url) or "*" in bucket_of(url):
        raise UserError(f"{url}: found no bucket or host after ://; add one, without a `*`")
    if "?versionId=" in url:
        raise UserError(f"{url}: ?versionId= is not supported; copy that version to a key of its own")
    return url.rstrip("/")


def _normalize_http(url: str) -> str:
    """Percent-encode special characters in the path, so that each file has one name."""
    name, query = _split(url)
    if query.startswith("#"):
        raise UserError(
            f"{public_name(url)}: found `#`, which begins a fragment and is not sent to the server; write %23 for a "
            "`#` in a file name"
        )
    try:
        urlsplit(name).port  # noqa: B018 - raises for an invalid host or port
    except ValueError as error:
        raise UserError(f"{public_name(url)}: invalid URL: {error}; correct its host or port") from None
    scheme, _, rest = name.partition("://")
    host, slash, path = rest.rstrip("/").partition("/")
    return f"{scheme}://{host}{slash}{quote(path, safe=_PATH_CHARACTERS + '%{}')}{query}"


def _split(url: str) -> tuple[str, str]:
    """Split a location into the file name and, for an HTTP URL, the query or fragment with its `?` or `#`."""
    if not is_http(url):
        return url, ""
    name = re.split("[?#]", url, maxsplit=1)[0]
    return name, url[len(name) :]


def without_query(url: str) -> str:
    """Return the location without the query of an HTTP URL."""
    return _split(url)[0]


def public_name(url: str) -> str:
    """Return the location for messages, without possible secrets: an HTTP URL's query, a user and password.

    Use it only for printing. It does not locate a file, and different files may share it.
    """
    scheme = _SCHEME.match(url)
    if scheme is None:
        return url
    keeps_keys = protocol_of(url) in PROTOCOLS and not is_http(url)
    name = url if keeps_keys else re.split("[?#]", url, maxsplit=1)[0]
    host, slash, path = name[len(scheme[0]) :].partition("/")
    user, at, bare = host.rpartition("@")
    # In `abfs://container@account`, the part before the `@` is not a secret.
    shown = bare if at and not (keeps_keys and ":" not in user) else host
    return f"{scheme[0]}{shown}{slash}{path}"


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """Return the path of a file or folder to write. Raises UserError for a URL, which would be a folder `s3:`.

    Args:
        name: option of the path, for the message.
    """
    text = os.fspath(path)
    if "://" in text:
        raise UserError(
            f"{name}: expected a local path, found a URL {public_name(text)[:200]!r}; write to a local path and copy "
            "the result to the store",
            everywhere=True,
        )
    return Path(path)


def folder_of(url: str) -> str:
    """Return the parent folder of a normalized location, with the query of an HTTP URL."""
    name, query = _split(url)
    return (name.rpartition("/")[0] or "/") + query


def join(folder: str, name: str) -> str:
    """Join a relative `name` to `folder`. Percent-encode the name in an HTTP URL."""
    place, query = _split(folder)
    if is_http(folder):
        name = quote(name, safe=_PATH_CHARACTERS, errors="surrogateescape")
    return f"{place.rstrip('/')}/{name}{query}"


def common_folder(urls: Sequence[str]) -> str:
    """Return the deepest folder that holds all of these normalized locations, or '' if they share none."""
    names, queries = zip(*(_split(folder_of(url)) for url in urls), strict=True)
    split = [name.split("/") for name in names]
    shared = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))]
    if is_remote(urls[0]) and len(shared) < 3:
        return ""
    return "/".join(shared) + (queries[0] if len(set(queries)) == 1 else "")


def relative_name(url: str, folder: str) -> str:
    """Return a location relative to a folder, not percent-encoded; outside the folder, return its public name."""
    name, prefix = without_query(url), without_query(folder).rstrip("/") + "/"
    if not folder or not name.startswith(prefix):
        return public_name(url)
    relative = name[len(prefix) :]
    return unquote(relative, errors="surrogateescape") if is_http(url) else relative


def is_printable(url: str) -> bool:
    """Return True if neither a URL nor its decoded name has control characters."""
    return url.isprintable() and (not is_http(url) or unquote(url, errors="surrogateescape").isprintable())


def is_inside(url: str, folder: str) -> bool:
    """Return True if joining the folder and the location's relative name gives the location again."""
    name = relative_name(url, folder)
    return name != public_name(url) and without_query(join(folder, name)) == without_query(url)
