"""Export a trained generator as `config.json` and `model.safetensors`; load it from an export or a checkpoint."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from distgan import extensions, schedule
from distgan.autoencoders.exporting import (
    DECODER_FILE,
    ExportedDecoder,
    decoder_weights,
    describe_decoder,
    load_exported_decoder,
    load_run_decoder,
)
from distgan.checkpoint.contents import Vocabulary, load_description
from distgan.checkpoint.downloads import is_url
from distgan.checkpoint.loading import find_checkpoint, find_misfit, find_non_finite, load_sets
from distgan.config import AutoencoderConfig, Config, EMAConfig, GeneratorConfig, parse_config
from distgan.config.error_messages import explain
from distgan.config.run import MAX_STATISTICS_BATCH
from distgan.data.kinds.latents import LatentSpace
from distgan.data.storage.locations import local_path
from distgan.errors import UserError, blaming, within_memory
from distgan.files import publish_folder, read_bounded, sync_folder, write_atomically, writing
from distgan.inference import hub
from distgan.inference.generation import statistics_batches
from distgan.inference.generator import Generator
from distgan.networks import assign_weights, build_generator
from distgan.networks.layers.normalization import recompute_statistics
from distgan.networks.shape import sample_shape

_FORMAT = "distgan generator"
_MAX_DESCRIPTION = 16 << 20
_Number = Annotated[int, Field(ge=0, lt=2**62)]
_Size = Annotated[int, Field(ge=0, le=2**16)]
_SIZES = {
    "images": ("resolution", "channels"),
    "text": ("length", "vocabulary"),
    "points": ("dimensions",),
    "latents": ("resolution", "channels", "latent_space"),
}


class _Growth(BaseModel):
    """Growth state of a generator of architecture progressive."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    level: Annotated[int, Field(ge=0, le=14)]
    fade: Annotated[float, Field(gt=0, le=1)]


class _Description(BaseModel):
    """Schema of config.json, which is untrusted input."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    format: Literal["distgan generator"]
    version: Literal[1]
    generator: GeneratorConfig
    kind: Literal["images", "text", "points", "latents"] = "images"
    resolution: _Size = 0
    channels: _Size = 0
    decoder: ExportedDecoder | None = None
    latent_space: LatentSpace | None = None
    dequantized: bool = False
    length: _Size = 0
    vocabulary: Vocabulary | None = None
    dimensions: _Size = 0
    class_names: list[str] | None
    class_counts: Annotated[list[_Number], Field(min_length=1)] | None
    growth: _Growth | None = None
    step: _Number
    images: _Number
    data_fingerprint: str
    versions: dict[str, str]

    @model_validator(mode="after")
    def _check(self) -> _Description:
        for name in itertools.chain(*_SIZES.values()):
            if bool(getattr(self, name)) != (name in _SIZES[self.kind]):
                raise ValueError(f"kind: {self.kind} needs {' and '.join(_SIZES[self.kind])}, and no other size")
        if self.decoder is not None and self.kind != "latents":
            raise ValueError(f"decoder: is of latents, found kind: {self.kind}")
        if self.dequantized and self.kind != "images":
            raise ValueError(f"dequantized: is of images, found kind: {self.kind}")
        if self.kind not in self.generator.facts.kinds:
            raise ValueError(f"generator.architecture: {self.generator.architecture} does not make {self.kind}")
        if self.kind in ("images", "latents") and self.resolution < 4:
            raise ValueError(f"resolution: {self.resolution} is below 4 pixels")
        if self.kind == "images" and self.channels not in (1, 3):
            raise ValueError(f"channels: {self.channels}: images have 1 or 3")
        space = self.latent_space
        if space is not None and (space.channels, space.resolution) != (self.channels, self.resolution):
            raise ValueError("latent_space: its channels and resolution are not those of the samples")
        if self.generator.facts.power_of_two and self.resolution & (self.resolution - 1):
            raise ValueError(f"resolution: {self.resolution} is not a power of two")
        if self.generator.facts.has_reference and self.generator.facts.reference_samples is None:
            raise ValueError(
                "generator.reference_size: found null, expected the size of virtual batch norm's reference"
            )
        if self.class_counts is not None and not 0 < sum(self.class_counts) < 2**62:
            raise ValueError("class_counts: their sum is not in [1, 2**62)")
        if self.class_names is not None and len(self.class_names) != len(self.class_counts or []):
            raise ValueError("class_names: expected as many as class_counts")
        if self.growth is not None:
            if self.generator.is_allowed and not self.generator.facts.grows:
                raise ValueError(f"growth: a generator of architecture {self.generator.architecture} does not grow")
            if 4 << self.growth.level > self.resolution:
                raise ValueError(f"growth: level {self.growth.level} is above the resolution")
        return self


def load_generator(
    path: str | os.PathLike[str],
    *,
    best: bool = False,
    device: torch.device | str = "cpu",
    trust_code: Iterable[str] = (),
    truncation: float | None = None,
    decoder: AutoencoderConfig | None = None,
) -> Generator:
    """Load the EMA generator of an export, a checkpoint, or a run (its newest or best checkpoint).

    `hf://USER/NAME` or `hf://USER/NAME@REVISION` is an export on the Hugging Face Hub (extra `hub`).

    From a checkpoint or a run, batch-norm statistics are recomputed from addressed latents. This is not collective:
    any rank may load a generator by itself.

    Args:
        device: device of the generator, where its statistics are also computed.
        trust_code: packages whose code may run if the generator's architecture is in one of them.
        truncation: for stylegan2, weight of styles against the average style, from 0 to 1 for none; for others,
            threshold of the latents that it will draw (see `latents.truncate`). Batch-norm statistics are then
            those of such latents, as in BigGAN's released generators, which have one set per threshold. An export's
            are of 2,048 latents in batches of 128, so that they differ a little from its run's.
        decoder: decoder of a run's latents, in place of that of its config, such as the same one at another place.

    Raises:
        UserError: a file is missing, damaged or of another kind, it names code that is not trusted, or `truncation` is
            not above 0 and finite or the latents are not normal; the message names it.
    """
    if not os.fspath(path):
        raise UserError("SOURCE is empty; pass a run, a checkpoint or an export")
    if is_url(path) and not hub.is_address(os.fspath(path)):
        with extensions.allowing(*trust_code):
            return _load_checkpoint(find_checkpoint(path, best=best), device, truncation, decoder)
    folder = hub.download(os.fspath(path)) if hub.is_address(os.fspath(path)) else Path(path)
    if folder.suffix == ".pt2" and folder.is_file():
        raise UserError(f"{folder}: a program of torch.export, which torch.export.load loads; pass a run or an export")
    if (folder / "config.json").is_file():
        if best:
            raise UserError(f"{folder}: --best needs a run folder, found an export; pass the run, or remove --best")
        with extensions.allowing(*trust_code):
            generator = _load_export(folder).to(device)
        if truncation is not None:
            _truncate(generator, truncation)
        return generator
    with extensions.allowing(*trust_code):
        return _load_checkpoint(find_checkpoint(folder, best=best), device, truncation, decoder)


def export(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, best: bool = False, overwrite: bool = False
) -> Path:
    """Write the EMA generator of a run or checkpoint as `config.json` and `model.safetensors`.

    Args:
        overwrite: replace an earlier export at `destination`. A crash leaves the new export, the earlier one, or the
            earlier one beside it under a hidden name.

    Raises:
        UserError: there is no generator to export, or `destination` holds anything else or cannot be written.
    """
    if not os.fspath(destination):
        raise UserError("DESTINATION is empty; pass a folder")
    target = Path(os.path.realpath(local_path(destination, "DEST")))
    if os.path.lexists(target):
        _check_free(destination, target, overwrite)
    generator = load_generator(source, best=best)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with writing(target, "the export", name=destination):
            temporary.mkdir(parents=True)
            tensors = {name: value.contiguous().clone() for name, value in generator.network.state_dict().items()}
            # Not `save_file`, which does not report a full disk as an OSError.
            write_atomically(temporary / "model.safetensors", safetensors.torch.save(tensors))
            if generator.decoder is not None:
                write_atomically(temporary / DECODER_FILE, decoder_weights(generator.decoder))
            write_atomically(temporary / "config.json", json.dumps(generator.description, indent=1).encode())
            sync_folder(temporary)
            publish_folder(temporary, target, replaced_as=target.with_name(f".{target.name}.{os.getpid()}.old"))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Path(destination)


def _check_free(destination: str | os.PathLike[str], target: Path, overwrite: bool) -> None:
    """Raise UserError unless the folder is empty, or holds an earlier export, nothing else, and `overwrite` is set."""
    is_export = False
    try:
        names = {path.name for path in target.iterdir()}
        if not names:
            return
        if names <= {*hub.EXPORT_FILES, DECODER_FILE, *hub.CARD_FILES}:
            description = json.loads(read_bounded(target / "config.json", _MAX_DESCRIPTION))
            is_export = isinstance(description, dict) and description.get("format") == _FORMAT
    except (OSError, ValueError, RecursionError):
        pass
    if not is_export:
        raise UserError(f"{destination}: exists and is not an export; pass a new or empty folder")
    if not overwrite:
        raise UserError(f"{destination}: holds an earlier export; pass another folder, or add --overwrite")


def _load_export(folder: Path) -> Generator:
    file = folder / "config.json"
    content = read_bounded(file, _MAX_DESCRIPTION)
    try:
        with extensions.distrusting():
            description = _Description.model_validate_json(content)
    except ValidationError as error:
        raise UserError(
            f"{file}: not the description of an exported generator: {explain(error, _Description)[1]}; "
            "make one with distgan export"
        ) from None
    generator = _build(file, description.model_dump(mode="json"), description.generator)
    weights = folder / "model.safetensors"
    try:
        if not weights.is_file():
            raise OSError("no such file" if not os.path.lexists(weights) else "not a regular file")
        # Copied, because the loaded tensors map the file, which may be replaced while the generator is in use.
        tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(weights).items()}
        problem = _take_weights(generator, tensors)
    except (OSError, safetensors.SafetensorError, RuntimeError, MemoryError) as error:
        problem = _reason(error)
    if problem:
        raise UserError(f"{weights}: not the weights of this generator: {problem}; export it again")
    if description.decoder is not None:
        generator.decoder = load_exported_decoder(folder / DECODER_FILE, description.decoder, generator.network_shape)
    return generator


def _build(file: Path, description: dict[str, Any], config: GeneratorConfig) -> Generator:
    """Build the described generator on the meta device, so that false sizes take no memory."""
    try:
        with torch.device("meta"), blaming(file):
            return Generator(description, config)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise UserError(f"{file}: cannot build the network: {_reason(error)}; export it again") from None


def _take_weights(generator: Generator, tensors: dict[str, Tensor]) -> str | None:
    """Assign weights of any precision to a generator on the meta device; return what is wrong with them, or None."""
    expected = generator.network.state_dict()
    for name, value in tensors.items():
        if name in expected and value.is_floating_point() and expected[name].is_floating_point():
            tensors[name] = value.to(expected[name].dtype)
    problem = find_misfit(tensors, expected) or find_non_finite(tensors, generator.num_classes)
    if problem is None:
        build = partial(build_generator, generator.config, generator.network_shape)
        assign_weights(generator.network, tensors, build)
    return problem


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _truncate(generator: Generator, truncation: float) -> None:
    """Compute an export's batch-norm statistics from truncated latents, as by default from a checkpoint."""
    generator.truncation = truncation
    source = generator.source(0, truncation)
    numbers = torch.arange(EMAConfig().statistics_samples).split(MAX_STATISTICS_BATCH)
    with within_memory(f"truncation: {MAX_STATISTICS_BATCH} samples at a time"):
        recompute_statistics(generator.network, (source.draw("batch statistics", part) for part in numbers))


def _load_checkpoint(
    path: Path, device: torch.device | str, truncation: float | None, decoder: AutoencoderConfig | None
) -> Generator:
    state = load_description(path)
    config: Config = parse_config(state.config, source=f"{path}/state.json")
    classes, vocabulary, growth = state.classes, state.vocabulary, schedule.growth(config, state.images)
    if (vocabulary is not None) != (config.data.kind == "text"):
        raise UserError(
            f"{path}/state.json: vocabulary: expected for data.kind = text only, found data.kind = {config.data.kind}; "
            "use an older checkpoint"
        )
    if (state.latent_space is not None) != (config.data.kind == "latents"):
        raise UserError(
            f"{path}/state.json: latent_space: expected for data.kind = latents only, found data.kind = "
            f"{config.data.kind}; use an older checkpoint"
        )
    shape = sample_shape(config.data, vocabulary=len(vocabulary or ()))
    description = {
        "format": _FORMAT,
        "version": 1,
        "generator": config.generator.model_dump(mode="json"),
        "kind": shape.kind,
        "resolution": shape.resolution,
        "channels": shape.channels,
        "latent_space": state.latent_space.model_dump(mode="json") if state.latent_space else None,
        "dequantized": shape.dequantized,
        "length": shape.length,
        "vocabulary": vocabulary,
        "dimensions": shape.dimensions,
        "growth": asdict(growth) if growth else None,
        "class_names": classes.names if classes else None,
        "class_counts": classes.counts if classes else None,
        "step": state.step,
        "images": state.images,
        "data_fingerprint": state.data.fingerprint,
        "versions": state.versions,
    }
    generator = _build(path / "state.json", description, config.generator)
    tensors = load_sets(path, ["generator_ema"])["generator_ema"]
    if problem := _take_weights(generator, tensors):
        raise UserError(f"{path}: generator_ema: {problem}; use an older checkpoint")
    generator.decoder = load_run_decoder(path, config, generator.network_shape, state.decoder, decoder)
    if generator.decoder is not None:
        generator.description["decoder"] = describe_decoder(generator.decoder)
    generator.to(device)
    generator.truncation = truncation
    if generator.reconstructs and truncation is None:
        return generator  # without batch norm
    source = generator.source(config.seed, truncation)
    with within_memory(f"{path}/state.json: training.batch_size = {config.training.batch_size}"):
        recompute_statistics(generator.network, statistics_batches(source, config))
    return generator
