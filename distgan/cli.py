"""The command line: `distgan COMMAND`, or `python -m distgan COMMAND` under a launcher.

Everything heavy is imported inside the command that needs it, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from distgan import __version__
from distgan.errors import LostRankError, UserError

_DESCRIPTION = """\
Train GANs across machines, resume them exactly, and compare them by numbers that can be trusted."""

_EXAMPLES = """\
from images to a generator:
  distgan pack photos/ datasets/photos --resolution 64
  accelerate launch --multi_gpu --num_processes 8 -m distgan train configs/photos.yaml
  distgan evaluate runs/photos
  distgan sample runs/photos --num 64 --out samples.png
  distgan export runs/photos exported/
"""


class _OutputError(Exception):
    """The standard output cannot be written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, with 2 for a mistake of the user's, with 1 for anything else."""
    options = _parse(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    try:
        command(options)
    except _OutputError as error:
        _discard_output()
        print(f"distgan: error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except UserError as error:
        if not error.everywhere or _is_first("RANK"):
            print(f"distgan: error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except KeyboardInterrupt:
        print("distgan: interrupted", file=sys.stderr, flush=True)
        _leave(130)
    except LostRankError as error:
        print(f"distgan: error: {error}", file=sys.stderr, flush=True)
        _leave(1)
    except BrokenPipeError:
        _discard_output()
        raise SystemExit(1) from None
    except Exception:
        traceback.print_exc()
        _leave(1)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one go only, but `train CONFIG --resume never key=value` is natural.
    strange = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(options, "overrides")]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _is_first(rank: str) -> bool:
    """Whether the launcher made this the first process, of all (`RANK`) or of its machine (`LOCAL_RANK`)."""
    alone = _natural("WORLD_SIZE") in (None, 0, 1)
    return alone or os.environ.get(rank, "0") in ("", "0")


def _natural(variable: str) -> int | None:
    """A whole number in the environment; None for anything else."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() and len(text) < 10 else None


def _check_launch() -> None:
    """Refuse an environment that promises other processes without saying how to find them. Raises UserError."""
    if "WORLD_SIZE" not in os.environ:
        return
    fix = "unset it, or start with `accelerate launch` or `torchrun`"
    world_size = _natural("WORLD_SIZE")
    if not world_size:
        found = os.environ["WORLD_SIZE"][:80]
        raise UserError(f"WORLD_SIZE={found!r} in the environment: expected a number of processes; {fix}")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world_size > 1 and missing:
        raise UserError(
            f"WORLD_SIZE={world_size} in the environment, but no {', '.join(missing)}; {fix}", everywhere=True
        )
    rank = _natural("RANK")
    if world_size > 1 and (rank is None or rank >= world_size):
        raise UserError(
            f"RANK={os.environ['RANK'][:80]!r} in the environment: expected a number below WORLD_SIZE={world_size}; "
            + fix
        )


def _print(text: object) -> None:
    """A line of a command's result."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _OutputError(f"cannot write to the standard output: {error.strerror or error}") from None


def _discard_output() -> None:
    """Let what is buffered go nowhere, or the interpreter would fail on it once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _leave(status: int) -> None:
    """Exit now when other ranks may be waiting: an orderly shutdown of a process group would wait for them too."""
    if "WORLD_SIZE" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distgan", description=_DESCRIPTION, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"distgan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], None], summary: str, more: str = "") -> Any:
        added = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        added.set_defaults(command=run)
        return added

    pack = command(
        "pack", _pack, "turn images, text or points into WebDataset shards with an index",
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
    pack.add_argument("source", metavar="SOURCE", help="what to pack, see below")
    pack.add_argument("dest", metavar="DEST", help="folder to make; index and shards appear in it together")
    pack.add_argument(
        "--shard-size",
        default="256MB",
        metavar="SIZE",
        help="samples (500) or bytes (64MB) of a shard; default %(default)s",
    )
    pack.add_argument(
        "--resolution",
        type=int,
        metavar="R",
        help="crop the central square and resize it to R x R; default: keep each size",
    )
    pack.add_argument(
        "--format",
        dest="image_format",
        choices=("keep", "png", "jpg", "webp"),
        default="keep",
        help="re-encode images; `keep` leaves files that need no change as they are; default %(default)s",
    )
    pack.add_argument(
        "--quality",
        type=int,
        default=95,
        metavar="Q",
        help="of newly encoded jpg and webp, 1 to 100; default %(default)s",
    )
    pack.add_argument(
        "--no-shuffle",
        dest="shuffle",
        action="store_false",
        help="keep the source's order (default: a random order given by --seed)",
    )
    pack.add_argument(
        "--seed", type=int, default=0, help="of the shuffle, of what is held out and of built-in points; %(default)s"
    )
    pack.add_argument(
        "--held-out",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="put this share of the lines of text into DEST/held-out, for metrics to compare with; equal lines stay "
        "together; default: none",
    )
    pack.add_argument(
        "--points", type=int, default=100_000, metavar="N", help="of a built-in mixture; default %(default)s"
    )
    pack.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="an unreadable sample ends the pack, or is left out and reported; default %(default)s",
    )
    pack.add_argument("--workers", type=int, metavar="N", help="processes; default: one a core")
    pack.add_argument("--overwrite", action="store_true", help="replace a folder of shards that is already there")

    index = command(
        "index", _index, "index tars that others wrote, so that they can be trained on",
        "SHARDS is a folder, a glob, a brace expansion such as s3://bucket/shard-{000000..000127}.tar, or a URL.\n"
        "A sample is a member named KEY.jpg, .png or .webp, KEY.npy, or KEY.txt, its label one named KEY.cls; texts\n"
        "and arrays beside images are passed over. Of images only headers and labels are read.\n"
        "The index is written beside local shards; elsewhere, name it with --out.",
    )  # fmt: skip
    index.add_argument("shards", metavar="SHARDS", nargs="+", help="the tars, see below")
    index.add_argument("--out", metavar="PATH", help="folder or file for the index; default: beside the shards")
    index.add_argument("--verify", action="store_true", help="read all of every shard and record its SHA-256")

    train = command(
        "train", _train, "train a run, or continue it",
        "Alone, or on N ranks:\n"
        "  accelerate launch --multi_gpu --num_processes N -m distgan train CONFIG\n"
        "  torchrun --nproc-per-node N -m distgan train CONFIG\n"
        "SIGTERM, SIGUSR1, Ctrl-C and `distgan stop` save a checkpoint and leave; status.json in the run folder says\n"
        "how a run ended. Every key of CONFIG is explained by `distgan schema`.",
    )  # fmt: skip
    train.add_argument("config", metavar="CONFIG", help="a YAML recipe, such as configs/digits-dcgan.yaml")
    _add_overrides(train)
    train.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue from the newest valid checkpoint of run_dir (default), "
        "start over and set the old course aside, or continue from a given checkpoint or run",
    )
    train.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=("data", "seed", "batch", "statistics"),
        help="continue although this differs from the checkpoint; may be repeated",
    )

    trace = command(
        "trace", _trace, "print which sample each rank gets at each step, as JSON lines",
        "Nothing is trained or decoded: the order is a function of the seed and the position in the stream.",
    )  # fmt: skip
    trace.add_argument("config", metavar="CONFIG", help="a YAML recipe")
    _add_overrides(trace)
    trace.add_argument("--steps", required=True, metavar="A:B", help="steps A to B-1, counted from 0")
    trace.add_argument(
        "--world-size", type=int, default=1, metavar="W", help="ranks to divide each batch among; default %(default)s"
    )

    sample = command("sample", _sample, "draw images from a run, a checkpoint or an export")
    sample.add_argument(
        "source", metavar="RUN_OR_EXPORT", help="a run folder, a checkpoint in it, or an exported generator"
    )
    sample.add_argument("--num", type=int, default=64, metavar="N", help="images; default %(default)s")
    sample.add_argument(
        "--out", required=True, metavar="PATH", help="a file ending in .png for a grid, else a folder of PNGs"
    )
    sample.add_argument(
        "--seed", type=int, default=0, help="image i is a function of the seed and i; default %(default)s"
    )
    sample.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="classes by number or name, repeated in turn; default: as frequent as in the data",
    )
    sample.add_argument("--batch-size", type=int, default=64, metavar="B", help="images at a time; default %(default)s")
    _add_best(sample)

    evaluate = command(
        "evaluate", _evaluate, "measure a run or checkpoint against its data",
        "Prints the metrics as JSON. Also on N ranks under `accelerate launch`, with the same result.",
    )  # fmt: skip
    evaluate.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint in it")
    _add_overrides(evaluate)
    _add_best(evaluate)

    export = command("export", _export, "write a run's generator as config.json and model.safetensors")
    export.add_argument("source", metavar="RUN", help="a run folder, or a checkpoint in it")
    export.add_argument("dest", metavar="DEST", help="folder to make; load it with distgan.load_generator(DEST)")
    _add_best(export)

    stop = command("stop", _stop, "ask a running job to save a checkpoint and leave")
    _add_run(stop)

    status = command(
        "status", _status, "print how a run stands, on one line for scripts",
        "The line is OUTCOME CHECKPOINT REASON: none, running, finished, preempted, failed, or lost, which is failed\n"
        "for want of a rank only; the step of the newest checkpoint, -1 without any; and why.",
    )  # fmt: skip
    _add_run(status)

    doctor = command(
        "doctor", _doctor, "look at a machine or cluster before training on it",
        "Alone, or on all ranks as training would be started:\n"
        "  accelerate launch --multi_gpu --num_processes N -m distgan doctor CONFIG\n"
        "  srun --ntasks-per-node=1 launch/slurm/node.sh doctor CONFIG\n"
        "Versions, devices, the network between ranks, clocks and the run folder; with CONFIG also the data, and some\n"
        "steps in a folder that is removed. Exits with 1 if something FAILED.",
    )  # fmt: skip
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML recipe; without it, what needs none")
    _add_overrides(doctor)

    command(
        "schema", _schema, "print the JSON Schema of a recipe, for editors and for reading",
        "Every key with its type, default and meaning. In VS Code: yaml.schemas in the settings, on a file of this.",
    )  # fmt: skip
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to the config, such as training.steps=1000"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN_OR_CONFIG", help="its run folder, as any machine sees it, or the recipe it was started with"
    )
    _add_overrides(parser)


def _add_best(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best", action="store_true", help="of a run, the checkpoint with the best evaluation; default: the newest"
    )


def _pack(options: argparse.Namespace) -> None:
    if not options.source or not options.dest:
        raise UserError("pack: SOURCE or DEST is empty; name what to pack and the folder to make")
    from distgan.data.pack import pack
    from distgan.monitoring.console import progress_bar

    with progress_bar("packing") as progress:
        report = pack(
            options.source, options.dest, shard_size=options.shard_size, resolution=options.resolution,
            image_format=options.image_format, quality=options.quality, shuffle=options.shuffle, seed=options.seed,
            held_out=options.held_out, points=options.points, on_error=options.on_error, workers=options.workers,
            overwrite=options.overwrite, progress=progress,
        )  # fmt: skip
    for note in (*report.notes, *(f"left out: {name}" for name in report.skipped)):
        print(f"distgan: {note}", file=sys.stderr)
    classes = f" of {report.num_classes} classes" if report.num_classes else ", no labels"
    held_out = f"; {report.held_out} more in held-out" if report.held_out else ""
    size = f"{report.shards} shards, {report.size / 1e6:.1f} MB"
    _print(f"{report.dest}: {report.samples} samples{classes} in {size}{held_out}")


def _index(options: argparse.Namespace) -> None:
    from distgan.data import locations
    from distgan.data.index import save_index
    from distgan.data.indexing import build_index
    from distgan.monitoring.console import progress_bar

    destination = options.out or locations.common_folder(locations.expand(options.shards))
    if not destination or destination.startswith(("http://", "https://")):
        raise UserError(
            f"{' '.join(options.shards)}: an index cannot be written beside these shards; name a folder with --out"
        )
    with progress_bar("indexing") as progress:
        index = build_index(options.shards, verify=options.verify, progress=progress)
    path = save_index(index, destination)
    classes = f" of {index.num_classes} classes" if index.num_classes else ", no labels"
    _print(f"{path}: {len(index)} samples{classes} in {len(index.shards)} shards, fingerprint {index.fingerprint[:12]}")


def _train(options: argparse.Namespace) -> None:
    _check_launch()
    config = _load_config(options)
    if config.data.workers:
        from distgan.data.workers import start_worker_server

        start_worker_server()  # it imports torch while this process does
    from distgan.training.loop import train

    train(config, resume=options.resume, accept=options.accept)


def _trace(options: argparse.Namespace) -> None:
    config = _load_config(options)
    from distgan.training.trace import trace

    first, colon, last = options.steps.partition(":")
    if not colon or not all(step.isdecimal() and len(step) <= 18 for step in (first, last)):
        raise UserError(f"--steps {options.steps[:80]}: expected A:B with A < B < 2**40, such as 0:10")
    for line in trace(config, int(first), int(last), options.world_size):
        _print(json.dumps(line))


def _sample(options: argparse.Namespace) -> None:
    from distgan.sample import sample

    path = sample(
        options.source, options.out, number=options.num, seed=options.seed, labels=options.labels,
        batch_size=options.batch_size, best=options.best,
    )  # fmt: skip
    _print(path)


def _evaluate(options: argparse.Namespace) -> None:
    _check_launch()
    from distgan.training.evaluate_run import evaluate

    metrics = evaluate(options.source, options.overrides, best=options.best)
    if _is_first("RANK"):
        _print(json.dumps(metrics))


def _export(options: argparse.Namespace) -> None:
    from distgan.export import export

    _print(export(options.source, options.dest, best=options.best))


def _stop(options: argparse.Namespace) -> None:
    from distgan.training.preemption import request_stop
    from distgan.training.standing import run_folder_of

    folder = run_folder_of(options.run, options.overrides)
    request_stop(folder)
    _print(f"{folder}: asked to stop; status.json there will say `preempted` when it has")


def _status(options: argparse.Namespace) -> None:
    from distgan.training.standing import run_folder_of, standing

    _print(standing(run_folder_of(options.run, options.overrides)))


def _doctor(options: argparse.Namespace) -> None:
    _check_launch()
    config = _load_config(options) if options.config else None
    from distgan.doctor import examine

    if not examine(config, _print):
        _leave(1)


def _schema(_: argparse.Namespace) -> None:
    from distgan.config import json_schema

    _print(json.dumps(json_schema(), indent=1))


def _load_config(options: argparse.Namespace) -> Any:
    from distgan.config import load_config

    try:
        return load_config(options.config, options.overrides)
    except UserError:
        # The ranks of one machine read the same file; another machine may lack it.
        if _is_first("LOCAL_RANK"):
            raise
        raise SystemExit(2) from None
