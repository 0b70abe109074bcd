"""Engine for DDP and for a single process: weights and optimizer state are replicated on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import patch_environment
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from distgan.distributed.engines.base import (
    EngineRuntime,
    MakeOptimizer,
    apply_settings,
    by_parameter,
    cancel_unless_finite,
    clip,
    restore_state,
    state_tensors,
)
from distgan.distributed.parts import Held, Stored, load_parts


class DDPEngine:
    """DDP, or plain PyTorch in a single process. See `Engine`."""

    name = "DDP"
    regroups_moments = True

    def __init__(self, objective: nn.Module, network: nn.Module, make_optimizer: MakeOptimizer, runtime: EngineRuntime):
        self.network, self.runtime = network, runtime
        self._objective = objective.to(runtime.device)
        self.module = self._wrap()
        self.optimizer = make_optimizer(list(network.parameters()))

    def _wrap(self) -> nn.Module:
        if self.runtime.world_size == 1:
            return self._objective
        # The module is on its device already. Accelerate would derive the device from the local rank, which is wrong if
        # ranks share a GPU.
        with warnings.catch_warnings(), patch_environment(accelerate_bypass_device_map="true"):
            # Newer torch versions rename broadcast_buffers, and Accelerate still passes the old name.
            warnings.simplefilter("ignore", FutureWarning)
            wrapped: DistributedDataParallel = self.runtime.accelerator.prepare_model(self._objective)
        if self.runtime.gradients_in_bf16:
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            return self.module.no_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, settings: Mapping[str, Any], max_norm: float | None = None) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        clip(self.network.parameters(), norm, max_norm)
        apply_settings(self.optimizer, settings)
        cancel_unless_finite(self.optimizer, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def warm_up_buckets(self, arguments: tuple[object, ...]) -> None:
        """Run two backward passes, because DDP rebuilds its buckets after the first one.

        Without them, a resumed run would sum its first gradients in another order than the uninterrupted run. With
        three or more ranks the results would differ in the last bits.
        """
        for _ in range(2 if isinstance(self.module, DistributedDataParallel) else 0):
            loss, _values = self.module(*arguments)
            loss.backward()
            self.optimizer.zero_grad(set_to_none=True)

    def update_param_groups(self, *, keep_moments: bool) -> None:
        # Drop the old DDP wrapper first. Otherwise its hooks and those of the new wrapper would both reduce gradients.
        self.module = self._objective
        self.module = self._wrap()
        if not keep_moments:
            self.optimizer.state.clear()

    @torch.no_grad()
    def change_weights(self, parameters: Iterable[nn.Parameter], change: Callable[[Tensor], Any]) -> None:
        for parameter in parameters:
            change(parameter)

    def weights(self) -> dict[str, Held]:
        return dict(self.network.state_dict())

    def load_weights(self, tensors: Mapping[str, Stored]) -> None:
        load_parts(self.network.state_dict(), tensors)

    def optimizer_state(self) -> dict[str, Held]:
        return {
            f"{name}/{quantity}": value
            for name, parameter in self.network.named_parameters()
            for quantity, value in state_tensors(self.optimizer.state.get(parameter, {})).items()
        }

    def load_optimizer_state(self, tensors: Mapping[str, Stored]) -> None:
        self.optimizer.state.clear()
        parameters = dict(self.network.named_parameters())
        for name, quantities in by_parameter(tensors).items():
            parameter = parameters[name]
            self.optimizer.state[parameter] = {
                quantity: restore_state(self.optimizer, parameter, quantity, value)
                for quantity, value in quantities.items()
            }

    def close(self) -> None:
        self.runtime.accelerator.free_memory()  # it keeps each model that it wrapped
