"""The two players. Each is one module whose single forward computes its whole objective.

A wrapper (DDP, later DeepSpeed) then sees one forward and one backward per micro-batch, whatever happens inside:
two passes through the network, gradient penalties with their own backward, collectives of batch statistics. The
opponent is referenced, not registered, so that a wrapper sees one network's parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distgan.config import ObjectiveConfig, OptimizerConfig
from distgan.distributed.runtime import Runtime
from distgan.objectives import penalties
from distgan.objectives.adversarial import ADVERSARIAL

Outcome = tuple[Tensor, dict[str, Tensor]]
Totals = dict[str, tuple[float, float]]


class DiscriminatorObjective(nn.Module):
    """The discriminator's loss on one micro-batch, and its parts.

    Under bf16 the networks run in autocast; losses are float32, and so is a whole pass whose input gradient is
    penalised.
    """

    def __init__(
        self, network: nn.Module, generator: nn.Module, config: ObjectiveConfig, autocast_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.network = network
        self._opponent = (generator,)
        self.config = config
        self.autocast_dtype = autocast_dtype

    def forward(
        self, reals: Tensor, real_labels: Tensor | None, latents: Tensor, fake_labels: Tensor | None, penalised: bool
    ) -> Outcome:
        """Reals (n, C, R, R) in [-1, 1], latents (n, latent_size), labels (n,) or None; penalised: apply R1 now."""
        (generator,) = self._opponent
        with torch.no_grad(), _autocast(reals, self.autocast_dtype):
            fakes = generator(latents, fake_labels)
        if penalised:
            reals = reals.detach().requires_grad_(True)
            # A compiled network has no second derivative; its forward method is the eager one.
            real_logits = self.network.forward(reals, real_labels)
        else:
            with _autocast(reals, self.autocast_dtype):
                real_logits = self.network(reals, real_labels)
        with _autocast(reals, self.autocast_dtype):
            fake_logits = self.network(fakes.to(reals.dtype), fake_labels)
        real_logits, fake_logits = _wide(real_logits), _wide(fake_logits)
        loss = ADVERSARIAL[self.config.adversarial].discriminator(real_logits, fake_logits)
        parts = {
            "loss/discriminator": loss,
            "discriminator/real_logit": real_logits.mean(),
            "discriminator/fake_logit": fake_logits.mean(),
            "discriminator/real_probability": real_logits.sigmoid().mean(),
            "discriminator/fake_probability": fake_logits.sigmoid().mean(),
        }
        if penalised and self.config.r1 is not None:
            penalty = penalties.r1(real_logits, reals, self.config.r1.gamma)
            parts["loss/r1"] = penalty
            loss = loss + self.config.r1.every * penalty
        return loss, {name: part.detach() for name, part in parts.items()}


class GeneratorObjective(nn.Module):
    """The generator's loss on one micro-batch. The discriminator's parameters are constants in it."""

    def __init__(
        self, network: nn.Module, discriminator: nn.Module, config: ObjectiveConfig, autocast_dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.network = network
        self._opponent = (discriminator,)
        self.config = config
        self.autocast_dtype = autocast_dtype

    def forward(self, latents: Tensor, labels: Tensor | None) -> Outcome:
        """Latents (n, latent_size), labels (n,) or None."""
        (discriminator,) = self._opponent
        with _frozen(discriminator), _autocast(latents, self.autocast_dtype):
            logits = discriminator(self.network(latents, labels), labels)
        loss = ADVERSARIAL[self.config.adversarial].generator(_wide(logits))
        return loss, {"loss/generator": loss.detach()}


class Player:
    """A network with its objective (wrapped for all ranks), its optimizer, and its count of skipped updates."""

    def __init__(self, role: str, objective: nn.Module, config: OptimizerConfig, runtime: Runtime) -> None:
        self.role = role
        self.runtime = runtime
        network = objective.network
        assert isinstance(network, nn.Module)
        self.network = network
        self.engine = runtime.wrap(objective)
        self.parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        # Fused kernels can leave everything untouched on the device's own verdict, without the host knowing.
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True
        )
        device = runtime.device
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)
        self.longest_streak = torch.zeros((), device=device)
        self.statistics = Statistics()

    def update(self, micro_batches: list[tuple[object, ...]], learning_rate: float) -> Tensor:
        """One optimizer step on the mean loss of some micro-batches.

        Returns a 0-d tensor: 1 if the update was applied, 0 if its loss or gradient was not finite on some rank and
        it was skipped, in which case weights and optimizer state are untouched.
        """
        parts: list[dict[str, Tensor]] = []
        for number, arguments in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            with self.runtime.gradients_stay_local(self.engine, not last):
                loss, values = self.engine(*arguments)
                # A loss that is not finite makes every gradient so, on all ranks once they are summed: all ranks
                # then come to the same verdict from the gradients, without a word.
                verdict = torch.where(loss.isfinite(), 1.0, torch.nan) / len(micro_batches)
                (loss * verdict).backward()
            parts.append(values)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        applied = norm.isfinite().float()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.found_inf = 1.0 - applied  # type: ignore[attr-defined]
        self.optimizer.grad_scale = None  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1.0 - applied
        self.skipped_in_a_row = (self.skipped_in_a_row + 1.0) * (1.0 - applied)
        self.longest_streak = torch.maximum(self.longest_streak, self.skipped_in_a_row)
        for values in parts:
            self.statistics.add({**values, f"gradient_norm/{self.role}": norm}, applied)
        return applied

    def settle(self, arguments: tuple[object, ...]) -> None:
        """Two throw-away passes, which leave no trace but in DDP.

        It arranges its buckets after the first backward. A resumed run would otherwise add its first gradients up in
        another order than the run it continues, and differ from it in the last bits from three ranks on.
        """
        for _ in range(2):
            loss, _values = self.engine(*arguments)
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as `PARAMETER/QUANTITY`, empty before the first update."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        return {
            f"{names[parameter]}/{quantity}": value
            for parameter, state in self.optimizer.state.items()
            for quantity, value in state.items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `optimizer_state`. The caller has checked that names and shapes fit."""
        parameters = dict(self.network.named_parameters())
        for key, tensor in tensors.items():
            name, _, quantity = key.rpartition("/")
            state = self.optimizer.state[parameters[name]]
            if tensor.dim():
                # Fused kernels walk memory as it lies, so moments must lie as their parameter does.
                state[quantity] = torch.empty_like(parameters[name], requires_grad=False).copy_(tensor)
            else:
                state[quantity] = tensor.to(self.runtime.device)


class Statistics:
    """Means over micro-batches and ranks of what a player reports, summed on the device until asked for."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._carried: Totals = {}

    def add(self, values: Mapping[str, Tensor], applied: Tensor) -> None:
        """Add one micro-batch's 0-d values; those of a skipped update (`applied` 0) do not count."""
        names = tuple(values)
        row = torch.stack([*(value.double() for value in values.values()), applied.double()])
        # An applied update can still report an infinite logit, where its loss is flat.
        row = torch.where(applied > 0, row.nan_to_num(), 0.0)
        if names in self._sums:
            self._sums[names] += row
        else:
            self._sums[names] = row

    def totals(self, runtime: Runtime) -> Totals:
        """Sum and count of each value over all ranks; one all-reduce, and a wait for the device."""
        totals = dict(self._carried)
        if not self._sums:
            return totals
        flat = runtime.all_reduce_sum(torch.cat(list(self._sums.values()))).tolist()
        for names in self._sums:
            row, flat = flat[: len(names) + 1], flat[len(names) + 1 :]
            for name, value in zip(names, row, strict=False):
                total, count = totals.get(name, (0.0, 0.0))
                totals[name] = total + value, count + row[-1]
        return totals

    def reduce(self, runtime: Runtime) -> dict[str, float]:
        """Means since the last call, over all ranks."""
        totals = self.totals(runtime)
        self.carry({})
        return {name: total / count for name, (total, count) in totals.items() if count}

    def carry(self, totals: Mapping[str, Sequence[float]]) -> None:
        """Forget what was added, and go on from the totals of an interval that was interrupted."""
        self._sums.clear()
        self._carried = {name: (total, count) for name, (total, count) in totals.items()}


def _autocast(like: Tensor, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(like.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """The network's parameters take no gradient from a forward inside; its input does."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
