"""English text that comes with Python: the prose of the language reference that `pydoc` prints.

The amount depends on the version of Python; Python 3.11 has 244,000 characters.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

from distgan.errors import UserError

WIDTH = 32
"""Maximum number of characters per line, the default of `data.length`."""
_PUNCTUATION = frozenset(" ,.;:'-()")
_SHORTEST, _PROSE = 40, 0.9
# Bullets and numbers before a paragraph; emphasis, quotes around code, and footnotes inside it.
_LEADING = re.compile(r"^(\* |\d+\. |\[\d+\] )")
_MARKUP = re.compile(r'\*\*|\*(?=\w)|(?<=\w)\*|["“”]|\s*\[\d+\]')
_PLAIN = str.maketrans("\u2018\u2019\u2013\u2014", "''--")


def python_prose() -> list[str]:
    """Return lines of whole words, each paragraph once. Raises UserError if Python lacks pydoc_data."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("builtin:text: this Python lacks pydoc_data; name a text file instead") from None
    return [line for paragraph in clean(topics[name] for name in sorted(topics)) for line in fold(paragraph)]


def clean(texts: Iterable[str]) -> Iterator[str]:
    """Yield the prose paragraphs of reStructuredText as pydoc prints it, each once and without markup."""
    return filter(_is_prose, dict.fromkeys(_plain(paragraph) for text in texts for paragraph in text.split("\n\n")))


def fold(paragraph: str) -> list[str]:
    """Wrap a paragraph into lines of at most `WIDTH` characters; a longer word stays on a line of its own."""
    return textwrap.wrap(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def _plain(paragraph: str) -> str:
    bare = _MARKUP.sub("", _LEADING.sub("", paragraph.strip()))
    return " ".join(bare.translate(_PLAIN).split())


def _is_prose(paragraph: str) -> bool:
    """Return True unless the paragraph is a heading, a signature, grammar or code."""
    if len(paragraph) < _SHORTEST or not paragraph[0].isupper() or paragraph[-1] not in ".:;!?)":
        return False
    usual = sum(character.isalpha() or character in _PUNCTUATION for character in paragraph)
    return usual >= _PROSE * len(paragraph) and "::=" not in paragraph and ">>>" not in paragraph
