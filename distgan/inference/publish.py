"""Publish a generator on the Hugging Face Hub: the export, and a model card of its recipe, metrics and samples."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from distgan.checkpoint.contents import load_description
from distgan.checkpoint.loading import find_checkpoint
from distgan.config import parse_config
from distgan.errors import UserError
from distgan.extensions import package_of
from distgan.files import write_atomically, writing
from distgan.inference import hub
from distgan.inference.export import export, load_generator
from distgan.inference.generator import Generator
from distgan.inference.sample import sample
from distgan.version import __version__

_LOCAL = (
    "run_dir", "monitoring", "checkpoint", "data.path", "data.cache_dir", "data.cache_gigabytes", "data.num_workers",
    "data.prefetch", "evaluation.cache_dir", "evaluation.held_out", "evaluation.real_images",
    "data.decoder", "evaluation.detector.weights", "objective.alignment.weights",
)  # fmt: skip
"""Keys of a recipe that are about the machine and not about the model."""
_HOST = re.compile(r"""(^|[\s=,;:'"(\[])(/\w|~[\w/]|\.\.?[/\\]|[A-Za-z]:[\\/]|\\\\)|://""")
"""A text with a path of a machine, or a URL."""
_SECRET = re.compile(r"(^|[_.])(token|secret|passwd|password|credentials?|(api|access)_?key)$", re.IGNORECASE)
_TASKS = {"images": "unconditional-image-generation", "text": "text-generation", "points": "other", "latents": "other"}
_GRID_SIDE = 2048
"""Largest side of the picture of samples, in pixels without gaps."""


def publish(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    repository: str,
    *,
    best: bool = False,
    overwrite: bool = False,
    private: bool = False,
) -> str:
    """Export a generator to `destination` with a model card, and push the folder to the Hub; return the URL there.

    The card, `README.md` with the picture `samples.png`, has the recipe without its paths, the metrics of the
    checkpoint if the run measured them, and samples.

    Args:
        repository: `USER/NAME` or `hf://USER/NAME`, created if it does not exist.
        private: create it as private; refuse one that is public.

    Raises:
        UserError: as `export`; or huggingface_hub is not installed, an option of the generator holds a path or secret,
            or the push fails. The export is kept.
    """
    address = hub.parse_address(repository)
    if address.revision:
        raise UserError(f"--push {repository}: pushes to the main branch; leave out @{address.revision}")
    # Found once, because a run that is still training may write a newer one.
    checkpoint = None if _is_export(source) else find_checkpoint(source, best=best)
    export(checkpoint or source, destination, best=best and checkpoint is None, overwrite=overwrite)
    folder = Path(destination)
    try:
        generator = load_generator(folder)
        described = generator.description
        unfit = [*_unfit("generator", described["generator"]), *_unfit("decoder", described.get("decoder") or {})]
        for key, _ in unfit:
            raise UserError(
                f"{key}: holds a path, a URL or a secret, which an export for others must not; train with an option "
                "that has none"
            )
        with writing(folder, "the model card", name=destination):
            pictured = _write_samples(folder, generator)
            card = model_card(generator, address.repository, checkpoint, pictured=pictured)
            write_atomically(folder / "README.md", card.encode())
        return hub.push(folder, address, private=private)
    except UserError as error:
        raise UserError(f"{error}; the export is kept in {destination}; to push again, add --overwrite") from None


def _is_export(source: str | os.PathLike[str]) -> bool:
    return hub.is_address(os.fspath(source)) or (Path(source) / "config.json").is_file()


def _write_samples(folder: Path, generator: Generator) -> bool:
    """Write a picture of samples; return False for text, which has none."""
    if generator.shape.kind == "text":
        return False
    per_side = min(8, max(1, _GRID_SIDE // generator.resolution)) if generator.resolution else 16
    sample(folder, folder / "samples.png", number=per_side**2)
    return True


def model_card(generator: Generator, repository: str, checkpoint: Path | None, *, pictured: bool) -> str:
    """Return a model card, Markdown with YAML front matter, that holds nothing of this machine.

    Args:
        checkpoint: checkpoint of the generator, whose recipe and metrics are in the card; None leaves them out.
        pictured: `samples.png` lies beside the card.
    """
    kind, name = generator.shape.kind, repository.partition("/")[2]
    metrics = _metrics(checkpoint, generator.step) if checkpoint else {}
    head: dict[str, Any] = {"library_name": "distgan", "tags": ["distgan", "gan", kind]}
    if kind == "images":
        head["pipeline_tag"] = _TASKS[kind]
    if metrics:
        found = [{"type": key.partition("[")[0], "name": key, "value": value} for key, value in metrics.items()]
        data = {"name": "training data", "type": f"distgan-{generator.description['data_fingerprint'][:12]}"}
        results = [{"task": {"type": _TASKS[kind]}, "dataset": data, "metrics": found}]
        head["model-index"] = [{"name": name, "results": results}]
    labels = f" of {generator.num_classes} classes" if generator.num_classes else ""
    what = {
        "images": f"{generator.channels}x{generator.resolution}x{generator.resolution} images",
        "text": f"lines of {generator.shape.length} characters",
        "points": f"points of {generator.shape.dimensions} dimensions",
        "latents": f"{generator.channels}x{generator.resolution}x{generator.resolution} latents of an autoencoder",
    }[kind]
    parts = [
        f"# {name}",
        "![samples](samples.png)" if pictured else _indented(generator.decode(generator(*generator.inputs(16)))),
        f"EMA generator of a GAN, for {what}{labels}. Trained with distgan for {generator.step:,} steps "
        f"({generator.images:,} real samples seen by the discriminator).",
        "## Use",
        _fenced("sh", "pip install 'distgan[hub]'"),
        _fenced("python", _usage(generator, repository)),
        "## Metrics",
        _table(metrics) if metrics else "Not measured at this checkpoint.",
    ]
    if checkpoint:
        recipe, left_out = _recipe(checkpoint)
        keys = ", ".join(f"`{key}`" for key in left_out)
        note = f"Exported with distgan {__version__}. Left out, as paths and settings of the machine: {keys}."
        parts += ["## Recipe", note, _fenced("yaml", recipe)]
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _usage(generator: Generator, repository: str) -> str:
    config = generator.config
    trust = "" if config.is_built_in else f", trust_code=[{json.dumps(package_of(config.technique))}]"
    labels = ", generator.labels(16, seed=0)" if generator.num_classes else ""
    return (
        f'import distgan\n\ngenerator = distgan.load_generator("{hub.SCHEME}{repository}"{trust})\n'
        f"samples = generator(generator.latents(16, seed=0){labels})"
        + ("\npixels = generator.to_uint8(samples)" if generator.shape.kind == "images" else "")
    )


def _metrics(checkpoint: Path, step: int) -> dict[str, float]:
    """Return the metric values that the run of a checkpoint measured at a step."""
    folder = checkpoint.resolve().parent
    file = folder.parent / "metrics.jsonl"
    if folder.name != "checkpoints" or not file.is_file():
        return {}
    found: dict[str, float] = {}
    with open(file, "rb") as lines:
        for line in iter(lambda: lines.readline(1 << 20), b""):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a line that a killed process left; the next resume removes it
            if isinstance(row, dict) and row.get("step") == step:
                found = {key: value for key, value in row.items() if _is_metric(key, value)}
    return found


def _is_metric(key: str, value: Any) -> bool:
    named = re.fullmatch(r"[\w.-]+(\[[^\]]+\])*", key) and key not in ("step", "images", "time")
    return bool(named) and type(value) in (int, float) and abs(value) < 1e300


def _recipe(checkpoint: Path) -> tuple[str, list[str]]:
    """Return the recipe of a checkpoint as YAML, without defaults and what is about the machine, and these keys."""
    config = parse_config(load_description(checkpoint).config, source=f"{checkpoint}/state.json")
    values = config.model_dump(mode="json", exclude_defaults=True)
    left_out = [key for key in _LOCAL if _remove(values, key.split("."))]
    if "objective.alignment.weights" in left_out:  # the size was filled in for them, and is refused without them
        _remove(values, ["discriminator", "alignment_size"])
    for key, path in list(_unfit("", values)):
        _remove(values, path)
        left_out.append(re.sub(r"[^\w.]", "?", key))
    return yaml.safe_dump(values, sort_keys=False).rstrip(), left_out


def _unfit(place: str, value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, list[Any]]]:
    """Yield the dotted keys, and their parts below `value`, of texts with a path of a machine, a URL or a secret."""
    if isinstance(value, (dict, list)):
        if isinstance(value, dict) and any(_HOST.search(str(key)) for key in value):
            yield place, list(path)
            return
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unfit(f"{place}.{key}" if place else str(key), inner, (*path, key))
    elif isinstance(value, str) and value and (_HOST.search(value) or _SECRET.search(place)):
        yield place, list(path)


def _remove(values: Any, path: list[Any]) -> bool:
    """Remove the value at a path of keys; an item of a list becomes None. Return False if there is none."""
    for key in path[:-1]:
        values = values.get(key, {}) if isinstance(values, dict) else values[key]
    if isinstance(values, list):
        values[path[-1]] = None
        return True
    return isinstance(values, dict) and values.pop(path[-1], None) is not None


def _fenced(language: str, text: str) -> str:
    """Return a block of code whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _indented(lines: list[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def _table(metrics: dict[str, float]) -> str:
    rows = [f"| {name} | {value:.6g} |" for name, value in metrics.items()]
    return "\n".join(["| metric | value |", "| --- | ---: |", *rows])
