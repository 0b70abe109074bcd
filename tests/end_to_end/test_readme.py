"""Every command in the README is one that works, run here in the order a reader would type them."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import free_port

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]

# What other tests and targets run, and why it is not run here.
ELSEWHERE = {
    "make demo": "test_demo.py",
    "make test": "this is it",
    "pip install -e .": "how this test came to run",
    "tensorboard --logdir runs/digits-dcgan": "test_tensorboard_page.py",
}


def test_every_command_is_known() -> None:
    assert len(COMMANDS) >= 10
    for command in ELSEWHERE:
        assert command in COMMANDS, f"{command} is not in the README any more"


@pytest.mark.timeout(600)
def test_commands_as_written(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    environment = {
        **{key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DISTGAN_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "ACCELERATE_USE_CPU": "true",
    }
    # Short, for the sake of the suite; nothing else about a command is changed.
    short = "training.steps={} evaluation.num_samples=100 evaluation.every=0 checkpoint.every=2 monitoring.every=1"
    steps = 2
    for command in COMMANDS:
        if command in ELSEWHERE:
            continue
        ports = {"--master-port 29400": f"--master-port {free_port()}"}
        for written, free in ports.items():
            command = command.replace(written, free)
        if " train " in command:
            command += " " + short.format(steps)
            steps += 2
        if command.startswith("accelerate launch"):
            command = command.replace("launch", f"launch --main_process_port {free_port()}", 1)
        nodes = 2 if "--nnodes 2" in command else 1
        running = [
            subprocess.Popen(
                shlex.split(command.replace("$RANK_OF_NODE", str(node)).replace("$MASTER_ADDR", "127.0.0.1")),
                cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for node in range(nodes)
        ]  # fmt: skip
        said = [process.communicate(timeout=240)[0] for process in running]
        if command.startswith("distgan stop"):
            assert "nothing to stop: the run is finished" in said[0]
            continue
        assert [process.returncode for process in running] == [0] * nodes, f"{command}\n{''.join(said)}"
    assert (tmp_path / "samples.png").exists()
    assert (tmp_path / "exported" / "model.safetensors").exists()
    assert (tmp_path / "runs" / "digits-dcgan" / "checkpoints" / "step-00000004").exists()
    python = next(block for kind, block in BLOCKS if kind == "python")
    check = "\nassert images.shape == (16, 1, 32, 32)"
    subprocess.run([sys.executable, "-c", python + check], cwd=tmp_path, env=environment, check=True)
