"""What each command takes on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from distgan.cli.data_options import add_index, add_pack

AddCommand = Callable[..., argparse.ArgumentParser]
"""Adds a command of a name, with a summary of a line and, if there is more to say, that."""


def add_commands(command: AddCommand) -> None:
    """Add all commands with their options."""
    for add in (
        add_pack,
        add_index,
        _train,
        _trace,
        _sample,
        _evaluate,
        _probe,
        _export,
        _stop,
        _status,
        _doctor,
        _schema,
    ):
        add(command)


def _train(command: AddCommand) -> None:
    parser = command(
        "train", "train a run, or continue it",
        "Alone, or on N ranks:\n"
        "  accelerate launch --multi_gpu --num_processes N -m distgan train CONFIG\n"
        "  torchrun --nproc-per-node N -m distgan train CONFIG\n"
        "SIGTERM, SIGUSR1, SIGHUP, Ctrl-C and `distgan stop` save a checkpoint and leave; status.json in the run\n"
        "folder says how a run ended. Every key of CONFIG is explained by `distgan schema`.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a YAML recipe, such as configs/digits-dcgan.yaml")
    _add_overrides(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue from the newest valid checkpoint of run_dir (default), "
        "start over and set the old course aside, or continue from a given checkpoint or run",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=("data", "seed", "batch", "statistics"),
        help="continue although this differs from the checkpoint; may be repeated",
    )


def _trace(command: AddCommand) -> None:
    parser = command(
        "trace", "print which sample each rank gets at each step, as JSON lines",
        "Nothing is trained or decoded: the order is a function of the seed and the position in the stream.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="a YAML recipe")
    _add_overrides(parser)
    parser.add_argument("--steps", required=True, metavar="A:B", help="steps A to B-1, counted from 0")
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="W", help="ranks to divide each batch among; default %(default)s"
    )


def _sample(command: AddCommand) -> None:
    parser = command("sample", "draw samples from a run, a checkpoint or an export")
    parser.add_argument(
        "source", metavar="RUN_OR_EXPORT", help="a run folder, a checkpoint in it, or an exported generator"
    )
    parser.add_argument("--num", type=int, metavar="N", help="samples, or paths between images; default 64, or 8 paths")
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="images: a .png for a grid, else a folder of PNGs; with --interpolate .png, .gif or .webp; text: a .txt; "
        "points: a .png or .npy",
    )
    parser.add_argument(
        "--interpolate",
        type=int,
        metavar="STEPS",
        help="paths of so many images between pairs: rows of a .png, or an animation (.gif, .webp)",
    )
    parser.add_argument(
        "--linear", action="store_true", help="paths along straight lines between latents; default: along arcs"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="sample i is a function of the seed and i; default %(default)s"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="classes by number or name, repeated in turn; default: as frequent as in the data",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, metavar="B", help="samples at a time; default %(default)s"
    )
    _add_best(parser)


def _evaluate(command: AddCommand) -> None:
    parser = command(
        "evaluate", "measure a run or checkpoint against its data",
        "Prints the metrics as JSON. Also on N ranks under `accelerate launch`, with the same result.",
    )  # fmt: skip
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint in it")
    _add_overrides(parser, "changes to how it is measured, such as evaluation.num_samples=50000")
    _add_best(parser)


def _probe(command: AddCommand) -> None:
    parser = command(
        "probe", "measure how well a discriminator's features tell classes apart",
        "A linear classifier of its convolutions' features, max-pooled to 4x4 (Radford et al. 2016), beside\n"
        "one of raw pixels, tested on samples that they were not fitted to. Prints the accuracies as JSON.",
    )  # fmt: skip
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="a run folder, or a checkpoint in it")
    parser.add_argument("--data", metavar="SHARDS", help="labeled shards to fit to; default: those of the run")
    parser.add_argument(
        "--test", metavar="SHARDS", help="labeled shards to test on; default: a fifth of the others, held out"
    )
    parser.add_argument(
        "--num", type=int, default=10_000, metavar="N", help="samples of each part at most; default %(default)s"
    )
    parser.add_argument(
        "--classifier",
        choices=("svm", "logistic"),
        default="svm",
        help="an L2-SVM, as in the paper, or logistic regression; default %(default)s",
    )
    _add_best(parser)


def _export(command: AddCommand) -> None:
    parser = command("export", "write a run's generator as config.json and model.safetensors")
    parser.add_argument("source", metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("dest", metavar="DEST", help="folder to make; load it with distgan.load_generator(DEST)")
    _add_best(parser)


def _stop(command: AddCommand) -> None:
    parser = command("stop", "ask a running job to save a checkpoint and leave")
    _add_run(parser)


def _status(command: AddCommand) -> None:
    parser = command(
        "status", "print how a run stands, on one line for scripts",
        "The line is OUTCOME CHECKPOINT REASON: none, running, finished, preempted, failed, or lost, which is failed\n"
        "for want of a rank only; the step of the newest checkpoint, -1 without any; and why.",
    )  # fmt: skip
    parser.add_argument(
        "--launch", metavar="ID",
        help="how the launch that torchrun knows by this --rdzv-id left it: `unstarted` if it never trained there",
    )  # fmt: skip
    _add_run(parser)


def _doctor(command: AddCommand) -> None:
    parser = command(
        "doctor", "look at a machine or cluster before training on it",
        "Alone, or on all ranks as training would be started:\n"
        "  accelerate launch --multi_gpu --num_processes N -m distgan doctor CONFIG\n"
        "  srun --ntasks-per-node=1 launch/slurm/node.sh doctor CONFIG\n"
        "Versions, devices, the network between ranks, clocks and the run folder; with CONFIG also the data, and some\n"
        "steps in a folder that is removed. Exits with 1 if something FAILED.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a YAML recipe; omit it to check the machine only")
    _add_overrides(parser)


def _schema(command: AddCommand) -> None:
    command(
        "schema", "print the JSON Schema of a recipe, for editors and for reading",
        "Every key with its type, default and meaning. In VS Code: yaml.schemas in the settings, on a file of this.",
    )  # fmt: skip


def _add_overrides(
    parser: argparse.ArgumentParser, what: str = "changes to the recipe, such as training.steps=1000"
) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help=f"{what}; a value is taken as typed, except that lists and mappings are YAML, as in "
        "evaluation.metrics=[fid,kid]",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN_OR_CONFIG",
        help="the run folder, as any machine sees it, or the recipe that the run was started with",
    )
    _add_overrides(parser, "of a recipe, the changes that the run was started with")


def _add_best(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best", action="store_true", help="of a run, the checkpoint with the best evaluation; default: the newest"
    )
