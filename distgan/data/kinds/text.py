"""Encode lines of text as character indices, as in the character GAN of Gulrajani et al. 2017.

As in their code (`gan_language.py` and `language_helpers.py` of igul222/improved_wgan_training), lines are cut to a
length and padded with backticks. The vocabulary holds the most frequent characters, and index 0 stands for all others.
A backtick at the end of a line is therefore read as padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distgan.errors import UnreadableSampleError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Character 0 of every vocabulary: stands for all characters that are not in it."""
PAD = "`"
"""Padding character of short lines."""
MAX_VOCABULARY = 2048
"""Maximum number of characters in a vocabulary, including the two above."""
MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of a line in UTF-8."""
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
"""Mark that some editors write at the start of a file; not part of the text."""
LINE_END = re.compile("\r\n|\n|\r")

Characters = NDArray[np.uint16]


def make_vocabulary(counts: Mapping[str, int]) -> tuple[str, ...]:
    """Return the unknown character, the padding, then printable characters by falling frequency and code point."""
    usual = sorted(counts.keys() - {UNKNOWN, PAD}, key=lambda character: (-counts[character], character))
    return (UNKNOWN, PAD, *filter(str.isprintable, usual))[:MAX_VOCABULARY]


def find_problem(vocabulary: Sequence[str]) -> str | None:
    """Return the first problem of an untrusted vocabulary, or None."""
    if not 2 <= len(vocabulary) <= MAX_VOCABULARY or len(set(vocabulary)) < len(vocabulary):
        return f"a vocabulary must have 2 to {MAX_VOCABULARY} different characters, found {len(vocabulary)} entries"
    if vocabulary[0] != UNKNOWN or PAD not in vocabulary:
        return f"a vocabulary must begin with U+FFFD and contain the padding {PAD}"
    if not all(len(character) == 1 and character.isprintable() for character in vocabulary):
        return "a vocabulary must consist of single printable characters"
    return None


def read_line(data: bytes | memoryview) -> str:
    """Return the one line of a file, without byte order mark and line end (LF, CRLF or CR).

    Raises:
        UnreadableSampleError: the file is not UTF-8, has more than one line, or is larger than `MAX_LINE_BYTES`.
    """
    if len(data) > MAX_LINE_BYTES:
        raise UnreadableSampleError(f"line too long: found {len(data):,} bytes, expected at most {MAX_LINE_BYTES:,}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(f"is not UTF-8 text at byte {error.start}") from None
    first, *others = LINE_END.split(text.removeprefix(BYTE_ORDER_MARK), 2)
    if any(others):
        raise UnreadableSampleError("found more than one line, expected one line per sample")
    return first


class LineEncoder:
    """Encode UTF-8 lines as character indices."""

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self._length, self._pad = length, vocabulary.index(PAD)
        self._numbers = np.zeros(0x110000, np.uint16)  # indexed by code point
        self._numbers[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))

    def __call__(self, out: Characters, data: bytes | memoryview, extension: str = "txt") -> None:
        """Encode the one line of a file into `out`, uint16 (length,), cut or padded.

        Raises:
            UnreadableSampleError: see `read_line`.
        """
        line = read_line(data)
        used = min(len(line), self._length)
        out[:used] = self._numbers[np.frombuffer(line[:used].encode("utf-32-le"), np.uint32)]
        out[used:] = self._pad


def decode_lines(samples: NDArray[np.integer], vocabulary: Sequence[str]) -> list[str]:
    """Decode character indices, (n, length), to lines without the padding at their ends."""
    characters = np.array(vocabulary)
    return ["".join(characters[line]).rstrip(PAD) for line in samples]
