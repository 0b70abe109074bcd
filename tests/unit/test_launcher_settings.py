"""What `accelerate launch` puts into the environment, by its own functions, and what training makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from distgan.config import Config, parse_config
from distgan.distributed.launcher_settings import check_launcher_settings, filled_keys, with_launcher_settings
from distgan.errors import UserError

ROOT = Path(__file__).parents[2]
MULTI, FSDP = ("--multi_gpu", "--num_processes", "2"), ("--use_fsdp", "--num_processes", "2", "--fsdp_version", "2")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Take the environment that the launcher would give its processes, of flags."""

    def launch(*flags: str) -> None:
        arguments, _, _ = _validate_launch_command(
            launch_command_parser().parse_args([*flags, "--main_process_port", "0", "-m", "distgan"])
        )
        if arguments.multi_gpu or arguments.use_fsdp or arguments.use_megatron_lm:
            environment = prepare_multi_gpu_env(arguments)
        else:
            _, environment = prepare_simple_launcher_cmd_env(arguments)
        for name, value in environment.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)

    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(name)
    return launch


def config(**training: Any) -> Config:
    return parse_config(
        {"run_dir": "r", "data": {"path": "d", "resolution": 16}, "training": {"steps": 5, "batch_size": 4, **training}}
    )


def test_the_launcher_fills_what_the_config_leaves_open(launched: Any) -> None:
    launched(*MULTI, "--mixed_precision", "bf16", "--dynamo_backend", "inductor")
    check_launcher_settings()
    before = config()
    after = with_launcher_settings(before)
    assert (after.training.mixed_precision, after.training.compile) == ("bf16", True)
    assert filled_keys(before, after) == {"training.mixed_precision": "bf16", "training.compile": True}
    assert after == config(mixed_precision="bf16", compile=True)
    # As a resume from the run's own config.yaml does.
    assert with_launcher_settings(after) is after
    assert with_launcher_settings(config(compile=True)).training.mixed_precision == "bf16"
    # bfloat16 by stage is bfloat16.
    network = {"architecture": "r3gan"}
    values = config(mixed_precision="bf16", compile=True).model_dump() | {
        "generator": network,
        "discriminator": network,
    }
    values["training"]["mixed_precision"] = {"float32_below": 8}
    by_stage = parse_config(values)
    assert with_launcher_settings(by_stage) is by_stage


def test_fsdp_fills_activation_checkpointing(launched: Any) -> None:
    launched(*FSDP)
    assert not with_launcher_settings(config()).training.activation_checkpointing
    launched(*FSDP, "--fsdp_activation_checkpointing", "true")
    assert with_launcher_settings(config()).training.activation_checkpointing
    with pytest.raises(UserError, match=r"--fsdp_activation_checkpointing true .*activation_checkpointing = false"):
        with_launcher_settings(config(activation_checkpointing=False))


def test_replicas_are_of_fsdp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(UserError, match=r"--use_parallelism_config .*add --use_fsdp"):
        check_launcher_settings()


@pytest.mark.parametrize(
    ("flags", "training", "parts"),
    [
        (
            ["--mixed_precision", "bf16"], {"mixed_precision": "no"},
            ["--mixed_precision bf16", "training.mixed_precision = no", "training.mixed_precision=bf16"],
        ),
        (["--mixed_precision", "bf16"], {"mixed_precision": "tf32"}, ["training.mixed_precision = tf32"]),
        (
            ["--dynamo_backend", "inductor"], {"compile": False},
            ["--dynamo_backend inductor", "training.compile = false", "training.compile=true"],
        ),
    ],
)  # fmt: skip
def test_a_contradiction_is_refused(
    launched: Any, flags: list[str], training: dict[str, Any], parts: list[str]
) -> None:
    launched(*MULTI, *flags)
    check_launcher_settings()
    with pytest.raises(UserError) as caught:
        with_launcher_settings(config(**training))
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ([*MULTI, "--mixed_precision", "fp16"], ["--mixed_precision fp16", "overflow", "training.mixed_precision"]),
        ([*MULTI, "--dynamo_backend", "eager"], ["--dynamo_backend eager", "training.compile=true"]),
        (
            [*MULTI, "--dynamo_backend", "inductor", "--dynamo_mode", "max-autotune"],
            ["--dynamo_mode max-autotune", "training.compile=true"],
        ),
        ([*MULTI, "--dynamo_backend", "inductor", "--dynamo_use_fullgraph"], ["--dynamo_use_fullgraph"]),
        ([*MULTI, "--dynamo_backend", "inductor", "--dynamo_use_dynamic"], ["--dynamo_use_dynamic"]),
        (
            [*MULTI, "--dynamo_backend", "inductor", "--dynamo_use_regional_compilation"],
            ["--dynamo_use_regional_compilation"],
        ),
        (["--use_megatron_lm", "--num_processes", "2"], ["--use_megatron_lm", "--use_fsdp"]),
    ],
)
def test_what_distgan_does_not_do_is_refused(launched: Any, flags: list[str], parts: list[str]) -> None:
    launched(*flags)
    with pytest.raises(UserError) as caught:
        check_launcher_settings()
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variable", ["XLA_USE_BF16", "XLA_DOWNCAST_BF16"])
def test_tpus_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match="--tpu"):
        check_launcher_settings()


@pytest.mark.parametrize("training", [{}, {"mixed_precision": "bf16", "compile": True}, {"mixed_precision": "tf32"}])
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "launch" / "accelerate").glob("*.yaml")))
def test_the_shipped_launch_files_change_nothing(launched: Any, name: str, training: dict[str, Any]) -> None:
    launched("--config_file", str(ROOT / "launch" / "accelerate" / f"{name}.yaml"))
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no"
    check_launcher_settings()
    unchanged = config(**training)
    assert with_launcher_settings(unchanged) is unchanged


def test_without_a_launcher_nothing_changes(launched: Any) -> None:
    check_launcher_settings()
    unchanged = config()
    assert with_launcher_settings(unchanged) is unchanged
