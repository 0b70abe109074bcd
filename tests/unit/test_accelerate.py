"""The configs of launch/accelerate and launch/deepspeed: what accelerate makes of them, up to the start of torchrun."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml"))


def test_there_is_a_config_for_each_way_to_train() -> None:
    assert CONFIGS == [
        "cpu", "deepspeed-zero1", "deepspeed-zero2", "fsdp", "hsdp", "multi-gpu", "multi-node", "single-gpu",
    ]  # fmt: skip


RANKS = {
    "cpu": {"CUDA_VISIBLE_DEVICES": "-1,-1"},
    "deepspeed-zero1": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero1.json",
    },
    "deepspeed-zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "launch/deepspeed/zero2.json",
    },
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false",
    },
    "hsdp": {
        "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "8",
    },
    "multi-gpu": {},
    "multi-node": {},
}  # fmt: skip
"""What accelerate tells each rank of its engine and devices, with each config that starts several."""
ENGINES = (
    "ACCELERATE_USE_",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE",
    "FSDP_",
    "PARALLELISM_CONFIG_",
    "CUDA_VISIBLE_DEVICES",
)

Launched = Callable[..., tuple[argparse.Namespace, dict[str, str]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """`accelerate launch` with a config and flags, up to the start of torchrun: its arguments, and the environment."""
    for key in [key for key in os.environ if key.startswith(ENGINES)]:
        monkeypatch.delenv(key)
    prepared: list[tuple[argparse.Namespace, dict[str, str]]] = []

    def deepspeed(arguments: argparse.Namespace) -> None:
        command, environment = prepare_deepspeed_cmd_env(arguments)
        assert command is None, "DeepSpeed's own launcher would start the ranks"
        prepared.append((arguments, environment))

    monkeypatch.setattr(launch, "deepspeed_launcher", deepspeed)
    monkeypatch.setattr(launch, "multi_gpu_launcher", lambda each: prepared.append((each, prepare_multi_gpu_env(each))))

    def start(name: str, *flags: str) -> tuple[argparse.Namespace, dict[str, str]]:
        file = str(ROOT / "launch" / "accelerate" / f"{name}.yaml")
        command = ["--config_file", file, *flags, "-m", "distgan", "train", "x.yaml", "training.steps=3"]
        launch.launch_command(launch.launch_command_parser().parse_args(command))
        return prepared.pop()

    return start


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_accepts_the_config_and_refuses_a_key_that_it_does_not_know(name: str, tmp_path: Path) -> None:
    file = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    load_config_from_file(str(file))
    (tmp_path / "misspelled.yaml").write_text(file.read_text() + "num_proceses: 2\n")
    with pytest.raises(ValueError, match="num_proceses"):
        load_config_from_file(str(tmp_path / "misspelled.yaml"))


@pytest.mark.parametrize("name", RANKS)
def test_a_config_starts_the_ranks_of_its_name(launched: Launched, name: str) -> None:
    # Not machine 0, where accelerate looks whether the port is in use.
    arguments, environment = launched(name, "--machine_rank", "1")
    assert (arguments.num_machines, arguments.num_processes) == {
        "cpu": (1, 2),
        "multi-node": (2, 16),
        "hsdp": (2, 16),
    }.get(name, (1, 8))
    assert arguments.nproc_per_node == ("2" if name == "cpu" else "8")
    told = {key: value for key, value in environment.items() if key.startswith(ENGINES)}
    assert told.items() >= RANKS[name].items()
    # FSDP has more settings; the others have no trace of an engine that is not theirs.
    assert name in ("fsdp", "hsdp") or told == RANKS[name]
    # The recipe decides on both.
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment.get("ACCELERATE_DYNAMO_BACKEND", "NO") == "NO"


def test_the_config_of_one_process_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[argparse.Namespace] = []
    monkeypatch.setattr(launch, "simple_launcher", started.append)
    command = ["--config_file", str(ROOT / "launch" / "accelerate" / "single-gpu.yaml"), "-m", "distgan", "doctor"]
    launch.launch_command(launch.launch_command_parser().parse_args(command))
    [arguments] = started
    assert (arguments.num_machines, arguments.num_processes, arguments.mixed_precision) == (1, 1, "no")
    _, environment = prepare_simple_launcher_cmd_env(arguments)
    assert environment["ACCELERATE_USE_CPU"] == "False"


@pytest.mark.parametrize("name", RANKS)
def test_flags_win_over_the_config(launched: Launched, name: str) -> None:
    arguments, environment = launched(
        name, "--num_machines", "2", "--machine_rank", "1", "--num_processes", "6", "--main_process_ip", "10.0.0.1",
        "--main_process_port", "29777", "--rdzv_backend", "c10d",
    )  # fmt: skip
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "3", 1)
    assert (arguments.rdzv_endpoint, arguments.rdzv_backend) == ("10.0.0.1:29777", "c10d")
    assert environment.items() >= RANKS[name].items()


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_clips_nothing_and_takes_any_optimizer(stage: int) -> None:
    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"deepspeed-zero{stage}.yaml"))
    settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
    assert settings["zero_optimization"]["stage"] == stage
    # DeepSpeed's own default would clip at 1.0.
    assert settings["gradient_clipping"] == 0.0
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["train_micro_batch_size_per_gpu"] >= 1
    assert settings["gradient_accumulation_steps"] == 1
    assert not {"fp16", "optimizer", "scheduler"} & settings.keys()


@pytest.mark.parametrize("name", ["fsdp", "hsdp"])
def test_fsdp_leaves_the_wrapping_to_distgan(name: str) -> None:
    config = load_config_from_file(str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert config.fsdp_config["fsdp_version"] == 2
    assert config.fsdp_config["fsdp_auto_wrap_policy"] == "NO_WRAP"
