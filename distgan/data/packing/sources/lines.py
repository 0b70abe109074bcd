"""A source of text lines, one sample per line, read by offset without loading the file into memory."""

from __future__ import annotations

import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from distgan.data.kinds.text import BYTE_ORDER_MARK, LINE_END, MAX_LINE_BYTES, PAD
from distgan.data.packing.sources.source import Encoded, InvalidSampleError, LazySequence, Source
from distgan.errors import UserError, counted

_LINE_END = re.compile(LINE_END.pattern.encode())


class Line(NamedTuple):
    """Byte range of a line in its file."""

    start: int
    stop: int


class LineReader:
    """Read lines of one file by their byte range."""

    def __init__(self, path: str) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __reduce__(self) -> tuple[type[LineReader], tuple[str]]:
        return LineReader, (self.path,)

    def __call__(self, line: Line) -> bytes:
        return self.content[line.start : line.stop]


def open_lines(path: Path) -> Source[Line]:
    """Open the lines of a UTF-8 file, ended by LF, CRLF or CR, without blank lines.

    Raises:
        UserError: the file is unreadable or has only blank lines; the message names it.
    """
    try:
        reader = LineReader(str(path))
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        reason = getattr(error, "strerror", None) or "it is empty"
        raise UserError(f"{path}: cannot read the file: {reason}; name a text file with one sample per line") from None
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
        raise UserError(f"{path}: found only blank lines; name a text file with one sample per line")
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
        yield f"left out {counted(blank, 'blank line')}"
    if padded:
        yield f"{padded} lines hold a {PAD}, the padding character: at the end of a line it is read as padding"


def text_source(name: str, lines: list[str]) -> Source[bytes]:
    """Create a source of lines in memory."""
    names = LazySequence(len(lines), lambda place: f"{name}[{place}]")
    return Source(names, [line.encode() for line in lines], bytes, kind="text")


def encode_line(line: bytes) -> Encoded:
    """Encode a line as a file in a shard. Raises InvalidSampleError if it is too long or not UTF-8."""
    if len(line) > MAX_LINE_BYTES:
        raise InvalidSampleError(f"line too long: found {len(line)} bytes, expected at most {MAX_LINE_BYTES}")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise InvalidSampleError(f"is not UTF-8 text at byte {error.start}; convert the file to UTF-8") from None
    return Encoded(line, "txt")
