"""Copies of a run's small files in its object store: curves, event files, samples, config, status."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from distgan.checkpoint.directory import JSON_LIMIT
from distgan.checkpoint.remote import RemoteCheckpoints, TakenError
from distgan.data.storage.locations import public_name
from distgan.errors import UserError
from distgan.files import new_file, read_bounded, reason, writing

logger = logging.getLogger("distgan")

FOLLOWED = (
    "config.yaml", "status.json", "metrics.jsonl", "tensorboard/*", "samples/**/*", "trackers/*.json", "averages/*",
)  # fmt: skip
"""Files that the store gets while the run trains."""
_FETCHED = re.compile(
    r"status\.json|metrics\.jsonl|checkpoints/best\.json|trackers/[a-z0-9_]+\.json"
    r"|tensorboard/events\.out\.tfevents\.[A-Za-z0-9_.-]+"
)
"""Files that a job continues on another host."""
_SNAPSHOT = re.compile(r"snapshot-(\d{12})\.safetensors")
_FETCH_LIMIT = 4 << 30
_BEST = "checkpoints/best.json"
_SINGLE = ("status.json", "metrics.jsonl", _BEST)


class Mirror:
    """Follows the small files of a local run folder. Use it on ranks that see rank 0's folder, from any thread.

    Args:
        writable: see `Uploads`; it is called before each write.
    """

    def __init__(self, remote: RemoteCheckpoints, folder: Path, writable: Callable[[], RemoteCheckpoints]) -> None:
        self._objects, self._folder, self._writable = remote.objects, folder, writable
        self._sent: dict[str, tuple[int, int]] = {}
        """Name -> time of change and size of what the store has."""
        self._complained = False
        self._lock = threading.RLock()

    def fetch(self) -> None:
        """Replace the local files by those of the store.

        Raises:
            UserError: a file is too large, or cannot be written.
            StoreError: a request failed.
        """
        found = {name: size for name, size in self._names() if _FETCHED.fullmatch(name)}
        for name in _SINGLE:
            (self._folder / name).unlink(missing_ok=True)
        for name, size in found.items():
            if size > _FETCH_LIMIT:
                raise UserError(
                    f"{public_name(self._objects.location(name))}: larger than {_FETCH_LIMIT} bytes; move it"
                )
            path = self._folder / name
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path, durable=False) as temporary:
                self._objects.download(name, temporary, size)
            self._sent[name] = self._state(path)

    def _names(self) -> Iterator[tuple[str, int]]:
        for folder in ("tensorboard", "trackers"):
            yield from ((f"{folder}/{name}", size) for name, size in self._objects.names(folder).items())
        for name in _SINGLE:
            size = self._objects.size(name)
            if size is not None:
                yield name, size

    def update(self) -> None:
        """Upload the files that have changed. Log an error of the store once, and try again with the next call.

        Raises TakenError.
        """
        with self._lock:
            self._update()

    def _update(self) -> None:
        try:
            for name in sorted({name for pattern in FOLLOWED for name in self._matching(pattern)}):
                self.put(name)
            self._put_best()
            self._complained = False
        except TakenError:
            raise
        except (OSError, UserError) as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "%s: cannot upload curves and samples: %s; they are in %s, and the next interval tries again",
                    public_name(self._objects.url), reason(error), self._folder,
                )  # fmt: skip

    def put(self, name: str) -> None:
        """Upload a file if it has changed. Raises StoreError, and OSError if it cannot be read."""
        with self._lock:
            state = self._state(self._folder / name)
            if self._sent.get(name) != state:
                bounded = self._writable().objects
                # A large file may take longer. Only the status says how another job's run stands.
                (bounded if name == "status.json" else self._objects).upload(self._folder / name, name)
                self._sent[name] = state

    def forget_later_averages(self, images: int) -> None:
        """Remove the averages after `images` from the store: the run trains those steps again. Raises StoreError."""
        matches = {name: _SNAPSHOT.fullmatch(name) for name in self._objects.names("averages")}
        later = [f"averages/{name}" for name, match in matches.items() if match and int(match[1]) > images]
        with self._lock:
            self._writable().objects.remove(later)
            for name in later:
                self._sent.pop(name, None)

    def _put_best(self) -> None:
        path = self._folder / _BEST
        state = self._state(path) if path.exists() else None
        # Not before the checkpoint itself is in the store.
        if state and self._sent.get(_BEST) != state and self._writable().mark_best(read_bounded(path, JSON_LIMIT)):
            self._sent[_BEST] = state

    def _matching(self, pattern: str) -> Iterator[str]:
        for path in self._folder.glob(pattern):
            if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
                yield path.relative_to(self._folder).as_posix()

    @staticmethod
    def _state(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_mtime_ns, status.st_size
