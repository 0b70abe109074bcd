"""The objects below one URL of an object store, by their relative names."""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from distgan.data.storage.filesystem import ask, filesystem, get
from distgan.data.storage.store_errors import StoreError, lacks_bucket

_Result = TypeVar("_Result")


class ObjectFolder:
    """Objects below a normalized URL. Each object appears whole or not at all, as object stores guarantee.

    Transient errors are retried (see `ask`). All methods raise StoreError, and UserError for a missing package.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._until: float | None = None

    def within(self, seconds: float) -> ObjectFolder:
        """Return the same objects, whose requests all fail once these seconds are over, also those under way.

        A client without asynchronous requests, as of `hdfs://`, ends a request that is under way by its own timeout.
        """
        bounded = ObjectFolder(self.url)
        bounded._until = time.monotonic() + seconds
        return bounded

    def location(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self.url}/{name}" if name else self.url

    @property
    def creates_exclusively(self) -> bool:
        """Return True if the client of this store has conditional writes, which `create` then uses.

        The store itself may ignore the condition: see `try_exclusive`.
        """
        store = filesystem(self.url)
        write = getattr(store, "_pipe_file", None) or store.pipe_file
        return "mode" in inspect.signature(write).parameters

    def names(self, folder: str = "") -> dict[str, int]:
        """Return name below `folder` -> size in bytes for all objects there, in folders of it too."""
        where = self.location(folder)

        def find(store: Any) -> dict[str, int]:
            try:
                found = store.find(where, detail=True)
            except FileNotFoundError as error:
                if lacks_bucket(error):
                    raise
                return {}
            first = len(store._strip_protocol(where).rstrip("/")) + 1
            return {name[first:]: int(info["size"]) for name, info in found.items() if name[first:]}

        return self._ask(where, find)

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes; None if it does not exist."""
        where = self.location(name)

        def look(store: Any) -> int | None:
            try:
                return int(store.info(where)["size"])
            except FileNotFoundError:
                return None

        return self._ask(where, look)

    def read(self, name: str, limit: int) -> bytes | None:
        """Return the content of an object; None if it does not exist. Raises StoreError above `limit` bytes."""
        where = self.location(name)

        def cat(store: Any) -> bytes | None:
            try:
                return bytes(store.cat_file(where, start=0, end=limit + 1))
            except FileNotFoundError:
                return None

        content = self._ask(where, cat)
        if content is not None and len(content) > limit:
            raise StoreError(f"larger than {limit} bytes, the limit for this object")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write an object, or replace it."""
        where = self.location(name)
        self._ask(where, lambda store: store.pipe_file(where, content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a new object. Return False if it exists, which is certain after `try_exclusive` only."""
        where = self.location(name)
        if not self.creates_exclusively:
            if self.size(name) is not None:
                return False
            self.write(name, content)
            return True

        def put(store: Any) -> bool:
            try:
                store.pipe_file(where, content, mode="create")
            except FileExistsError:
                return False
            return True

        try:
            return self._ask(where, put)
        except StoreError as error:
            if error.status in (409, 412):  # another writer was first, or is writing
                return False
            raise

    def try_exclusive(self, name: str) -> bool:
        """Return True if this store refuses to create an object that exists. Create and remove `name` to see."""
        if not self.creates_exclusively:
            return False
        try:
            self.create(name, b"first")
            return not self.create(name, b"second")
        finally:
            self.remove([name])

    def copy(self, source: str, name: str) -> None:
        """Copy an object within the store."""
        places = self.location(source), self.location(name)
        self._ask(places[1], lambda store: store.cp_file(*places))

    def upload(self, path: Path, name: str) -> None:
        """Write a local file as an object, or replace it. It appears when all of it has arrived."""
        where = self.location(name)
        self._ask(where, lambda store: store.put_file(str(path), where))

    def download(self, name: str, path: Path, most: int) -> None:
        """Copy an object of at most `most` bytes to a local file. Raises DiskError too."""
        where = self.location(name)
        self._ask(where, lambda store: get(store, where, str(path), most))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, in any order. Those that do not exist are passed over."""
        places = [self.location(name) for name in names]

        def remove(store: Any) -> None:
            if len(places) > 1:
                # One request for many. Some stores have none, and some clients refuse a list with a missing object.
                with contextlib.suppress(Exception):
                    store.rm(places)
                    return
            for place in places:
                with contextlib.suppress(FileNotFoundError):
                    store.rm_file(place)

        if places:
            self._ask(places[0], remove)

    def _ask(self, where: str, request: Callable[[Any], _Result]) -> _Result:
        filesystem(self.url)  # a package that is missing is an error of the folder, not of one object
        if self._until is None:
            return ask(where, request, repeat=True)
        until = self._until
        return ask(where, lambda store: request(_Bounded(store, until)), repeat=True)


class _Bounded:
    """A filesystem whose requests end at a time of the monotonic clock."""

    def __init__(self, store: Any, until: float) -> None:
        self._store, self._end = store, until

    def __getattr__(self, name: str) -> Any:
        found, left = getattr(self._store, name), self._end - time.monotonic()
        if name.startswith("_") or not callable(found):
            return found
        if left <= 0:
            raise TimeoutError
        # fsspec makes each of these from a coroutine, which it cancels after `timeout` seconds.
        return functools.partial(found, timeout=left) if inspect.iscoroutinefunction(inspect.unwrap(found)) else found
