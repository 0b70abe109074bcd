"""The lines of a text file, each a sample, read by offset without holding the file in memory."""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distgan.data.kinds.text import BYTE_ORDER_MARK, LINE_END, MAX_LINE_BYTES, PAD
from distgan.data.packing.sources.source import Encoded, InvalidSampleError, LazySequence, Source
from distgan.errors import UserError

_LINE_END = re.compile(LINE_END.pattern.encode())


class Line(NamedTuple):
    """Where a line lies in its file, in bytes."""

    start: int
    stop: int


class LineReader:
    """Reads lines of one file."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self) -> tuple[type[LineReader], tuple[str]]:
        return LineReader, (self.path,)

    def __call__(self, line: Line) -> bytes:
        return self.content[line.start : line.stop]


def open_lines(path: Path) -> Source[Line]:
    """The lines of a file in UTF-8, ended by LF, CRLF or CR; blank ones are left out.

    Raises:
        UserError: one line naming the file.
    """
    try:
        reader = LineReader(str(path))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or "it is empty"
        raise UserError(f"{path}: cannot be read: {reason}; name a text file with a sample a line") from None
    starts, stops, numbers = array("q"), array("q"), array("q")
    blank = padded = 0
    for number, (start, stop) in enumerate(_walk(reader.content), 1):
        line = reader.content[start:stop]
        if not line.strip():
            blank += 1
            continue
        padded += PAD.encode() in line
        starts.append(start)
        stops.append(stop)
        numbers.append(number)
    if not numbers:
        raise UserError(f"{path}: only blank lines; name a text file with a sample a line")
    return Source(
        LazySequence(len(numbers), lambda place: f"{path.name}:{numbers[place]}"),
        LazySequence(len(numbers), lambda place: Line(starts[place], stops[place])),
        reader,
        kind="text",
        notes=tuple(_notes(blank, padded)),
    )


def _walk(content: mmap.mmap) -> Iterator[Line]:
    mark = BYTE_ORDER_MARK.encode()
    start = len(mark) if content[: len(mark)] == mark else 0
    for end in _LINE_END.finditer(content, start):
        yield Line(start, end.start())
        start = end.end()
    if start < len(content):
        yield Line(start, len(content))


def _notes(blank: int, padded: int) -> Iterator[str]:
    if blank:
        yield f"left out {blank} blank lines"
    if padded:
        yield f"{padded} lines hold a {PAD}, which is what short lines are filled up with"


def text_source(name: str, lines: list[str]) -> Source[bytes]:
    """A source of lines in memory."""
    names = LazySequence(len(lines), lambda place: f"{name}[{place}]")
    return Source(names, [line.encode() for line in lines], bytes, kind="text")


def encode_line(line: bytes) -> Encoded:
    """A line as a file in a shard. Raises InvalidSampleError."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidSampleError(f"is longer than {MAX_LINE_BYTES} bytes, the most that is read")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise InvalidSampleError(f"is not UTF-8 text at its byte {error.start}; convert the file to UTF-8") from None
    return Encoded(line, "txt")
