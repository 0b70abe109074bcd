"""DeepSpeed config of the launcher: checks, and settings that distgan adds.

The distgan config decides optimizers, batch sizes and precision. A DeepSpeed config that sets them differently is
refused.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from typing import Any

from accelerate.utils import DeepSpeedPlugin

from distgan.errors import UserError

_DECIDED_BY_THE_RECIPE = {
    "optimizer": ((), "generator.optimizer and discriminator.optimizer"),
    "scheduler": ((), "generator.optimizer.learning_rate and discriminator.optimizer.learning_rate"),
    "train_batch_size": ((), "training.batch_size"),
    "train_micro_batch_size_per_gpu": ((1,), "training.batch_size"),
    "gradient_accumulation_steps": ((1,), "training.gradient_accumulation_steps"),
    "communication_data_type": ((), "training.gradient_precision"),
}
"""Key of a DeepSpeed config -> values that are accepted besides `auto`, and the distgan key that decides it."""

_REFUSED = {
    "fp16.enabled": "gradient penalties overflow in float16, and loss scaling skips updates of one player only; "
    "remove it and set training.mixed_precision: bf16",
    "bf16.enabled": "it stores the weights in bfloat16, but gradient penalties need float32 weights; "
    "remove it and set training.mixed_precision: bf16, which keeps the weights in float32",
    "torch_autocast.enabled": "it runs gradient penalties in low precision; "
    "remove it and set training.mixed_precision: bf16",
    "gradient_clipping": "set it to 0.0, and max_gradient_norm of both optimizers in the recipe",
    "zero_optimization.offload_optimizer.device": "DeepSpeed's CPU optimizers cannot skip an update with non-finite "
    "gradients; use none",
    "zero_optimization.cpu_offload": "DeepSpeed's CPU optimizers cannot skip an update with non-finite gradients; "
    "remove it",
    "zero_optimization.offload_param.device": "only ZeRO-3 can offload parameters; use none",
    "zero_optimization.round_robin_gradients": "it only serves optimizer offloading; remove it",
}
"""Key of a DeepSpeed config that may not be enabled -> the reason and the fix."""


def read_deepspeed_config() -> dict[str, Any]:
    """Return the DeepSpeed config that the launcher chose, with the settings that distgan adds.

    Raises:
        UserError: DeepSpeed is not installed, the config cannot be read, or one of its keys is refused.
    """
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
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed requires a number, but uses it only in its log
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1.0
        "zero_allow_untested_optimizer": True,
        # ZeroEngine computes the norm in an optimizer hook. DeepSpeed would make the host wait for the device.
        "zero_optimization": zero | {"compute_grad_norm": False},
    }


def _check(config: Mapping[str, Any]) -> None:
    def refuse(key: str, found: Any, why: str) -> None:
        raise UserError(f"DeepSpeed config: {key} = {found!r}: {why}", everywhere=True)

    stage = _value(config, "zero_optimization.stage")
    if stage == 3:
        refuse(
            "zero_optimization.stage", stage,
            "ZeRO-3 frees the weights of each layer after its forward pass, but the second derivative of a gradient "
            "penalty and the other player's update need them later; use 1 or 2",
        )  # fmt: skip
    if stage not in (1, 2):
        refuse("zero_optimization.stage", stage, "expected 1 or 2; without ZeRO, launch with --multi_gpu")
    for key, (harmless, recipe) in _DECIDED_BY_THE_RECIPE.items():
        if (found := config.get(key, "auto")) not in ("auto", *harmless):
            refuse(key, found, f"{recipe} in the distgan config decides it; set it there, and remove it here")
    for key, why in _REFUSED.items():
        if (found := _value(config, key)) not in (None, "auto", "none", False, 0, 0.0):
            refuse(key, found, why)


def _value(config: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key; None if it is missing."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
