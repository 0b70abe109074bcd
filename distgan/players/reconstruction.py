"""Loss of an autoencoder, around the adversarial term of a generator."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from distgan import schedule
from distgan.config import ObjectiveConfig
from distgan.config.objective.reconstruction import PerceptualConfig, ReconstructionConfig
from distgan.distributed.blocks import declared_blocks
from distgan.distributed.collectives import at_least_float32
from distgan.errors import UserError, blaming
from distgan.losses.lpips import LPIPS, convolutions, load_lpips
from distgan.losses.reconstruction import adaptive_weight, kl_divergence
from distgan.networks.autoencoder.network import reconstruct
from distgan.networks.hooks import find_layer
from distgan.networks.layers.normalization import tracks_statistics
from distgan.players.samples import MicroBatch
from distgan.published_weights import VGG16, Wording

_KEY = "objective.reconstruction"


def generate(
    config: ObjectiveConfig, generator: nn.Module, batch: MicroBatch, labels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return fakes, and the moments of their latents if they are reconstructions of the reals, else None."""
    if config.reconstruction is None:
        return generator(batch.latents, labels), None
    assert batch.reals is not None
    return reconstruct(generator, batch.reals, batch.latents)


def has_started(config: ReconstructionConfig | None, images: int) -> bool:
    """Return True if the adversarial term of an autoencoder has started; always for other generators.

    Before, the training loop leaves out the discriminator's updates: its weights and its optimizer's state stay as they
    are at first, and only its batch-norm statistics move, in the passes of the autoencoder's updates. The released code
    (CompVis/taming-transformers) multiplies the discriminator's loss by 0 instead and so updates it with gradients of
    0. Those count as steps of Adam, so that the bias correction is spent and the first real updates are too large.

    Args:
        images: images before the step.
    """
    return config is None or images >= 1000 * config.adversarial_start_kimg


class Reconstruction:
    """L1 + LPIPS + KL + lambda times the adversarial term, of one rank's part of a micro-batch.

    Raises:
        UserError: the network lacks `encode`, `decode` or its last layer, or has batch norm; the weights of LPIPS
            cannot be read.
    """

    def __init__(self, network: nn.Module, config: ReconstructionConfig, length: int) -> None:
        """length: images of the whole run, over which scheduled weights change."""
        self._config, self._network, self._length = config, network, length
        _check_network(network, adaptive=config.adaptive)
        # No attribute of a module, because a wrapper would train or shard it.
        self._perceptual: LPIPS | None = None
        if config.perceptual is not None:
            self._perceptual = _load_perceptual(config.perceptual).to(next(network.parameters()).device)

    def add(
        self, adversarial: Tensor, parts: dict[str, Tensor], reals: Tensor | None, fakes: Tensor, moments: Tensor,
        images: int,
    ) -> Tensor:  # fmt: skip
        """Return the loss, and add its terms to `parts`. Collective if the weight is adaptive and not 0.

        Args:
            adversarial: adversarial loss, shape ().
            reals, fakes: images and their reconstructions, (n, C, R, R).
            moments: of the latents, (n, 2c, h, h).
            images: images before this step, which schedules follow.
        """
        assert reals is not None
        config, fakes = self._config, at_least_float32(fakes)
        loss = parts["loss/l1"] = (reals - fakes).abs().mean()
        if config.perceptual is not None and self._perceptual is not None:
            with torch.autocast(fakes.device.type, enabled=False):
                parts["loss/perceptual"] = self._perceptual(fakes, reals).mean()
            loss = loss + schedule.value(config.perceptual.weight, images, self._length) * parts["loss/perceptual"]
        parts["loss/adversarial"] = adversarial
        factor = schedule.value(config.adversarial_weight, images, self._length) if has_started(config, images) else 0.0
        weight = adversarial.new_full((), factor)
        if factor and config.adaptive:
            weight = weight * adaptive_weight(loss, adversarial, self._last_weight)
        if factor:  # 0 times an infinite value would not be 0
            loss = loss + weight * adversarial
        parts["generator/adversarial_weight"] = weight
        parts["loss/kl"] = kl_divergence(at_least_float32(moments)) / reals[0].numel()
        return loss + schedule.value(config.kl, images, self._length) * parts["loss/kl"]

    @property
    def _last_weight(self) -> Tensor:
        # Looked up in each pass, because FSDP2 gathers it anew.
        return self._network.get_submodule(str(self._network.last_layer)).get_parameter("weight")


def _check_network(network: nn.Module, *, adaptive: bool) -> None:
    name = type(network).__name__
    for method in ("encode", "decode"):
        if not callable(getattr(network, method, None)):
            raise UserError(f"generator.architecture: {name} reconstructs, but has no method {method}; write one")
    if declared_blocks(network):
        raise UserError(
            f"generator.architecture: {name}: found blocks, whose weights are gathered in forward, but encode and "
            "decode are called alone; remove the attribute blocks"
        )
    if any(map(tracks_statistics, network.modules())):
        raise UserError(
            f"generator.architecture: {name}: found batch norm, whose statistics for evaluation are of generated "
            "samples, which an autoencoder has none of; use group norm"
        )
    if adaptive:
        with blaming(f"{_KEY}.adaptive"):
            layer = getattr(network, "last_layer", None)
            if not isinstance(layer, str):
                raise UserError(
                    f"{name} does not say which layer is its last; give the class an attribute last_layer with the "
                    "name of the decoder's last layer, or set it to false"
                )
            find_layer(network, layer)
            if not isinstance(getattr(network.get_submodule(layer), "weight", None), nn.Parameter):
                raise UserError(f"{name}: the layer {layer} has no weight; name another one in last_layer")


def _load_perceptual(config: PerceptualConfig) -> LPIPS:
    wording = Wording("objective.reconstruction.perceptual", f"{_KEY}.perceptual.weights", "", f"set {_KEY}=null")
    tensors = VGG16.read(config.weights, Path(), wording).tensors
    with blaming(config.weights):
        return load_lpips(convolutions(tensors))
