"""What a run needs of a user's networks, found out with one small batch before training.

Without this check most mistakes are silent: logits of shape (n, 1) broadcast against targets of shape (n,), an unused
parameter stops only DDP, and buffers that are not saved make a resume wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distgan.distributed.blocks import declared_blocks
from distgan.errors import UserError, blaming_code
from distgan.networks.layers.virtual_batch_norm import reference_moments
from distgan.networks.moving import declare_moving
from distgan.networks.progressive import GrowingNetwork
from distgan.networks.shape import SampleShape

PROBE_SIZE = 4
"""Samples of the probe batch."""


def check_networks(
    generator: nn.Module,
    discriminator: nn.Module,
    shape: SampleShape,
    latents: Tensor,
    labels: Tensor | None,
    names: tuple[str, str],
    *,
    noise: Tensor | None = None,
    compares_batch: bool = False,
) -> None:
    """Run copies of both networks on a probe batch, and declare the buffers that move (see `moving`).

    Networks and random number generators are left as they were. Collective if the networks are: call on every rank
    with the same batch.

    Args:
        shape: kind and sizes of the samples at the current level of growth.
        latents: (n, latent_size); labels: (n,) int64, or None.
        names: how errors name the generator and the discriminator.
        noise: (n, latent_size), of a generator that reconstructs; its latents here are images (n, C, R, R).
        compares_batch: the discriminator declares that logits depend on the other samples of their pass. Otherwise
            reals and fakes may share a pass, so that they must not.

    Raises:
        UserError: a network breaks the contract; the message names it and the fix.
    """
    device = latents.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.enable_grad():
        levels = getattr(generator, "levels", 1)
        given = labels if noise is None else noise
        fakes = _probe(generator, names[0], latents, given, (levels * shape.sizes[0], *shape.sizes[1:]))
        sizes = None if getattr(discriminator, "judges_patches", False) else ()
        _probe(discriminator, names[1], fakes.detach().requires_grad_(), labels, sizes, apart=not compares_batch)


def _probe(
    network: nn.Module,
    name: str,
    values: Tensor,
    labels: Tensor | None,
    sizes: tuple[int, ...] | None,
    *,
    apart: bool = False,
) -> Tensor:
    """Check one network, whose output for n values has the shape (n, *sizes), or (n, ...). Return it for `values`.

    Args:
        apart: the output for a value must not depend on the others.
    """
    _check_weights(network, name)
    _check_declared(network, name)
    _check_blocks(network, name)
    with blaming_code(f"{name}: copying it failed"):
        trial = copy.deepcopy(network).train()
    before = {key: buffer.clone() for key, buffer in trial.named_buffers()}
    with _calling_blocks(trial, name):
        output = _pass(trial, name, values, labels, sizes)
    with blaming_code(f"{name}: its backward pass failed"):
        output.sum().backward()
    if values.requires_grad and values.grad is None:
        raise UserError(f"{name}: the output has no gradient in its input; do not detach it")
    _check_gradients(trial, name)
    with torch.no_grad():
        # Of half the batch, which shows shapes that hold for one size only; and once more, as some buffers move late.
        for count in (len(values) // 2, len(values)):
            _pass(trial, name, values[:count], None if labels is None else labels[:count], sizes)
        moved = _moved(trial, name, before)
        _check_repeatable(trial, name, lambda: _pass(trial, name, values, labels, sizes))
        if apart:
            _check_apart(trial, name, values, lambda given: _pass(trial, name, given, labels, sizes))
    declare_moving(network, moved)
    return output


def _pass(trial: nn.Module, name: str, values: Tensor, labels: Tensor | None, sizes: tuple[int, ...] | None) -> Tensor:
    given = f"{tuple(values.shape)}" + (", labels" if labels is not None else "")
    with blaming_code(f"{name}: its forward pass on {given} failed"), reference_moments(trial):
        output = trial(values, labels)
    if not isinstance(output, Tensor):
        expected = (len(values), *(sizes or ()))
        raise UserError(f"{name}: forward returned {type(output).__name__}, expected a tensor of shape {expected}")
    expected = (len(values), *(output.shape[1:] if sizes is None else sizes))
    if output.shape != expected or not output.is_floating_point():
        squeeze = "; return logits.squeeze(1)" if tuple(output.shape) == (*expected, 1) else ""
        raise UserError(
            f"{name}: forward returned {output.dtype} of shape {tuple(output.shape)}, expected floats of shape "
            f"{expected}{squeeze}"
        )
    if torch.is_grad_enabled() and not output.requires_grad:
        raise UserError(f"{name}: the output of forward has no gradient; do not detach it or use torch.no_grad there")
    if not output.isfinite().all():
        raise UserError(f"{name}: forward returned numbers that are not finite, before any training")
    return output


def _check_weights(network: nn.Module, name: str) -> None:
    for key, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{name}: {key} has no shape yet; give its lazy layer sizes, as in nn.Linear(in, out)")
    for key, parameter in network.named_parameters():
        if parameter.dtype != torch.float32:
            raise UserError(
                f"{name}: parameter {key} is {parameter.dtype}, expected torch.float32; set "
                "training.mixed_precision=bf16 for bfloat16 arithmetic"
            )
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name}: {key} holds numbers that are not finite, which no checkpoint may have; register it with "
                "persistent=False, or use a large number"
            )


def _check_declared(network: nn.Module, name: str) -> None:
    """Raise UserError unless the class attributes `moving_buffers` name buffers that are saved."""
    for key, module in network.named_modules():
        declared = getattr(module, "moving_buffers", ())
        saved = dict(module.named_buffers(recurse=False)).keys() - module._non_persistent_buffers_set
        is_of_class = "moving_buffers" not in vars(module)
        if not (is_of_class and isinstance(declared, tuple) and saved.issuperset(declared)):
            raise UserError(
                f"{name}: {key or type(module).__name__}.moving_buffers = {declared!r}: expected an attribute of "
                "the class, a tuple of names of its buffers that are saved "
                f"({', '.join(sorted(saved)) or 'it has none'})"
            )


def _check_blocks(network: nn.Module, name: str) -> None:
    """Raise UserError unless the blocks that a network declares are different modules of it, none inside another."""
    blocks = declared_blocks(network)
    inside = [id(module) for block in blocks for module in block.modules()]
    own = {id(module) for module in network.modules()} - {id(network)}
    if any(id(block) not in own or inside.count(id(block)) != 1 for block in blocks):
        raise UserError(
            f"{name}: its attribute blocks must hold different modules of the network, none inside another one; it "
            "declares what may be sharded one by one"
        )


@contextmanager
def _calling_blocks(network: nn.Module, name: str) -> Iterator[None]:
    """Raise UserError if a pass inside leaves out a declared block of a network that does not grow."""
    blocks = [] if isinstance(network, GrowingNetwork) else declared_blocks(network)
    left = {id(block): number for number, block in enumerate(blocks)}

    def called(block: nn.Module, *_: object) -> None:
        left.pop(id(block), None)

    handles = [block.register_forward_hook(called) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if left:
        raise UserError(
            f"{name}: forward does not call blocks[{min(left.values())}]; call each block as a "
            "module, or rename the attribute blocks, which declares what may be sharded one by one"
        )


def _check_gradients(trial: nn.Module, name: str) -> None:
    active = trial.active_parameters() if isinstance(trial, GrowingNetwork) else trial.parameters()
    trained = {id(parameter) for parameter in active if parameter.requires_grad}
    unused = [key for key, p in trial.named_parameters() if id(p) in trained and p.grad is None]
    if unused:
        raise UserError(
            f"{name}: {len(unused)} parameters get no gradient, such as {unused[0]}; use them in forward, remove them, "
            "or freeze them with requires_grad_(False)"
        )


def _moved(trial: nn.Module, name: str, before: dict[str, Tensor]) -> list[str]:
    """Return the names of the buffers that forward passes have changed."""
    made = [key for key, buffer in trial.named_buffers() if key not in before or buffer.shape != before[key].shape]
    if made:
        raise UserError(
            f"{name}: forward makes or resizes the buffer {made[0]}; register it in __init__ in its final shape"
        )
    moved = [key for key, buffer in trial.named_buffers() if not torch.equal(buffer, before[key])]
    lost = [key for key in moved if key not in trial.state_dict()]
    if lost:
        raise UserError(
            f"{name}: the buffer {lost[0]} changes in training but is not saved (persistent=False), so that no resume "
            "is exact; register it with persistent=True"
        )
    return moved


def _check_repeatable(trial: nn.Module, name: str, run: Callable[[], Tensor]) -> None:
    """Raise UserError if two passes from the same buffers and the same seed differ."""
    state = _state(trial)
    if not torch.allclose(_from_state(trial, state, run), _from_state(trial, state, run), rtol=1e-3, atol=1e-4):
        raise UserError(
            f"{name}: two passes from the same buffers and seed differ, so that no resume is exact; keep what changes "
            "in buffers, and draw random numbers with torch's default generator"
        )


def _check_apart(trial: nn.Module, name: str, values: Tensor, run: Callable[[Tensor], Tensor]) -> None:
    """Raise UserError if the outputs for half of the values change with the other half.

    Both passes have the batch's size, so that dropout draws the same numbers. A dependence that the initial weights
    hide, as those of a last layer that are 0, is not found.
    """
    half, state = len(values) // 2, _state(trial)
    torch.manual_seed(0)  # the same on all ranks
    others = torch.cat((values[:half], torch.rand_like(values[half:])))
    one, other = (_from_state(trial, state, partial(run, given))[:half] for given in (values, others))
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        raise UserError(
            f"{name}: the logit of a sample depends on the other samples of the batch, as with batch norm, but the "
            "class does not say so, and reals and fakes could share a batch; set its attribute compares_batch = True"
        )


def _state(trial: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in trial.state_dict().items()}


def _from_state(trial: nn.Module, state: dict[str, Tensor], run: Callable[[], Tensor]) -> Tensor:
    """Return the result of a pass from the given buffers and a fixed seed."""
    trial.load_state_dict(state)
    torch.manual_seed(0)
    return run()
