"""What each command does. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distgan.cli.output import write_line
from distgan.distributed.launch import check_launch, is_first, leave
from distgan.errors import UserError, counted, without_secrets


def _pack(options: argparse.Namespace) -> None:
    if not options.source or not options.dest:
        raise UserError("pack: SOURCE or DEST is empty; name what to pack and the folder to make")
    from distgan.data.packing.pack import pack
    from distgan.monitoring.console import progress_bar

    with progress_bar("packing") as progress:
        report = pack(
            options.source, options.dest, shard_size=options.shard_size, resolution=options.resolution,
            image_format=options.image_format, quality=options.quality, shuffle=options.shuffle, seed=options.seed,
            held_out=options.held_out, points=options.points, stack=options.stack, background=options.background,
            follow_links=options.follow_links, on_error=options.on_error, workers=options.workers,
            overwrite=options.overwrite, progress=progress,
        )  # fmt: skip
    for note in (*report.notes, *(f"left out: {name}" for name in report.skipped)):
        print(without_secrets(f"distgan: {note}"), file=sys.stderr)
    held_out = f"; {report.held_out} more in held-out" if report.held_out else ""
    size = f"{counted(report.shards, 'shard')}, {report.size / 1e6:.1f} MB"
    write_line(f"{report.dest}: {_samples(report.samples, report.num_classes)} in {size}{held_out}")


def _index(options: argparse.Namespace) -> None:
    from distgan.data.index.rebuild import write_index
    from distgan.monitoring.console import progress_bar

    with progress_bar("indexing") as progress:
        written = write_index(
            options.shards, options.out, verify=options.verify, strict=options.strict, last_dot=options.last_dot,
            extension=options.extension, progress=progress, latents=options.latents, shift=options.shift,
            scale=options.scale,
        )  # fmt: skip
    index, path = written.index, written.path
    for note in written.notes:
        print(without_secrets(f"distgan: {note}"), file=sys.stderr)
    shards = f"{counted(len(index.shards), 'shard')}, fingerprint {index.fingerprint[:12]}"
    write_line(f"{path}: {_samples(len(index), index.num_classes)} in {shards}")


def _encode(options: argparse.Namespace) -> None:
    check_launch()
    from distgan.autoencoders.encoding import encode
    from distgan.config.autoencoder import parse_autoencoder
    from distgan.distributed.runtime import leave_process_group
    from distgan.monitoring.console import progress_bar

    encoder = parse_autoencoder(options.encoder, options.overrides)
    with progress_bar("encoding") as progress:
        encoded = encode(
            options.shards, options.dest, encoder, resolution=options.resolution, channels=options.channels,
            flips=options.flips, float16=options.half, images=options.images, batch_size=options.batch_size,
            shift=options.shift, scale=options.scale, progress=progress,
        )  # fmt: skip
    leave_process_group()
    if not is_first("RANK"):
        return
    for note in encoded.notes:
        print(without_secrets(f"distgan: {note}"), file=sys.stderr)
    index, stored = encoded.index, encoded.stored
    sizes = f"{stored.channels}x{stored.resolution}x{stored.resolution}"
    write_line(f"{options.dest}: latents {sizes} of {_samples(len(index), index.num_classes)}")


def _samples(number: int, num_classes: int) -> str:
    labels = f" of {counted(num_classes, 'class', 'classes')}" if num_classes else ", no labels,"
    return counted(number, "sample") + labels


def _train(options: argparse.Namespace) -> None:
    check_launch()
    config = _load_config(options)
    if config.data.num_workers:
        from distgan.data.loader_processes import start_worker_server

        start_worker_server()  # it imports torch while this process does
    from distgan.distributed.runtime import leave_process_group
    from distgan.training.loop import train

    train(config, resume=options.resume, accept=options.accept)
    leave_process_group()


def _trace(options: argparse.Namespace) -> None:
    config = _load_config(options)
    from distgan.training.trace import trace

    first, colon, last = options.steps.partition(":")
    if not colon or not all(step.isdecimal() and len(step) <= 18 for step in (first, last)):
        raise UserError(f"--steps {options.steps[:80]}: expected A:B with A < B < 2**40, such as 0:10")
    for line in trace(config, int(first), int(last), options.world_size):
        write_line(json.dumps(line))


def _sample(options: argparse.Namespace) -> None:
    from distgan.inference.sample import sample, sample_paths

    shared = {name: getattr(options, name) for name in ("seed", "labels", "batch_size", "best", "truncation")}
    if options.num is not None:
        shared["number"] = options.num
    if options.interpolate is not None:
        write_line(
            sample_paths(options.source, options.out, steps=options.interpolate, linear=options.linear, **shared)
        )
    elif options.linear:
        raise UserError("--linear is about paths between images; add --interpolate STEPS, or leave it out")
    else:
        write_line(sample(options.source, options.out, **shared))


def _evaluate(options: argparse.Namespace) -> None:
    check_launch()
    from distgan.distributed.runtime import leave_process_group
    from distgan.inference.evaluate import evaluate, evaluate_images

    if options.images is not None:
        if options.source is not None or options.best or options.truncation is not None:
            raise UserError(
                "--images: compares images without a run; leave out RUN_OR_CHECKPOINT, --best, --truncation"
            )
        generated, real = options.images
        metrics = evaluate_images(generated, real, options.overrides, real_statistics=options.real_statistics)
    else:
        metrics = evaluate(
            options.source or "", options.overrides, best=options.best, truncation=options.truncation,
            real_statistics=options.real_statistics,
        )  # fmt: skip
    leave_process_group()
    if is_first("RANK"):
        # JSON has no NaN and no Infinity; rows of metrics.jsonl have null too.
        write_line(json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}))


def _probe(options: argparse.Namespace) -> None:
    from distgan.inference.probe import probe

    report = probe(
        options.source, data=options.data, test=options.test, number=options.num, classifier=options.classifier,
        best=options.best,
    )  # fmt: skip
    write_line(json.dumps(report))


def _average(options: argparse.Namespace) -> None:
    from distgan.inference.post_hoc import average

    made = average(options.run, options.std, options.out)
    write_line(
        f"{made.path}: from {counted(made.snapshots, 'snapshot')}; {made.distance:.1%} off an average of this width; "
        f"rounding errors grow at most {made.amplification:.3g} times"
    )


def _merge(options: argparse.Namespace) -> None:
    from distgan.checkpoint.merging import merge

    write_line(merge(options.source, options.out, best=options.best))


def _export(options: argparse.Namespace) -> None:
    shared = {"best": options.best, "overwrite": options.overwrite}
    if options.push is None:
        if options.private:
            raise UserError("--private is about --push; add --push USER/NAME, or leave it out")
        if options.format == "torch-export":
            from distgan.inference.torch_export import export_program as export
        else:
            from distgan.inference.export import export
        write_line(export(options.source, options.dest, **shared))
        return
    if options.format != "safetensors":
        raise UserError(f"--push {options.push}: pushes a folder for load_generator; leave out --format")
    from distgan.inference.publish import publish

    write_line(publish(options.source, options.dest, options.push, private=options.private, **shared))


def _stop(options: argparse.Namespace) -> None:
    from distgan.runs.stop_request import request_stop

    folder = _run_folder(options)
    if isinstance(folder, Path):
        request_stop(folder)
    else:
        from distgan.runs.remote_status import request_remote_stop

        request_remote_stop(folder)
    write_line(f"{folder}: asked to stop; status.json there will say `preempted` when it has")


def _status(options: argparse.Namespace) -> None:
    from distgan.runs.status import standing

    folder = _run_folder(options)
    if isinstance(folder, Path):
        write_line(standing(folder, options.launch))
        return
    from distgan.runs.remote_status import remote_standing

    begun = options.launch is None and not Path(options.run).is_file()
    write_line(remote_standing(folder, options.launch, begun=begun))


def _doctor(options: argparse.Namespace) -> None:
    check_launch()
    config = _load_config(options) if options.config else None
    from distgan.distributed.runtime import leave_process_group
    from distgan.doctor import examine

    if not examine(config, write_line):
        leave(1)
    leave_process_group()


def _schema(_: argparse.Namespace) -> None:
    from distgan.config import json_schema

    write_line(json.dumps(json_schema(), indent=1))


def _load_config(options: argparse.Namespace) -> Any:
    from distgan.config import load_config

    try:
        config = load_config(options.config, options.overrides)
    except UserError:
        # The ranks of one machine read the same file; another machine may lack it.
        if is_first("LOCAL_RANK"):
            raise
        raise SystemExit(2) from None
    _warn_of_a_moved_run(options.config, config.run_dir, options.overrides)
    return config


def _run_folder(options: argparse.Namespace) -> Path | str:
    from distgan.runs.folder import run_folder_of

    folder = run_folder_of(options.run, options.overrides)
    _warn_of_a_moved_run(options.run, folder, options.overrides)
    return folder


def _warn_of_a_moved_run(recipe: str, run_dir: str | Path, overrides: Sequence[str]) -> None:
    from distgan.runs.folder import moved_run

    warning = moved_run(recipe, run_dir)
    if warning and is_first("RANK") and not any(override.startswith("run_dir=") for override in overrides):
        print(without_secrets(f"distgan: warning: {warning}"), file=sys.stderr, flush=True)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "pack": _pack,
    "index": _index,
    "encode": _encode,
    "train": _train,
    "trace": _trace,
    "sample": _sample,
    "evaluate": _evaluate,
    "probe": _probe,
    "average": _average,
    "merge": _merge,
    "export": _export,
    "stop": _stop,
    "status": _status,
    "doctor": _doctor,
    "schema": _schema,
}
"""What each command does with its options."""
