"""Export a trained generator as a .pt2 file of `torch.export`, which runs without distgan."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distgan.data.storage.locations import local_path
from distgan.errors import UserError, blaming_code
from distgan.files import write_atomically, writing
from distgan.inference.export import load_generator
from distgan.inference.generator import Generator
from distgan.networks.layers.virtual_batch_norm import reference_moments

DESCRIPTION = "generator.json"
"""Extra file of the archive that says what to feed the program."""

_OWN = frozenset(("aten", "prim", "prims", "higher_order"))
"""Namespaces of the operators that every PyTorch has."""
_PIXELS = {False: "clamp(round(127.5 (x + 1)), 0, 255)", True: "clamp(floor(128 (x + 1)), 0, 255)"}
"""Level of a pixel for an output x, without and with `data.dequantize`."""
_FIX = (
    "in its forward pass use torch functions only, x.shape[0] instead of len(x), and no Python branch or loop over the "
    "values of tensors or the samples of a batch; or leave out --format torch-export"
)


def export_program(
    source: str | os.PathLike[str], destination: str | os.PathLike[str], *, best: bool = False, overwrite: bool = False
) -> Path:
    """Write the EMA generator of a run, a checkpoint or an export as a program of `torch.export`.

    `torch.export.load(destination).module()` is a function of latents (n, latent_size), float32, and, if there are
    classes, labels (n,), int64, for any n. It returns what `load_generator(source)(latents, labels)` does: images
    (n, C, R, R) toward [-1, 1], text (n, vocabulary, length), points (n, dimensions) or latents (n, C, R, R), shifted
    and scaled. Batch-norm statistics and the
    moments of virtual batch norm's reference batch are constants in it. The file holds no path of this machine.

    Args:
        overwrite: replace an existing file.

    Raises:
        UserError: there is no generator to export, torch.export cannot trace it, or `destination` cannot be written.
    """
    target = local_path(destination, "DEST")
    if target.suffix != ".pt2":
        raise UserError(f"DEST {destination}: --format torch-export writes one file; pass a name that ends in .pt2")
    if os.path.lexists(target) and not (overwrite and target.is_file()):
        fix = "pass another name, or add --overwrite" if target.is_file() else "pass another name"
        raise UserError(f"{target}: exists; {fix}")
    generator = load_generator(source, best=best)
    program = _trace(generator)
    content = io.BytesIO()
    with blaming_code(f"{generator.config.technique}: its program cannot be saved and loaded"), _quiet():
        # To memory first, because the archive would hold the name of a temporary file.
        torch.export.save(program, content, extra_files={DESCRIPTION: json.dumps(describe(generator), indent=1)})
        _check(generator, content)
    with writing(target, "the program", name=destination):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, content.getvalue())
    return target


def describe(generator: Generator) -> dict[str, Any]:
    """Return what a user of the program must know: its inputs, its output and its training length."""
    shape, known = generator.shape, generator.description
    return {
        "format": "distgan torch.export program",
        "version": 1,
        "kind": shape.kind,
        "latent_size": generator.latent_size,
        "latent_distribution": {"uniform": "U(-1, 1)", "normal": "N(0, 1)"}[generator.config.latent_distribution],
        "num_classes": generator.num_classes,
        "class_names": generator.class_names,
        "class_counts": known["class_counts"],
        "output_shape": ["n", *shape.sizes],
        "output_range": {"images": [-1, 1], "text": [0, 1]}.get(shape.kind),
        "pixels": _PIXELS[shape.dequantized] if shape.kind == "images" else None,
        "resolution": shape.resolution,
        "latent_space": known.get("latent_space"),
        "vocabulary": generator.vocabulary,
        "step": generator.step,
        "images": generator.images,
        "versions": {**known["versions"], "torch": torch.__version__},
    }


def _trace(generator: Generator) -> torch.export.ExportedProgram:
    name = generator.config.technique
    # Two samples: a batch of one is traced as a constant.
    latents, labels = generator.inputs(2)
    batch = {0: torch.export.Dim("batch")}
    given, shapes = ((latents,), (batch,)) if labels is None else ((latents, labels), (batch, batch))
    try:
        with (
            blaming_code(f"{name}: torch.export cannot trace it"),
            reference_moments(generator.network), _quiet(), torch.no_grad(),
        ):  # fmt: skip
            program = torch.export.export(generator, given, dynamic_shapes=shapes)
    except UserError as error:
        if "specialized it to be a constant" in str(error):
            error = UserError(f"{name}: torch.export cannot trace it: the number of samples becomes a constant")
        raise UserError(f"{error}; {_FIX}") from None
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            _check_operators(name, module)
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # has paths of this machine
    return program


def _check_operators(name: str, module: torch.fx.GraphModule) -> None:
    for node in module.graph.nodes:
        namespace = getattr(node.target, "namespace", "aten")
        if namespace not in _OWN:
            raise UserError(
                f"{name}: calls {node.target}, an operator that PyTorch alone does not have; write it with torch "
                "functions, or leave out --format torch-export"
            )


@torch.no_grad()
def _check(generator: Generator, content: io.BytesIO) -> None:
    """Raise UserError unless the saved program computes what the generator does, for batches of other sizes too."""
    content.seek(0)
    program: Any = torch.export.load(content).module()
    for number in (1, 3):
        given = [part for part in generator.inputs(number, seed=1) if part is not None]
        found, expected = _run(program, given), _run(generator, given)
        if not torch.allclose(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise UserError(
                f"{generator.config.technique}: its program computes something else, by up to "
                f"{(found - expected).abs().max():.2g} for {number} samples, because its forward pass depends on more "
                f"than its inputs and weights, such as the number of calls; {_FIX}"
            )


def _run(network: Any, given: list[Tensor]) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # for networks that draw noise
        output: Tensor = network(*given)
    return output


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own report of a failed trace, which is pages long, off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
        ):  # fmt: skip
            yield
    finally:
        logging.disable(before)
