"""The DeepSpeed config that a launcher chose: what of it is DeepSpeed's business, and what is refused with a reason."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from distgan.errors import UserError

_DECIDED_BY_THE_RECIPE = {
    "optimizer": ((), "generator.optimizer and discriminator.optimizer"),
    "scheduler": ((), "generator.optimizer.schedule and discriminator.optimizer.schedule"),
    "train_batch_size": ((), "training.batch_size"),
    "train_micro_batch_size_per_gpu": ((1,), "training.batch_size"),
    "gradient_accumulation_steps": ((1,), "training.gradient_accumulation_steps"),
    "communication_data_type": ((), "training.gradient_precision"),
}
"""Key of a DeepSpeed config -> values it may have all the same, besides `auto`, and the keys of the recipe."""

_REFUSED = {
    "fp16.enabled": "gradient penalties overflow its range, and loss scaling skips updates of one player only; "
    "use training.mixed_precision: bf16",
    "bf16.enabled": "it rounds the weights themselves, and gradient penalties need them in float32; "
    "use training.mixed_precision: bf16, which runs the networks in bfloat16 and keeps their weights",
    "torch_autocast.enabled": "it runs gradient penalties in low precision; use training.mixed_precision: bf16",
    "gradient_clipping": "distgan's optimizers do not clip gradients; set it to 0.0",
    "zero_optimization.offload_optimizer.device": "an update with a gradient that is not finite could not be "
    "canceled on a CPU optimizer of DeepSpeed's; use none",
    "zero_optimization.cpu_offload": "as with offload_optimizer; leave it out",
    "zero_optimization.offload_param.device": "only ZeRO-3 has parameters to spare; use none",
    "zero_optimization.round_robin_gradients": "it is for offloading; leave it out",
}
"""Key of a DeepSpeed config -> why it may not be switched on."""


def read_deepspeed_config() -> dict[str, Any]:
    """The DeepSpeed config that the launcher chose, completed for our players. Raises UserError naming a wrong key."""
    if missing := [name for name in ("deepspeed", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"DeepSpeed was chosen at launch, but {' and '.join(missing)} cannot be imported here; "
            "pip install 'distgan[deepspeed]', or launch with --multi_gpu",
            everywhere=True,
        )
    try:
        plugin = DeepSpeedPlugin()
        plugin.set_mixed_precision("no")
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"the DeepSpeed config cannot be used: {' '.join(str(error).split())}", everywhere=True
        ) from None
    config: dict[str, Any] = copy.deepcopy(plugin.deepspeed_config)
    _check(config)
    config.pop("train_batch_size", None)
    zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    return config | {
        "train_micro_batch_size_per_gpu": 1,  # it is a number in DeepSpeed's log, no more
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # where it is left out, DeepSpeed clips at 1.0
        "zero_allow_untested_optimizer": True,
        # The optimizer's own hook measures the norm: DeepSpeed's would make the host wait for the device.
        "zero_optimization": zero | {"compute_grad_norm": False},
    }


def _check(config: Mapping[str, Any]) -> None:
    def refuse(key: str, found: Any, why: str) -> None:
        raise UserError(f"DeepSpeed config: {key} = {found!r}: {why}", everywhere=True)

    stage = _value(config, "zero_optimization.stage")
    if stage == 3:
        refuse(
            "zero_optimization.stage", stage,
            "ZeRO-3 takes each layer's weights away after its forward pass, but the second derivative of a gradient "
            "penalty needs them later, and so does the opponent's update; use 1 or 2",
        )  # fmt: skip
    if stage not in (1, 2):
        refuse("zero_optimization.stage", stage, "expected 1 or 2; without ZeRO, launch with --multi_gpu")
    for key, (harmless, recipe) in _DECIDED_BY_THE_RECIPE.items():
        if (found := config.get(key, "auto")) not in ("auto", *harmless):
            refuse(key, found, f"the recipe's {recipe} decides this; set it there, and `auto` here or leave it out")
    for key, why in _REFUSED.items():
        if (found := _value(config, key)) not in (None, "auto", "none", False, 0, 0.0):
            refuse(key, found, why)


def _value(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key; None if there is none."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
