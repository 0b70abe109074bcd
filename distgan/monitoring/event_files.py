"""Removing from TensorBoard's event files what a resumed run is going to do again.

TensorBoard has a marker for this (`purge_step`), but its default loader does not heed it. An event file is a sequence
of records (https://www.tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format details"): the data's length as
8 bytes little-endian, 4 bytes of checksum, the data, 4 bytes of checksum. The data are an `Event` protocol buffer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distgan.files import write_atomically

_RECORD_LIMIT = 1 << 30


def drop_later_events(folder: Path, last_step: int) -> None:
    """Keep the events up to a step in all event files of a folder; a damaged record goes too.

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
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]

    try:
        event = Event.FromString(data)
    except DecodeError:
        return False
    return event.step <= last_step or not event.HasField("summary")


def _records(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Each record and the data in it."""
    while len(head := file.read(12)) == 12:
        (length,) = struct.unpack("<Q", head[:8])
        if length > _RECORD_LIMIT:
            return
        body = file.read(length + 4)
        if len(body) < length + 4:
            return
        yield head + body, body[:-4]
