"""What the commands that make shards take on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_pack(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `pack`."""
    parser = command(
        "pack", "turn images, text or points into WebDataset shards with an index",
        "SOURCE is one of\n"
        "  a folder of images; class subfolders become integer labels, in sorted order\n"
        "  a zip of the same, with or without StyleGAN's dataset.json\n"
        "  an idx images file (MNIST's format, .gz or not); its labels file is found beside it\n"
        "  a .txt file in UTF-8; each line that is not blank is a sample\n"
        "  an .npy file of points, float of shape (n, dimensions)\n"
        "  builtin:digits, 1,797 scanned digits that come with scikit-learn\n"
        "  builtin:text, lines of Python's own documentation, of at most 32 characters\n"
        "  builtin:ring or builtin:grid, points of 8 or 25 normal distributions, whose numbers are the labels\n\n"
        "The shards do not depend on --workers. A pack that is interrupted leaves nothing that looks finished.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="what to pack, see below")
    parser.add_argument("dest", metavar="DEST", help="folder to make; index and shards appear in it together")
    parser.add_argument(
        "--shard-size",
        default="256MB",
        metavar="SIZE",
        help="samples (500) or bytes (64MB) of a shard; default %(default)s",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="crop the central square and resize it to R x R; default: keep each size",
    )
    parser.add_argument(
        "--format",
        dest="image_format",
        choices=("keep", "png", "jpg", "webp"),
        default="keep",
        help="re-encode images; `keep` leaves files that need no change as they are; default %(default)s",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=95,
        metavar="Q",
        help="quality of newly encoded jpg and webp, 1 to 100; default %(default)s",
    )
    parser.add_argument(
        "--background",
        metavar="COLOR",
        help="composite all transparent images on white, black, gray or #rrggbb (default: on white those that are "
        "changed anyway; others keep their transparency, for data.background to decide)",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="follow links in a folder that lead out of it, or to folders (default: only links to files inside it)",
    )
    parser.add_argument(
        "--no-shuffle",
        dest="shuffle",
        action="store_false",
        help="keep the source's order (default: a random order given by --seed)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the shuffle, the held-out lines and built-in points; default %(default)s",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put this share of the lines of text into DEST/held-out, for metrics to compare with; equal lines stay "
        "together; default: none",
    )
    parser.add_argument(
        "--points", type=int, metavar="N", help="number of points of a built-in mixture; default 100000"
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="an unreadable sample ends the pack, or is left out and reported; default %(default)s",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of shards that is already there")


def add_index(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Options of `index`."""
    parser = command(
        "index", "index tars that others wrote, so that they can be trained on",
        "SHARDS is a folder, a glob, a brace expansion such as s3://bucket/shard-{000000..000127}.tar, or a URL.\n"
        "A sample is a member named KEY.jpg, .png or .webp, KEY.npy, or KEY.txt, its label one named KEY.cls; texts\n"
        "and arrays beside images are passed over, and so is whatever else is in the tar: what there was of each is\n"
        "said at the end. Of images only headers and labels are read.\n"
        "The index is written beside local shards; elsewhere, name it with --out. One that is there keeps its class\n"
        "names, and is not replaced if it lists shards that are still there and not among these.",
    )  # fmt: skip
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="the tars, see below")
    parser.add_argument("--out", metavar="PATH", help="folder or file for the index; default: beside the shards")
    parser.add_argument(
        "--last-dot",
        action="store_true",
        help="begin the extension of a member at the last dot of its name: Track 2.0.png is then an image (default: at "
        "the first dot, as in WebDataset)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if a shard holds no sample (default: leave it out and say so)"
    )
    parser.add_argument("--verify", action="store_true", help="read all of every shard and record its SHA-256")
