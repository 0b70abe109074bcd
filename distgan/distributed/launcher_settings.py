"""Settings that `accelerate launch` passes to processes in the environment, from its flags or its config file.

Precision, compilation and activation checkpointing fill keys that the config leaves open. What distgan does not do is
refused: training would otherwise ignore it without a word. The engines check the settings of DeepSpeed and FSDP.
"""

from __future__ import annotations

import os

from distgan.config import Config
from distgan.errors import UserError

_FILLS = {
    "ACCELERATE_MIXED_PRECISION": ("bf16", "mixed_precision", "bf16", "--mixed_precision bf16"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "compile", True, "--dynamo_backend inductor"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("TRUE", "activation_checkpointing", True, "--fsdp_activation_checkpointing true"),
}
"""Variable -> value that sets something, key of `training` with the value it gets, and the flag."""

_OVERFLOW = "gradient penalties and batch-norm statistics overflow in it; use --mixed_precision bf16"
_NEVER = {
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "use --multi_gpu, --use_deepspeed or --use_fsdp"),
    "XLA_USE_BF16": ("--tpu", "distgan does not train on TPUs; use --multi_gpu"),
    "XLA_DOWNCAST_BF16": ("--tpu --downcast_bf16", "distgan does not train on TPUs; use --multi_gpu"),
}
"""Variable that may not be true -> the flag, and the reason with the fix."""
_NOT_WITH_COMPILE = {
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "--dynamo_use_fullgraph",
    "ACCELERATE_DYNAMO_USE_DYNAMIC": "--dynamo_use_dynamic",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "--dynamo_use_regional_compilation",
}
"""Variable that may not be true if the launcher compiles -> the flag."""


def check_launcher_settings() -> None:
    """Raise UserError if the launcher asks for something that distgan does not do."""
    precision, backend = _found("ACCELERATE_MIXED_PRECISION", "no"), _found("ACCELERATE_DYNAMO_BACKEND", "NO").upper()
    if precision not in ("no", "bf16"):
        why = _OVERFLOW if precision in ("fp16", "fp8") else "expected no or bf16"
        _refuse(f"--mixed_precision {precision}", f"{why}, or set training.mixed_precision in the distgan config")
    for variable, (flag, why) in _NEVER.items():
        if _is_true(variable):
            _refuse(flag, why)
    if _is_true("ACCELERATE_USE_PARALLELISM_CONFIG") and not _is_true("ACCELERATE_USE_FSDP"):
        _refuse("--use_parallelism_config", "only FSDP2 has replicas of shards; add --use_fsdp, or remove it")
    if backend == "NO":
        return
    if backend != "INDUCTOR":
        _refuse(
            f"--dynamo_backend {backend.lower()}",
            "distgan compiles with inductor; use --dynamo_backend inductor, or set training.compile=true instead",
        )
    mode = _found("ACCELERATE_DYNAMO_MODE", "default")
    refused = [f"--dynamo_mode {mode}"] if mode != "default" else []
    refused += [flag for variable, flag in _NOT_WITH_COMPILE.items() if _is_true(variable)]
    if refused:
        _refuse(refused[0], "distgan compiles with torch's defaults; remove it, or set training.compile=true instead")


def with_launcher_settings(config: Config) -> Config:
    """Return the config with the keys set that it leaves open and the launcher sets.

    Raises:
        UserError: the launcher and the config set a key differently.
    """
    training = config.training
    for variable, (setting, key, value, flag) in _FILLS.items():
        found = getattr(training, key)
        if _found(variable, "").upper() != setting.upper() or getattr(found, "dtype", found) == value:
            continue
        if key in training.model_fields_set:
            written = str(value).lower()
            raise UserError(
                f"{flag} of accelerate launch: the config has training.{key} = {str(found).lower()}; remove the flag "
                f"(or the setting in accelerate's config file), or set training.{key}={written}"
            )
        training = training.model_copy(update={key: value})
    return config if training is config.training else config.model_copy(update={"training": training})


def filled_keys(before: Config, after: Config) -> dict[str, object]:
    """Return the keys that `with_launcher_settings` set, with their values."""
    keys = (key for _, key, _, _ in _FILLS.values())
    values = {key: getattr(after.training, key) for key in keys}
    return {f"training.{key}": value for key, value in values.items() if value != getattr(before.training, key)}


def _found(variable: str, default: str) -> str:
    return os.environ.get(variable) or default


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


def _refuse(flag: str, why: str) -> None:
    raise UserError(f"{flag} of accelerate launch: {why}", everywhere=True)
