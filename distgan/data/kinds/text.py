"""Lines of text as numbers of characters, as in the character GAN of Gulrajani et al. 2017.

Their code (`gan_language.py` and `language_helpers.py` of igul222/improved_wgan_training): lines are cut to a length,
padded with backticks, and numbered by a vocabulary of the most frequent characters, in which 0 is any other character.
So a backtick at the end of a line cannot be told from padding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from distgan.errors import UnreadableSampleError

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""Character 0 of every vocabulary: it stands for all that are not in it."""
PAD = "`"
"""What lines are filled up with."""
MAX_VOCABULARY = 2048
"""Characters of a vocabulary, the two above among them."""
MAX_LINE_BYTES = 1 << 20
"""Bytes of a line in UTF-8."""
BYTE_ORDER_MARK = "\N{ZERO WIDTH NO-BREAK SPACE}"
"""What some editors begin a file with; no part of its text."""
LINE_END = re.compile("\r\n|\n|\r")

Characters = NDArray[np.uint16]


def make_vocabulary(counts: Mapping[str, int]) -> tuple[str, ...]:
    """The unknown character, the padding, then the most frequent printable ones; equally frequent by code point."""
    usual = sorted(counts.keys() - {UNKNOWN, PAD}, key=lambda character: (-counts[character], character))
    return (UNKNOWN, PAD, *filter(str.isprintable, usual))[:MAX_VOCABULARY]


def find_problem(vocabulary: Sequence[str]) -> str | None:
    """What is wrong with a stranger's vocabulary, if anything."""
    if not 2 <= len(vocabulary) <= MAX_VOCABULARY or len(set(vocabulary)) < len(vocabulary):
        return f"a vocabulary has 2 to {MAX_VOCABULARY} characters, each once"
    if vocabulary[0] != UNKNOWN or PAD not in vocabulary:
        return f"a vocabulary begins with U+FFFD and has the padding {PAD}"
    if not all(len(character) == 1 and character.isprintable() for character in vocabulary):
        return "a vocabulary has single printable characters"
    return None


def read_line(data: bytes | memoryview) -> str:
    """Return the one line that a file holds, without byte order mark and line end (LF, CRLF or CR).

    Raises:
        UnreadableSampleError: not UTF-8, more than one line, or more than `MAX_LINE_BYTES`.
    """
    if len(data) > MAX_LINE_BYTES:
        raise UnreadableSampleError(f"{len(data):,} bytes; a line has at most {MAX_LINE_BYTES:,}")
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableSampleError(f"is not UTF-8 text at byte {error.start}") from None
    first, *others = LINE_END.split(text.removeprefix(BYTE_ORDER_MARK), 2)
    if any(others):
        raise UnreadableSampleError("holds more than one line; a sample is one line")
    return first


class LineEncoder:
    """Turns lines in UTF-8 into numbers of characters."""

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self._length, self._pad = length, vocabulary.index(PAD)
        self._numbers = np.zeros(0x110000, np.uint16)  # by code point
        self._numbers[[ord(character) for character in vocabulary]] = np.arange(len(vocabulary))

    def __call__(self, out: Characters, data: bytes | memoryview, extension: str = "txt") -> None:
        """Encode the one line that a file holds into `out`, uint16 (length,), cut or padded.

        Raises:
            UnreadableSampleError: see `read_line`.
        """
        line = read_line(data)
        used = min(len(line), self._length)
        out[:used] = self._numbers[np.frombuffer(line[:used].encode("utf-32-le"), np.uint32)]
        out[used:] = self._pad


def decode_lines(samples: NDArray[np.integer], vocabulary: Sequence[str]) -> list[str]:
    """Lines from numbers of characters, (n, length), without the padding at their ends."""
    characters = np.array(vocabulary)
    return ["".join(characters[line]).rstrip(PAD) for line in samples]
