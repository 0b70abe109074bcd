"""Demo: pack digits, train a generator on every GPU or on two CPU processes, evaluate it, and draw samples.

Run it with `make demo`. A second run resumes unfinished training and repeats the quick steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.commands import launched, processes  # noqa: E402

DATA = ROOT / "datasets" / "digits"
RUN = ROOT / "runs" / "digits-dcgan"


def main() -> None:
    started = time.monotonic()
    distgan = [sys.executable, "-m", "distgan"]
    if not (DATA / "index.safetensors").exists():
        call(*distgan, "pack", "builtin:digits", str(DATA), "--resolution", "32", "--shard-size", "300")
    call(*launched(processes(), "train", "configs/digits-dcgan.yaml"))
    call(*distgan, "sample", str(RUN), "--num", "100", "--out", str(RUN / "digits.png"))
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    scores = [(row["step"], row["fid[classifier]"]) for row in rows if "fid[classifier]" in row]
    (first, before), (last, after) = scores[0], scores[-1]
    print(
        f"\nFID (features of a classifier trained on the digits): {before:.1f} at step {first}, "
        f"{after:.1f} at step {last}\n"
        f"100 samples: {RUN / 'digits.png'}\n"
        f"checkpoints, metrics.jsonl, sample grids: {RUN}\n"
        f"TensorBoard: {Path(sys.executable).parent / 'tensorboard'} --logdir {RUN}\n"
        f"({time.monotonic() - started:.0f} s)"
    )


def call(*command: str) -> None:
    """Run a command in the root of the repository. If it fails, exit with its status."""
    status = subprocess.run(command, cwd=ROOT, check=False).returncode
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
