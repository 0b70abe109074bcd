"""What a launcher may ask of the engines, and what is refused with a reason."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from distgan.distributed.engines.choice import chosen_engine
from distgan.distributed.engines.ddp import DDPEngine
from distgan.distributed.engines.deepspeed_config import read_deepspeed_config
from distgan.distributed.engines.fsdp import FSDPEngine
from distgan.distributed.engines.fsdp_config import replicas
from distgan.distributed.engines.zero import ZeroEngine
from distgan.errors import UserError


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are read and refused before DeepSpeed itself is needed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def write(folder: Path, **settings: Any) -> Path:
    """A DeepSpeed config for stage 2, with settings over it; keys of zero_optimization are merged."""
    zero = {"stage": 2, **settings.pop("zero_optimization", {})}
    path = folder / "deepspeed.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero, **settings}))
    return path


def test_nothing_chosen_is_ddp() -> None:
    assert chosen_engine() is DDPEngine


def test_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replicas(8) == 1
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    assert replicas(8) == 2
    with pytest.raises(UserError, match=r"dp_replicate_size: 2 times .*dp_shard_size: 4 is 8, but there are 6"):
        replicas(6)


def test_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert chosen_engine() is FSDPEngine


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_by_flags(monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
    assert chosen_engine().func is ZeroEngine  # type: ignore[attr-defined]
    config = read_deepspeed_config()
    assert config["zero_optimization"]["stage"] == stage
    # DeepSpeed's own default is 1.0.
    assert config["gradient_clipping"] == 0.0


def test_a_deepspeed_file_keeps_what_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"reduce_bucket_size": 1000, "overlap_comm": True}
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(write(tmp_path, zero_optimization=own)))
    config = read_deepspeed_config()
    assert own.items() <= config["zero_optimization"].items()
    assert config["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"zero_optimization": {"stage": 3}}, ["zero_optimization.stage = 3", "ZeRO-3", "second derivative", "1 or 2"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage = 0", "expected 1 or 2", "--multi_gpu"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled", "overflow", "training.mixed_precision: bf16"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "training.mixed_precision: bf16"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping = 1.0", "set it to 0.0", "max_gradient_norm"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer", "generator.optimizer"]),
        (
            {"gradient_accumulation_steps": 4},
            ["gradient_accumulation_steps = 4", "training.gradient_accumulation_steps"],
        ),
        ({"communication_data_type": "bf16"}, ["communication_data_type", "training.gradient_precision"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["offload_optimizer.device = 'cpu'", "none"]),
    ],
)
def test_refused_deepspeed_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], messages: list[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(write(tmp_path, **settings)))
    with pytest.raises(UserError) as caught:
        read_deepspeed_config()
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.everywhere


@pytest.mark.parametrize("content", ["{", "[]", '{"train_batch_size": 4}', None])
def test_damaged_or_missing_deepspeed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    with pytest.raises(UserError, match=r"^the DeepSpeed config [^\n:]+: [^\n]+$"):
        read_deepspeed_config()


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"transformers .*pip install 'distgan\[deepspeed\]'"):
        chosen_engine()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"FSDP_VERSION": "1"}, "use fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "100"}, "use NO_WRAP"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"},
            "fsdp_activation_checkpointing_offload",
        ),
        ({"FSDP_FORWARD_PREFETCH": "true"}, "fsdp_forward_prefetch"),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "fsdp_sharding_strategy: HYBRID_SHARD.*dp_replicate_size"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
            "parallelism_config_cp_size: 2: distgan has no context parallelism",
        ),
        ({"FSDP_IGNORED_MODULES": "logit"}, "fsdp_ignored_modules"),
        ({"FSDP_AUTO_WRAP_POLICY": "STRANGE"}, "FSDP config .*STRANGE"),
    ],
)
def test_refused_fsdp_configs(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], message: str) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **settings}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        chosen_engine()
