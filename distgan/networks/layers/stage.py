"""Stages of a network, each at one resolution, whose precision can be chosen apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distgan.distributed.collectives import at_least_float32
from distgan.errors import UserError


class Stage(nn.Sequential):
    """Layers that belong to one resolution, in pixels per side.

    With `training.mixed_precision: {dtype: bf16, float32_below: R}` a stage below R runs in float32, and the others in
    the precision around them. A layer that changes the resolution belongs to the larger one, as in R3GAN's code.
    """

    def __init__(self, resolution: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.resolution = resolution
        self.float32_below = 0

    def forward(self, activations: Tensor) -> Tensor:
        if self.resolution >= self.float32_below:
            return self._run(activations)
        with torch.autocast(activations.device.type, enabled=False):
            return self._run(at_least_float32(activations))

    def _run(self, activations: Tensor) -> Tensor:
        for layer in self:
            activations = layer(activations)
        return activations


def set_float32_below(network: nn.Module, name: str, resolution: int) -> None:
    """Run a network's stages below a resolution in float32.

    Raises:
        UserError: the network has no stages.
    """
    stages = [module for module in network.modules() if isinstance(module, Stage)]
    if not stages:
        raise UserError(
            f"{name}: has_stages is set, but it has no distgan.networks.layers.stage.Stage; build its layers of these, "
            "or set training.mixed_precision=bf16"
        )
    for stage in stages:
        stage.float32_below = resolution
