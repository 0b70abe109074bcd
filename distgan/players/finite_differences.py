"""Checks of runs whose gradient penalties are finite differences."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from distgan import randomness
from distgan.config import Config, ZeroCenteredPenaltyConfig
from distgan.errors import UserError
from distgan.networks.layers.spectral_norm import SpectralNorm
from distgan.networks.layers.stage import Stage, set_float32_below
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.shape import SampleShape

KINKED = {
    "Relu", "LeakyRelu", "PreluKernel", "RreluWithNoise", "Threshold", "Hardtanh", "Hardsigmoid", "Hardswish",
    "Hardshrink", "Softshrink", "Clamp", "ClampMin", "ClampMax", "Abs", "Maximum", "Minimum", "Max", "Min", "Amax",
    "Amin", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Topk",
}  # fmt: skip
"""Operations whose derivative jumps, as the nodes of autograd's graph are named, without `Backward` and a number."""

PRODUCTS = {"Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv", "Dot", "Linear", "Convolution"}
"""Matrix products and convolutions, named likewise."""

_SAMPLES = 8
_SPECTRAL_NORMS = (SpectralNorm.__name__, "_SpectralNorm")
"""Names of distgan's and of torch's."""


def finite_difference_penalties(config: Config) -> dict[str, ZeroCenteredPenaltyConfig]:
    """Return the penalties by finite differences, by key."""
    penalties = {"objective.r1": config.objective.r1, "objective.r2": config.objective.r2}
    return {
        key: penalty
        for key, penalty in penalties.items()
        if penalty is not None and penalty.method == "finite_difference"
    }


def check_fractions(config: Config, share: int) -> None:
    """Raise UserError unless each fraction of a rank's `share` samples per micro-batch is a whole number.

    Then every k-th sample of a rank is every k-th sample of all ranks, and the penalized ones do not depend on W.
    """
    for key, penalty in finite_difference_penalties(config).items():
        if share % penalty.stride:
            raise UserError(
                f"{key}.fraction = {penalty.fraction:g}: {penalty.stride} does not divide the {share} samples per "
                "process and micro-batch; change it, training.batch_size or the number of processes"
            )


def check_finite_differences(discriminator: nn.Module, config: Config, shape: SampleShape) -> list[str]:
    """Run a copy of the discriminator on random samples. Return a warning for each penalty that it makes inaccurate.

    The network and random number generators are left as they were. Collective if the network is.

    Raises:
        UserError: the network is random, its spectral norm changes between two ends of a difference, or its last layers
            would run in bfloat16.
    """
    penalties = finite_difference_penalties(config)
    if not penalties:
        return []
    keys = " and ".join(penalties)
    apart = config.discriminator.facts.batch_statistics
    if apart and any(type(module).__name__ in _SPECTRAL_NORMS for module in discriminator.modules()):
        raise UserError(
            f"{keys}: method: finite_difference needs one pass over all samples with spectral norm, which changes in "
            f"each pass, but batch statistics (discriminator.{next(iter(apart))}) need several; turn one of them off, "
            "or set method: exact",
            everywhere=True,
        )
    trial = copy.deepcopy(discriminator).train()
    logits = _logits_of_twins(trial, shape)
    first, second = logits.detach().float().chunk(2)
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-4 * float(first.abs().max())):
        raise UserError(
            f"{keys}: method: finite_difference needs a discriminator without randomness, found one that gives two "
            "equal samples of a batch different logits, as dropout does; remove its dropout, or set method: exact",
            everywhere=True,
        )
    _check_last_layers(trial, config, shape, keys)
    kinks = sorted(KINKED & {_name(node) for node in _nodes(logits)})
    if not kinks:
        return []
    return [
        f"{key}.method = finite_difference: the discriminator has kinks ({', '.join(kinks)}), so that the penalty's "
        "gradient with respect to the weights differs from that of method: exact by about its own norm or more at any "
        "sigma, though the values agree; set method: exact, or use smooth activations such as SiLU"
        for key in penalties
    ]


def _check_last_layers(trial: nn.Module, config: Config, shape: SampleShape, keys: str) -> None:
    """Raise UserError if precision is by stage, and the last layers of the discriminator would run in bfloat16.

    Changes the precision of the network's stages.
    """
    below, name = config.training.float32_below, config.discriminator.architecture
    if below is None:
        return
    sides = {2 * module.resolution for module in trial.modules() if isinstance(module, Stage)}

    def fits(resolution: int) -> bool:
        set_float32_below(trial, name, resolution)
        return _last_layers_are_float32(_logits_of_twins(trial, shape, autocast=True))

    larger = sorted(side for side in sides if below < side <= config.data.resolution)
    fitting = next(filter(fits, (below, *larger)), None)
    if fitting != below:
        fix = f"set it to {fitting}" if fitting else "build these of distgan.networks.layers.stage.Stage(1, ...)"
        raise UserError(
            f"{keys}: method: finite_difference divides rounding errors of logits by its step, but "
            f"training.mixed_precision.float32_below = {below} runs the last layers of discriminator.architecture: "
            f"{name} in bfloat16; {fix}, or set training.mixed_precision=bf16, which has whole penalized passes in "
            "float32",
            everywhere=True,
        )


def _last_layers_are_float32(logits: Tensor) -> bool:
    """Return True if the last matrix products or convolutions, and all that follows them, are not in bfloat16.

    The type of the logits does not tell, because a product with float32 embeddings of classes is float32.
    """
    last = _nodes(logits, until=PRODUCTS)
    return not any(of.dtype == torch.bfloat16 for node in last for of in node._input_metadata)


def _logits_of_twins(network: nn.Module, shape: SampleShape, *, autocast: bool = False) -> Tensor:
    """Return the logits (2 n,) of a batch that holds each of n random samples twice, in bfloat16 if asked to."""
    place = next(chain(network.parameters(), network.buffers()), torch.empty(0))
    samples = randomness.normal(0, "finite differences", torch.arange(_SAMPLES), shape.sizes)
    twins = samples.repeat(2, *(1,) * len(shape.sizes)).to(place.device, place.dtype)
    labels = torch.zeros(len(twins), dtype=torch.int64, device=place.device) if shape.num_classes else None
    on_cuda = [place.device] if place.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on_cuda), torch.enable_grad(), reference_moments(network):
        torch.manual_seed(0)  # so that ranks agree
        with torch.autocast(place.device.type, dtype=torch.bfloat16, enabled=autocast):
            logits: Tensor = network(twins, labels)
    return logits


def _nodes(output: Tensor, until: Collection[str] = ()) -> Iterator[Node]:
    """Yield the operations that a tensor was computed by, but none before those of some names."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if _name(node) not in until:
            nodes += [following for following, _ in node.next_functions]


def _name(node: Node) -> str:
    return node.name().rpartition("Backward")[0]
