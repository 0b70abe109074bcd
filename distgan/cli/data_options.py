"""Options of the commands that make shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def add_pack(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command `pack` with its options."""
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
        "  builtin:ring or builtin:grid, points of 8 or 25 normal distributions, whose numbers are the labels\n"
        "  --stack makes StackedMNIST of MNIST's images file: 1,000 classes of three digits each\n\n"
        "The shards do not depend on --workers. A pack that is interrupted leaves nothing that looks finished.",
    )  # fmt: skip
    parser.add_argument("source", metavar="SOURCE", help="samples to pack, see below")
    parser.add_argument("dest", metavar="DEST", help="folder to create")
    parser.add_argument(
        "--shard-size",
        default="256MB",
        metavar="SIZE",
        help="size of a shard in samples (500) or bytes (64MB) (default: %(default)s)",
    )
    parser.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="height and width in pixels; crops the central square and resizes it (default: keep each size)",
    )
    parser.add_argument(
        "--format",
        dest="image_format",
        choices=("keep", "png", "jpg", "webp"),
        default="keep",
        help="format of the images in the shards; `keep` copies files that need no change (default: %(default)s)",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=95,
        metavar="Q",
        help="quality of newly encoded jpg and lossy webp, 1 to 100 (default: %(default)s)",
    )
    parser.add_argument(
        "--background",
        metavar="COLOR",
        help="white, black, gray or #rrggbb: composite all transparent images on it (default: composite on white those "
        "that are re-encoded anyway, and keep the others transparent)",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="follow symbolic links out of the folder and to folders (default: only to files inside it)",
    )
    parser.add_argument(
        "--no-shuffle",
        dest="shuffle",
        action="store_false",
        help="keep the order of the source (default: shuffle by --seed)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed for shuffling, the held-out split, built-in points and --stack (default: %(default)s)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="fraction of the lines of text to put into DEST/held-out, for metrics; equal lines stay together "
        "(default: none)",
    )
    parser.add_argument(
        "--points", type=int, metavar="N", help="number of points of a built-in mixture (default: 100000)"
    )
    parser.add_argument(
        "--stack",
        type=int,
        nargs="?",
        const=128_000,
        metavar="N",
        help="make N RGB images of gray digits: the channels of each are three random digits a, b and c, and its label "
        "is 100 a + 10 b + c (N is 128000 if you leave it out, as for StackedMNIST)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="end at an unreadable sample, or leave it out and report it (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder of shards")


def add_index(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command `index` with its options."""
    parser = command(
        "index", "index tars that others wrote, so that they can be trained on",
        "SHARDS is a folder, a glob, a brace expansion such as s3://bucket/shard-{000000..000127}.tar, or a URL.\n"
        "A sample is a member named KEY.jpg, .png, .webp, .npy or .txt; its label is a member named KEY.cls. Texts\n"
        "and arrays beside images are skipped. The command counts what it skips, with an example. KEY.moments.npy and\n"
        "KEY.latent.npy are latents of an autoencoder, and images beside them are skipped.\n"
        "The index is written beside local shards; name it with --out for others. An earlier index keeps its class\n"
        "names. It is not replaced if it lists existing shards that are not among these.",
    )  # fmt: skip
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="tars to index, see below")
    parser.add_argument("--out", metavar="PATH", help="folder or file of the index (default: beside the shards)")
    parser.add_argument(
        "--extension",
        metavar="EXT",
        help="extension of the files that are samples, such as tif or 'tif;tiff', for data.stages (default: images, or "
        "arrays, or texts)",
    )
    parser.add_argument(
        "--last-dot",
        action="store_true",
        help="begin extensions at the last dot of a name, so that Track 2.0.png is an image (default: at the first "
        "dot, as in WebDataset)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail if a shard holds no sample (default: leave it out and report it)"
    )
    parser.add_argument("--verify", action="store_true", help="read every shard whole and record its SHA-256")
    parser.add_argument(
        "--latents",
        choices=("moments", "latent"),
        help="what members named KEY.npy hold of an autoencoder: means and logarithms of variances, or a latent "
        "(default: points; latents are in KEY.moments.npy or KEY.latent.npy)",
    )
    add_normalization(parser)


def add_normalization(parser: argparse.ArgumentParser) -> None:
    """Add the options for the shift and scale of latents."""
    for name, what in (("shift", "the mean"), ("scale", "1 over the standard deviation")):
        parser.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X",
            help=f"{name} of latents: networks see (latent - shift) scale; one number, or one per channel (default: "
            f"{what} of each channel)",
        )  # fmt: skip


def add_encode(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the command `encode` with its options."""
    parser = command(
        "encode", "write the latents of image shards, to train on in place of images",
        "Alone, or on N ranks, which share the shards:\n"
        "  torchrun --nproc-per-node N -m distgan encode SHARDS DEST --encoder VAE --resolution 256\n"
        "VAE is a run or an export of an autoencoder, a folder of diffusers' AutoencoderKL (config.json and\n"
        "safetensors; needs distgan[latents]), or the import path of a module of yours, with options as key=value.\n"
        "docs/latents.md says what it must do.\n"
        "An encode that was killed goes on with the shards that are missing, if you give the same command again.",
    )  # fmt: skip
    parser.add_argument("shards", metavar="SHARDS", help="image shards: a folder, a glob, a brace expansion or a URL")
    parser.add_argument("dest", metavar="DEST", help="folder to create")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="options of an encoder of yours")
    parser.add_argument("--encoder", required=True, metavar="PATH|package.module:Name", help="see above")
    parser.add_argument(
        "--resolution", type=int, required=True, metavar="R", help="height and width of the images, in pixels"
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), default=3, help="channels of the images (default: %(default)s)"
    )
    parser.add_argument("--flips", action="store_true", help="also encode the mirror images, for data.mirror")
    parser.add_argument(
        "--images", action="store_true", help="also store the image files, for metrics and objective.alignment"
    )
    parser.add_argument("--half", action="store_true", help="store half precision (default: single precision)")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="B", help="images per forward pass (default: %(default)s)"
    )
    add_normalization(parser)
