"""The command line as a whole. Nothing heavy is imported for it, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence

from distgan.cli.options import add_commands
from distgan.version import __version__

_DESCRIPTION = """\
Train GANs across machines, resume them exactly, and compare them by numbers that can be trusted."""

_EXAMPLES = """\
from images to a generator:
  distgan pack builtin:digits datasets/digits --resolution 32
  accelerate launch --multi_gpu --num_processes 2 -m distgan train configs/digits-dcgan.yaml
  distgan evaluate runs/digits-dcgan
  distgan sample runs/digits-dcgan --num 64 --out samples.png
  distgan export runs/digits-dcgan exported
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of one command, with its name in `command`.

    Exits with 2 after a word that is not an option, or a key with two values.
    """
    options, rest = build_parser().parse_known_args(arguments)
    # argparse takes positional arguments in one go only, but `train CONFIG --resume never key=value` is natural.
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        options.parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    if isinstance(getattr(options, "images", None), list):  # of encode it is a flag
        _divide_images(options)
    given: dict[str, str] = {}
    for override in getattr(options, "overrides", ()):
        key = override.partition("=")[0]
        if given.setdefault(key, override) != override:
            options.parser.error(
                f"{key} is given twice: {given[key][:200]!r} and {override[:200]!r}; give it once, and quote braces so "
                "that the shell does not expand them"
            )
    return options


def _divide_images(options: argparse.Namespace) -> None:
    """Divide the words of `evaluate --images` into two sets (the second may be None) and overrides.

    argparse takes the overrides behind --images for sets, and one before it for the run.
    """
    words = options.images
    if options.source is not None and _is_override(options.source):
        words, options.source = [*words, options.source], None
    sets = [word for word in words if not _is_override(word)]
    options.overrides = [*options.overrides, *filter(_is_override, words)]
    if len(sets) not in (1, 2):
        options.parser.error(f"--images: found {len(sets)} sets, expected generated images and real images")
    options.images = (sets[0], sets[1] if len(sets) == 2 else None)


def _is_override(word: str) -> bool:
    return re.match(r"[a-z_]+(\.\w+)*=", word) is not None and not os.path.exists(word)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="distgan", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"distgan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(command=name, parser=added)
        return added

    add_commands(command)
    return parser
