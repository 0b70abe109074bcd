"""Averages of the generator's weights over time: exponential (EMA), and power functions."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from distgan.distributed.parts import Stored, local, shard_as, shard_network_as, whole
from distgan.errors import UserError
from distgan.networks.moving import moving_buffers
from distgan.schedule import power_decay


class EMAGenerator:
    """Copy of the generator that holds the EMA weights. Evaluation, sampling and export use this copy.

    Buffers are not averaged. Batch-norm statistics are recomputed from addressed latents before each use. Other buffers
    that training changes, such as spectral-norm vectors, are copied from the live generator. Create this object before
    an engine takes the generator's weights, and call `shard` afterward. Use `network` inside `Runtime.full_params`.
    """

    def __init__(self, generator: nn.Module) -> None:
        self.network = copy.deepcopy(generator).eval().requires_grad_(False)
        self._generator = generator
        self.decay = 0.0
        """Decay of the last update."""

    def shard(self) -> None:
        """Keep this rank's shards only, if the engine has sharded the generator."""
        shard_network_as(self.network, self._generator)

    @torch.no_grad()
    def update(self, decay: float, applied: Tensor) -> None:
        """average += (1 - decay) * applied * (live - average), where `applied` is 1, or 0 for a skipped update.

        Operations are elementwise, so that shards are bitwise those of the whole average.
        """
        self.decay = decay
        averages, buffers = moving_buffers(self.network), moving_buffers(self._generator)
        if averages:
            torch._foreach_copy_(averages, buffers)
        live, averages = ([local(each) for each in of.parameters()] for of in (self._generator, self.network))
        if decay == 0.0:
            torch._foreach_copy_(averages, live)
            return
        _move(averages, live, (1.0 - decay) * applied)


class Profiles:
    """Power-function averages of a generator's weights (Karras et al. 2024, section 3), one for each width in `stds`.

    From their snapshots, `inference.post_hoc` makes an average of any width. Create this object before an engine takes
    the generator's weights, and call `shard` afterward.
    """

    def __init__(self, generator: nn.Module, stds: tuple[float, ...]) -> None:
        self._generator = generator
        self._averages: dict[float, dict[str, Tensor]] = {
            std: {name: weight.detach().clone() for name, weight in generator.named_parameters()} for std in stds
        }

    def __bool__(self) -> bool:
        return bool(self._averages)

    def shard(self) -> None:
        """Keep this rank's shards only, if the engine has sharded the generator."""
        divided = dict(self._generator.named_parameters())
        for averages in self._averages.values():
            averages.update({name: shard_as(tensor, divided[name]) for name, tensor in averages.items()})

    @torch.no_grad()
    def update(self, images: int, images_per_step: int, applied: Tensor) -> None:
        """average += (1 - decay) * applied * (live - average); see `power_decay` and `EMAGenerator.update`."""
        live = [local(parameter) for parameter in self._generator.parameters()]
        for std, averages in self._averages.items():
            _move(
                [local(average) for average in averages.values()],
                live,
                (1.0 - power_decay(std, images, images_per_step)) * applied,
            )

    def state(self) -> dict[str, Tensor]:
        """Return `STD/PARAMETER` -> average, without copying. Copy into these tensors to load a state."""
        return {f"{std}/{name}": tensor for std, of in self._averages.items() for name, tensor in of.items()}

    def snapshot(self, *, keep: bool) -> dict[str, Tensor]:
        """Return the whole averages in host memory, as `state` names them. Collective: call on every rank.

        Tensors are gathered one at a time, so that devices never hold all.

        Args:
            keep: False returns nothing, on ranks that do not write them.
        """
        found = {}
        for name, tensor in self.state().items():
            gathered = whole(tensor)
            if keep:
                found[name] = gathered.cpu()
        return found

    def check(self, path: Path, saved: Mapping[str, Stored]) -> None:
        """Raise UserError unless a checkpoint's averages are of these widths and of this generator."""
        expected, found = ({key: value.shape for key, value in tensors.items()} for tensors in (self.state(), saved))
        if expected and expected != found:
            widths = ",".join(sorted({key.partition("/")[0] for key in saved}))
            there, fix = "no averages", "leave ema.profiles out"
            if widths:
                there, fix = f"averages of the widths [{widths}]", f"set ema.profiles=[{widths}]"
            raise UserError(
                f"{path}: ema.profiles: found {there}, and a profile averages all of a run; {fix}, or start at step 0 "
                "with --resume never"
            )


def _move(averages: list[Tensor], live: list[Tensor], share: Tensor) -> None:
    """averages += share * (live - averages), where `share` is a number on the device."""
    change = torch._foreach_sub(live, averages)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(averages, change)
