"""Small disks of the test's own, which can be full or read-only without harm to others."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, mounted at `point`."""

    def __init__(self, point: Path) -> None:
        self.point = point
        self._ballast = point / "ballast"

    def fill(self) -> None:
        """Leave no byte free."""
        with open(self._ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def use_up_inodes(self) -> None:
        """Leave no room for another file, whatever its size."""
        with contextlib.suppress(OSError):
            for number in itertools.count():
                (self.point / f"inode-{number}").touch()

    def empty(self) -> None:
        self._ballast.unlink()

    def forbid(self) -> None:
        """Read-only from now on, as soon as no file is open for writing."""
        deadline = time.monotonic() + 30
        while subprocess.run(["mount", "-o", "remount,ro", self.point], capture_output=True).returncode:
            assert time.monotonic() < deadline, f"{self.point} is always busy"
            time.sleep(0.005)

    def allow(self) -> None:
        subprocess.run(["mount", "-o", "remount,rw", self.point], check=True)


@contextmanager
def small_disk(point: Path, megabytes: int, inodes: int = 0) -> Iterator[Disk]:
    """A disk of that size, with at most so many files and folders (0: as usual), itself counted.

    Skips the test where none can be mounted.
    """
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    point.mkdir(parents=True)
    options = f"size={megabytes}m" + (f",nr_inodes={inodes}" if inodes else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", point]
    mounted = subprocess.run(command, capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        yield Disk(point)
    finally:
        subprocess.run(["umount", point], check=True)
