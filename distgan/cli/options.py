"""Options of each command."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from distgan.cli.data_options import add_encode, add_index, add_pack

AddCommand = Callable[..., argparse.ArgumentParser]
"""Adds a command of a name, with a summary of a line and, if there is more to say, that."""


def add_commands(command: AddCommand) -> None:
    """Add all commands with their options."""
    for add in (
        add_pack,
        add_index,
        add_encode,
        _train,
        _trace,
        _sample,
        _evaluate,
        _probe,
        _average,
        _merge,
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
        "SIGTERM, SIGUSR1, SIGHUP, Ctrl-C and `distgan stop` save a checkpoint and leave. status.json in the run\n"
        "folder says how the run ended. docs/config.md and `distgan schema` explain every key of CONFIG.\n"
        "Exits with 0 if the run is finished or was stopped by one of these, 2 after an error of one line with its\n"
        "fix, 130 after a second Ctrl-C, and 1 after other failures. Launchers turn 2 and 130 into 1.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="YAML recipe, such as configs/digits-dcgan.yaml")
    _add_overrides(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="continue from the newest valid checkpoint of run_dir, start over and set the old checkpoints aside, or "
        "continue from a given checkpoint or run (default: auto)",
    )
    parser.add_argument(
        "--accept",
        action="append",
        default=[],
        choices=("data", "seed", "batch", "statistics", "code"),
        help="continue although this differs from the checkpoint; repeat the option to accept more",
    )
    _add_allow(parser)


def _trace(command: AddCommand) -> None:
    parser = command(
        "trace", "print which sample each rank gets at each step, as JSON lines",
        "Nothing is trained or decoded. The order is a function of the seed and the stream position.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", help="YAML recipe")
    _add_overrides(parser)
    parser.add_argument("--steps", required=True, metavar="A:B", help="range of steps: A to B-1, counted from 0")
    parser.add_argument(
        "--world-size",
        type=int,
        default=1,
        metavar="W",
        help="number of ranks that share each batch (default: %(default)s)",
    )
    _add_allow(parser)


def _sample(command: AddCommand) -> None:
    parser = command("sample", "draw samples from a run, a checkpoint or an export")
    parser.add_argument(
        "source",
        metavar="RUN_OR_EXPORT",
        help="run folder or its URL, checkpoint, or exported generator; hf://USER/NAME is one on the Hugging Face Hub",
    )
    parser.add_argument(
        "--num",
        type=int,
        metavar="N",
        help="number of samples, or of paths with --interpolate (default: 64, or 8 paths)",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help="file or folder to write; images: .png for a grid, else a folder of PNGs; with --interpolate: .png, .gif "
        "or .webp; text: .txt; points: .png or .npy",
    )
    parser.add_argument(
        "--interpolate",
        type=int,
        metavar="STEPS",
        help="number of images per path between two latents: rows of a .png, or an animation (.gif, .webp)",
    )
    parser.add_argument(
        "--linear", action="store_true", help="interpolate along straight lines between latents (default: along arcs)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed; sample i is a function of the seed and i (default: %(default)s)",
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="classes to draw, by number or name, in turn (default: as frequent as in the data)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=64,
        metavar="B",
        help="number of samples per forward pass (default: %(default)s)",
    )
    _add_truncation(parser)
    _add_best(parser)


def _evaluate(command: AddCommand) -> None:
    parser = command(
        "evaluate", "measure a run or checkpoint against its data, or one set of images against another",
        "Prints the step of the checkpoint and the metrics as one JSON object. Under `accelerate launch`, N ranks\n"
        "share the work and get the same result.\n\n"
        "  distgan evaluate --images GENERATED REAL evaluation.metrics=[fid,kid]\n"
        "compares the images of any program, each set a folder or zip of images, a folder of shards, or an .npz file\n"
        "of pixels arr_0. It prints the numbers of images in place of the step.",
    )  # fmt: skip
    parser.add_argument(
        "source",
        metavar="RUN_OR_CHECKPOINT",
        nargs="?",
        help="run folder or its URL, or a checkpoint in it (none with --images)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="SET",
        help="generated images and real images, in this order, to compare without a run; the generated ones alone with "
        "--real-statistics, or for inception_score",
    )
    _add_overrides(parser, "changes to the evaluation, such as evaluation.num_samples=50000")
    parser.add_argument(
        "--real-statistics",
        metavar="FILE",
        help=".npz file with the mean `mu` and covariance `sigma` of the detector's features, as published for "
        "pytorch-fid, clean-fid and ADM, to compare with in place of the data; only for fid",
    )
    _add_truncation(parser)
    _add_best(parser)


def _probe(command: AddCommand) -> None:
    parser = command(
        "probe", "measure how well a discriminator's features tell classes apart",
        "Fits a linear classifier to the features of its convolutions, max-pooled to 4x4 (Radford et al. 2016), and\n"
        "another to raw pixels. Prints their accuracies on held-out samples as JSON.",
    )  # fmt: skip
    parser.add_argument("source", metavar="RUN_OR_CHECKPOINT", help="run folder, or a checkpoint in it")
    parser.add_argument("--data", metavar="SHARDS", help="labeled shards to fit to (default: those of the run)")
    parser.add_argument(
        "--test", metavar="SHARDS", help="labeled shards to test on (default: a held-out fifth of --data)"
    )
    parser.add_argument(
        "--num",
        type=int,
        default=10_000,
        metavar="N",
        help="largest number of samples of each part (default: %(default)s)",
    )
    parser.add_argument(
        "--classifier",
        choices=("svm", "logistic"),
        default="svm",
        help="L2-SVM, as in the paper, or logistic regression (default: %(default)s)",
    )
    _add_best(parser)


def _average(command: AddCommand) -> None:
    parser = command(
        "average", "average a run's weights over time with any width, after training",
        "The run must have kept power-function averages, as with ema.profiles=[0.05,0.1]. The result is a folder that\n"
        "evaluate, sample and export take in place of a checkpoint.",
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--std",
        type=float,
        required=True,
        metavar="STD",
        help="width: standard deviation of the average's weights over time, as a fraction of the training (0.01 to "
        "0.25)",
    )
    parser.add_argument("--out", metavar="PATH", help="folder to write (default: averages/std-STD-step-STEP in RUN)")


def _merge(command: AddCommand) -> None:
    parser = command(
        "merge", "write a checkpoint as one plain safetensors file per set of tensors",
        "The ranks of a run write a checkpoint in parts, NAME.r-of-W.safetensors. The result has one file,\n"
        "NAME.1-of-1.safetensors, for other tools. It is a checkpoint too: evaluate, sample and\n"
        "export take it, and train can resume from it.",
    )  # fmt: skip
    parser.add_argument("source", metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to create")
    _add_best(parser)


def _export(command: AddCommand) -> None:
    parser = command("export", "write a run's generator as config.json and model.safetensors, or as one .pt2 file")
    parser.add_argument("source", metavar="RUN", help="run folder, or a checkpoint in it")
    parser.add_argument(
        "dest",
        metavar="DEST",
        help="folder to create, for distgan.load_generator(DEST); with --format torch-export a file ending in .pt2",
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "torch-export"),
        default="safetensors",
        help="safetensors: a folder for distgan; torch-export: a program that torch.export.load runs without distgan "
        "(default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    parser.add_argument(
        "--push",
        metavar="USER/NAME",
        help="also push the export with a model card to this repository of the Hugging Face Hub; it is created if "
        "needed, and anyone can read it (needs distgan[hub] and a token: `hf auth login` or HF_TOKEN)",
    )
    parser.add_argument("--private", action="store_true", help="with --push: create a private repository")
    _add_best(parser)


def _stop(command: AddCommand) -> None:
    parser = command("stop", "ask a running job to save a checkpoint and leave")
    _add_run(parser)


def _status(command: AddCommand) -> None:
    parser = command(
        "status", "print how a run stands, on one line for scripts",
        "The line is OUTCOME CHECKPOINT REASON. OUTCOME is none, running, finished, preempted, diverged, failed,\n"
        "lost (failed because a rank was lost), or killed (was running on this host, and its process is gone).\n"
        "CHECKPOINT is the step of the newest checkpoint, or -1.",
    )  # fmt: skip
    parser.add_argument(
        "--launch", metavar="ID",
        help="--rdzv-id of a torchrun launch; print how that launch left the run, `unstarted` if it never trained",
    )  # fmt: skip
    _add_run(parser)


def _doctor(command: AddCommand) -> None:
    parser = command(
        "doctor", "look at a machine or cluster before training on it",
        "Alone, or on all ranks as training would be started:\n"
        "  accelerate launch --multi_gpu --num_processes N -m distgan doctor CONFIG\n"
        "  srun --ntasks-per-node=1 launch/slurm/node.sh doctor CONFIG\n"
        "Checks versions, devices, the network between ranks, clocks and the run folder. With CONFIG it also reads\n"
        "the data and trains some steps in a folder that it removes. Exits with 1 if a check FAILED.",
    )  # fmt: skip
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML recipe; omit it to check the machine only")
    _add_overrides(parser)
    _add_allow(parser)


def _schema(command: AddCommand) -> None:
    command(
        "schema", "print the JSON Schema of a recipe, for editors and for reading",
        "Each key has its type, default and meaning. Save the output to a file and name it in VS Code's yaml.schemas.",
    )  # fmt: skip


def _add_overrides(
    parser: argparse.ArgumentParser, what: str = "changes to the recipe, such as training.steps=1000"
) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help=f"{what}; a value is taken as typed; lists and mappings are YAML, as in evaluation.metrics=[fid,kid]",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN_OR_CONFIG",
        help="run folder or its URL, or the recipe that the run was started with",
    )
    _add_overrides(parser, "changes to the recipe that the run was started with")


def _add_allow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="run code of this package if a checkpoint, an export or a run folder names it; repeat the option to allow "
        "more (a recipe of yours allows what it names)",
    )


def _add_truncation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--truncation",
        type=float,
        metavar="T",
        help="draw normal latents from [-T, T] only, or move styles of stylegan2 and gat to their average by 1 - T: "
        "lower T gives less varied and often better samples (default: none)",
    )


def _add_best(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--best", action="store_true", help="use the checkpoint of a run with the best evaluation (default: the newest)"
    )
    _add_allow(parser)
