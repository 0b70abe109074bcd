"""Run the GPU tests and write a page of GPU benchmarks, in at most eight minutes.

The tool runs tests/gpu, then measures the DCGAN-64, SNGAN-32 and R3GAN-32 recipes at their published widths against a
bare PyTorch loop: images/s, peak memory, share of the peak arithmetic, longest kernels and data wait. It also measures
a discriminator update with R1 and R2 in float32, TF32 and bfloat16, and the stall per checkpoint. Each part is a
process with a time limit. At the limit the tool kills the part, keeps its records and starts the next part. The data
are generated. The page is written after every part.

    python tools/gpu.py
    python tools/gpu.py --r3gan ../R3GAN        # also measure R3GAN's own code, from a checkout
    python tools/gpu.py --dry-run               # run everything on the CPU at tiny sizes, to find mistakes
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.benchmarks_gpu.page import PartOutcome, Record, line, page
from tools.commands import ROOT

MARK = "@record "
PACKAGES = {
    "torch": "torch", "torchvision": "torchvision", "accelerate": "accelerate", "numpy": "numpy", "PIL": "pillow",
    "simplejpeg": "simplejpeg", "safetensors": "safetensors", "yaml": "pyyaml", "pydantic": "pydantic",
    "fsspec": "fsspec", "braceexpand": "braceexpand", "tensorboard": "tensorboard", "rich": "rich",
    "sklearn": "scikit-learn", "torchmetrics": "torchmetrics", "torch_fidelity": "torch-fidelity", "pytest": "pytest",
    "pytest_timeout": "pytest-timeout", "hypothesis": "hypothesis",
}  # fmt: skip
"""Modules that distgan, its tests and this tool import -> package to install."""


class Part(NamedTuple):
    """Part of the benchmark, which runs in its own process."""

    name: str
    limit: float
    """Time limit in seconds."""


PARTS = (
    Part("machine", 45), Part("tests", 170), Part("data", 60), Part("DCGAN-64", 70), Part("SNGAN-32", 70),
    Part("R3GAN-32", 90), Part("precision", 45), Part("checkpoint", 45), Part("R3GAN-code", 240),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU at tiny sizes")
    parser.add_argument("--r3gan", type=Path, metavar="PATH", help="checkout of github.com/brownvc/R3GAN to measure")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="page to write (default: docs/benchmarks-gpu.md; none with --dry-run or --only)",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit of all parts (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], default=[], metavar="PART",
                        help=f"parts to run: {', '.join(part.name for part in PARTS)} (default: all)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=6.0, help="measured time per loop (default: %(default)s)")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        for record in measured(options):
            print(MARK + json.dumps(record), flush=True)
        return
    deadline = time.monotonic() + 60 * options.minutes
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"missing packages: pip install {' '.join(missing)}; parts that need them will fail", flush=True)
    if options.r3gan is None:
        print("skipping R3GAN's own code: pass a checkout with --r3gan PATH", flush=True)
    whole = not (options.dry_run or options.only)
    out = options.out or (ROOT / "docs/benchmarks-gpu.md" if whole else None)
    records: list[Record] = []
    outcomes: list[PartOutcome] = []
    text = ""
    with tempfile.TemporaryDirectory(prefix="distgan-gpu-") as folder:
        for part in PARTS:
            if (options.only and part.name not in options.only) or (part.name == "R3GAN-code" and not options.r3gan):
                continue
            outcomes.append(run(part, options, Path(folder), deadline - time.monotonic(), records))
            print(f"== {part.name}: {outcomes[-1].verdict} ({outcomes[-1].seconds:.0f} s)", flush=True)
            if part.name == "machine" and not options.dry_run and no_gpu(records):
                raise SystemExit("no GPU: torch.cuda.is_available() is False; use --dry-run to test on the CPU")
            text = page(records, outcomes, shlex.join(["python", *sys.argv]), rehearsal=options.dry_run)
            if out is not None:
                out.write_text(text)
    print(f"\n{text}\n{f'written to {out}' if out else 'nothing was written'}", flush=True)
    raise SystemExit(any(outcome.verdict != "ok" for outcome in outcomes))


def no_gpu(records: list[Record]) -> bool:
    """Return True if the records describe the machine, and it has no GPU."""
    return any(record["kind"] == "machine" and record["card"] == "CPU" for record in records)


def run(part: Part, options: argparse.Namespace, folder: Path, left: float, records: list[Record]) -> PartOutcome:
    """Run a part in a new process, print and store its records as they come, and kill it at its time limit.

    Args:
        left: seconds left for all parts.
        records: list to append to.
    """
    limit = min(part.limit, left)
    if limit < 5:
        return PartOutcome(part.name, "not started: no time left", 0.0)
    print(f"== {part.name} (at most {limit:.0f} s)", flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    if options.dry_run:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DISTGAN_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    log = folder / "log"
    started = time.monotonic()
    with open(log, "wb") as errors:
        process = subprocess.Popen(
            command(part.name, options, folder), cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors,
            text=True, start_new_session=True,
        )  # fmt: skip
    printed: list[str] = []
    reader = threading.Thread(target=follow, args=(process, part.name, records, printed), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        verdict = "ok" if code == 0 else f"failed: {last_line(log, printed)}"
        if code:
            print("".join(f"   {text}\n" for text in log.read_text(errors="replace").splitlines()[-30:]), end="")
    except subprocess.TimeoutExpired:
        verdict = f"stopped at its limit of {limit:.0f} s"
    finally:
        kill_group(process)
    reader.join(10)
    records += of_output(part.name, printed)
    for record in records:
        record.setdefault("part", part.name)
    return PartOutcome(part.name, verdict, time.monotonic() - started)


def command(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a part."""
    if name == "tests":
        return [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if name == "checkpoint":
        sizes = ("8", "2", "0.05", "1") if options.dry_run else ("96", "4", "0.4", "1")
        flags = ("--width", "--checkpoints", "--seconds", "--rounds")
        pairs = [word for pair in zip(flags, sizes, strict=True) for word in pair]
        return [sys.executable, "tools/bench/checkpoint_stall.py", *pairs, "--folder", str(folder)]
    return [
        sys.executable, __file__, "--part", name, "--folder", str(folder), "--seconds", str(options.seconds),
        *(["--dry-run"] if options.dry_run else []),
        *(["--r3gan", str(options.r3gan.resolve())] if options.r3gan else []),
    ]  # fmt: skip


def follow(process: subprocess.Popen[str], part: str, records: list[Record], printed: list[str]) -> None:
    """Read the output of a part line by line. Append records to `records` and other lines to `printed`."""
    assert process.stdout is not None
    for text in process.stdout:
        if text.startswith(MARK):
            records.append(json.loads(text.removeprefix(MARK)) | {"part": part})
            print(f"   {line(records[-1])}", flush=True)
        else:
            printed.append(text)
            if part in ("tests", "checkpoint"):
                print(f"   {text}", end="", flush=True)


def of_output(part: str, printed: list[str]) -> list[Record]:
    """Parse the output of a part that is another tool into records."""
    if part == "checkpoint":
        return [{"kind": "page", "title": "A checkpoint's stall", "text": "".join(printed)}]
    if part != "tests":
        return []
    verdicts = dict(re.findall(r"^(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)", "".join(printed), re.MULTILINE))
    found = list(verdicts.values())
    failed = sorted(name for name, verdict in verdicts.items() if verdict in ("FAILED", "ERROR"))
    counts = {"passed": found.count("PASSED"), "skipped": found.count("SKIPPED")}
    return [{"kind": "tests", **counts, "failed": ", ".join(failed)}]


def last_line(log: Path, printed: list[str]) -> str:
    """Return the last line of a failed part's standard error, or else of its output."""
    lines = log.read_text(errors="replace").split("\n") + printed
    return next((text.strip()[:300] for text in reversed(lines) if text.strip()), "it printed nothing")


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a part and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measured(options: argparse.Namespace) -> Iterator[Record]:
    """Yield the records of one part, in its own process."""
    from tools.benchmarks_gpu import measures
    from tools.benchmarks_gpu.recipes import RECIPES, make_data

    rehearsal, data = options.dry_run, options.folder / "data"
    seconds = 0.0 if rehearsal else options.seconds

    def configured(name: str, run: str) -> tuple[Any, int]:
        """Return the config of a recipe, and the number of real images per interval."""
        config = RECIPES[name].config(data, options.folder / run, rehearsal=rehearsal)
        return config, config.monitoring.every * config.training.critic_steps * config.training.batch_size

    if options.part == "machine":
        yield from measures.machine(rehearsal=rehearsal)
    elif options.part == "data":
        yield from ({"kind": "text", "text": made} for made in make_data(data, rehearsal=rehearsal))
    elif options.part == "precision":
        yield from measures.precision(configured("R3GAN-32", "unused")[0], rehearsal=rehearsal)
    elif options.part == "R3GAN-code":
        config, images = configured("R3GAN-32", "unused")
        for record in measures.published(config, options.r3gan, seconds, images):
            yield record | {"recipe": "R3GAN-32"}
    else:
        config, images = configured(options.part, f"{options.part}-speed")
        yield {"kind": "recipe", "recipe": options.part, "text": RECIPES[options.part].source}
        profiled = measures.for_kernels(configured(options.part, f"{options.part}-kernels")[0])
        parts = (
            measures.training(config, seconds, images), measures.bare(config, seconds, images),
            measures.kernels(profiled),
        )  # fmt: skip
        for record in measures.each(parts):
            yield record | {"recipe": options.part}


if __name__ == "__main__":
    main()
