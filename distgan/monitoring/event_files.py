"""TensorBoard event files: write them, and remove the events that a resumed run will repeat.

TensorBoard reads the files of a folder in the order of their names and never returns to an earlier one. A name begins
with the time in seconds, so on a node whose clock is behind, TensorBoard's own writer makes a file that is never read.
TensorBoard has a marker for repeated steps (`purge_step`), but its default loader ignores it.

An event file is a sequence of records (https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format
details"): the data's length as 8 bytes little-endian, 4 bytes of checksum, the data, 4 bytes of checksum. The data are
an `Event` protocol buffer.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distgan.files import write_atomically

_RECORD_LIMIT = 1 << 30


class EventFile:
    """New event file whose name sorts after the existing ones, even if the clock is behind.

    Args:
        folder: created if missing.
        purge_step: tells a running server to drop events from this step on; None writes no marker.

    Raises:
        OSError: the file cannot be written; every method may raise it.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        folder.mkdir(parents=True, exist_ok=True)
        self._records = RecordWriter(open(folder / next_name(folder), "xb"))  # noqa: SIM115
        self._add(file_version="brain.Event:2")
        if purge_step is not None:
            self._add(file_version="brain.Event:2", step=purge_step)
            self._add(session_log=SessionLog(status=SessionLog.START), step=purge_step)

    def add(self, summary: Any, step: int | None = None) -> None:
        """Write a `Summary` protocol buffer, as `torch.utils.tensorboard.summary` makes them."""
        self._add(summary=summary, step=step)

    def flush(self) -> None:
        """Pass the added events to the operating system."""
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())


def next_name(folder: Path) -> str:
    """Return the name of the next event file: in TensorBoard's form, later than all in the folder."""
    last = max((path.name for path in folder.iterdir() if "tfevents" in path.name), default="")
    second = int(time.time())
    if time_of_last := re.match(r"events\.out\.tfevents\.(\d{10})\.", last, re.ASCII):
        second = max(second, int(time_of_last[1]) + 1)
    name = f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}.0"
    return name if name > last else f"{last}.0"


def drop_later_events(folder: Path, last_step: int) -> None:
    """Keep the events up to a step in all event files of a folder; remove later ones and damaged records.

    Raises:
        OSError: a file cannot be read or replaced.
    """
    for path in sorted(folder.glob("events.out.tfevents.*")):
        with open(path, "rb") as file:
            content = b"".join(record for record, data in _records(file) if _stays(data, last_step))
        if len(content) != path.stat().st_size:
            write_atomically(path, content)


def _stays(data: bytes, last_step: int) -> bool:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from tensorboard.compat.proto.event_pb2 import Event

    try:
        event = Event.FromString(data)
    except DecodeError:
        return False
    return event.step <= last_step or not event.HasField("summary")


def _records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield each record with its data."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        if length > _RECORD_LIMIT:
            return
        body = file.read(length + 4)
        if len(body) < length + 4:
            return
        yield head + body, body[:-4]
