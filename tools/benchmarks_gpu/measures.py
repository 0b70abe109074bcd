"""Measurements of `tools/gpu.py`. Each public function yields its records as soon as they are measured."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tools.benchmarks_gpu.clock import device, forget, median_seconds, peak_gigabytes, synchronize

Record = dict[str, Any]
"""Result of one measurement. Its `kind` determines the other keys; see `page.py`."""
LEAST_INTERVALS = 3
KERNELS = 10
STEPS, PROFILED = 6, 3
"""Steps of a run for `kernels`, and the number of last steps that are profiled."""


def machine(*, rehearsal: bool) -> Iterator[Record]:
    """Measure the GPU's peak arithmetic with matrix products, and record its name and the software versions."""
    cuda = torch.cuda.is_available()
    yield {
        "kind": "machine",
        "card": torch.cuda.get_device_name() if cuda else "CPU",
        "gigabytes": torch.cuda.get_device_properties(0).total_memory / 1e9 if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
    }
    if not (cuda or rehearsal):
        return
    side = 128 if rehearsal else 8192
    for precision, dtype in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        _set_tf32(precision == "tf32")
        left, right = (torch.randn(side, side, device=device(), dtype=dtype) for _ in range(2))
        seconds = median_seconds(lambda left=left, right=right: left @ right)  # type: ignore[misc]
        yield {"kind": "peak", "precision": precision, "flops": 2 * side**3 / seconds, "side": side}


def training(config: Any, seconds: float, images: int) -> Iterator[Record]:
    """Measure `distgan train` with all features of a step.

    Args:
        seconds: measured time after the first interval.
        images: real images per interval.
    """
    from distgan.training.loop import train

    forget()
    run = Path(config.run_dir)
    over = threading.Event()
    threading.Thread(target=_stop_in_time, args=(run, seconds, over), daemon=True).start()
    try:
        train(config)
    finally:
        over.set()
    rows = _rows(run)
    waits = [row["speed/data_wait_seconds"] for row in rows[1:]]
    yield _speed("distgan", [row["time"] for row in rows], images) | {"data_wait": statistics.median(waits)}


def bare(config: Any, seconds: float, images: int) -> Iterator[Record]:
    """Measure a bare PyTorch loop with the same networks and data, and count the operations of one step."""
    from tools.bench.training import Bare
    from tools.benchmarks_gpu.flops import CountedFlops

    forget()
    loop = Bare(config)
    try:
        loop.step()
        with CountedFlops() as counted:
            loop.step()
        yield {"kind": "flops", "flops": counted.total, "step_images": images / config.monitoring.every}
        forget()
        yield _speed("bare PyTorch", _enough(loop.intervals(config.monitoring.every), seconds), images)
    finally:
        loop.close()


def for_kernels(config: Any) -> Any:
    """Return the config of a run of `STEPS` that writes no rows, samples or checkpoints."""
    training = config.training.model_copy(update={"steps": STEPS})
    monitoring = config.monitoring.model_copy(update={"every": STEPS + 1})
    return config.model_copy(update={"training": training, "monitoring": monitoring})


def kernels(config: Any) -> Iterator[Record]:
    """Profile the longest kernels in a `distgan train` run of `STEPS` steps; on the CPU, the longest operators."""
    from torch.profiler import ProfilerActivity, profile, schedule

    from distgan.training.loop import train
    from distgan.training.monitor import Monitor, StepReport

    cuda = torch.cuda.is_available()
    wait, active = STEPS - PROFILED, PROFILED
    found: list[Any] = []
    clock: list[float] = []
    original = Monitor.after_step

    def after_step(self: Any, **arguments: Any) -> StepReport:
        report: StepReport = original(self, **arguments)
        synchronize()
        clock.append(time.perf_counter())
        profiler.step()
        return report

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    profiler = profile(
        activities=activities, schedule=schedule(wait=wait, warmup=1, active=active, repeat=1),
        on_trace_ready=lambda ready: found.extend(ready.key_averages()),
    )  # fmt: skip
    with mock.patch.object(Monitor, "after_step", after_step), profiler:
        train(config)
    place = "CUDA" if cuda else "CPU"
    totals = [
        (event.key, (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in found
        if event.device_type.name == place and not event.is_user_annotation and "ProfilerStep" not in event.key
    ]
    totals.sort(key=lambda total: -total[1])
    busy = sum(seconds for _, seconds, _ in totals)
    yield {
        "kind": "kernels",
        "busy": busy / active,
        # The loop also calls after_step before the first step, so call k ends the profiler's step k.
        "step": (clock[wait + active] - clock[wait]) / active,
        "longest": [
            {"name": name, "seconds": seconds / active, "calls": count / active, "share": seconds / busy}
            for name, seconds, count in totals[:KERNELS]
        ],
    }


def published(config: Any, checkout: Path, seconds: float, images: int) -> Iterator[Record]:
    """Measure R3GAN's own networks and step on the same batch, in float32 and with its CIFAR-10 preset's bfloat16."""
    from tools.benchmarks_gpu import r3gan

    implementation = r3gan.load(checkout)
    for half in (False, True):
        forget()
        loop = r3gan.Published(config, half=half)
        try:
            by = f"R3GAN's code, {'bf16 from 8x8 on' if half else 'float32'}, {implementation}"
            yield _speed(by, _enough(loop.intervals(config.monitoring.every), seconds), images)
        finally:
            loop.close()


def each(parts: Iterable[Iterable[Record]]) -> Iterator[Record]:
    """Yield the records of several measurements. After one fails, continue with the next.

    Raises:
        RuntimeError: raised at the end if a measurement failed. Its traceback was printed.
    """
    errors: list[Exception] = []
    for part in parts:
        try:
            yield from part
        except Exception as error:  # continue with the other measurements
            traceback.print_exc()
            errors.append(error)
    if errors:
        raise RuntimeError(" ".join(f"{type(errors[0]).__name__}: {errors[0]}".split())[:300])


def precision(config: Any, *, rehearsal: bool) -> Iterator[Record]:
    """Measure a discriminator update with R1 and R2 in several precisions: time, memory and error of the gradient."""
    from distgan.networks import build_discriminator, build_generator
    from distgan.networks.layers.stage import set_float32_below
    from distgan.networks.shape import sample_shape
    from distgan.players.objective import DiscriminatorObjective
    from distgan.players.samples import MicroBatch
    from distgan.training.setup import uses_channels_last

    place, shape, count = device(), sample_shape(config.data), config.training.batch_size
    last = torch.channels_last if uses_channels_last(config, place) else torch.contiguous_format
    generator, discriminator = (
        build(section, shape).to(place).to(memory_format=last)
        for build, section in ((build_generator, config.generator), (build_discriminator, config.discriminator))
    )
    random = torch.Generator().manual_seed(0)
    for parameter in discriminator.parameters():  # zero weights make blocks the identity, which hides most gradients
        if not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=random))
    latents = torch.randn(count, config.generator.latent_size, generator=random).to(place)
    reals = (2 * torch.rand(count, *shape.sizes, generator=random) - 1).to(place).contiguous(memory_format=last)
    batch = MicroBatch(torch.arange(count, device=place), latents, None, reals, None)
    torch.backends.cudnn.benchmark = True
    reference: torch.Tensor | None = None
    for name, tf32, setting in (
        ("float32", False, "no"),
        ("TF32", True, "tf32"),
        ("bf16, penalties in float32", False, "bf16"),
        ("bf16 in penalties too, from 8x8 on", False, {"dtype": "bf16", "float32_below": 8}),
    ):
        _set_tf32(tf32)
        forget()
        values = config.model_dump()
        values["training"]["mixed_precision"] = setting
        chosen = type(config).model_validate(values)
        for network in (generator, discriminator):
            set_float32_below(network, "R3GAN", chosen.training.float32_below or 0)
        dtype = torch.bfloat16 if chosen.training.autocasts else None
        objective = DiscriminatorObjective(discriminator, generator, chosen, dtype)

        def update(objective: Any = objective) -> None:
            discriminator.zero_grad(set_to_none=True)
            objective(batch, 0, 0)[0].backward()

        seconds = median_seconds(update, warm_up=1 if rehearsal else 2, repeats=2 if rehearsal else 6)
        gradient = torch.cat([p.grad.double().flatten() for p in discriminator.parameters() if p.grad is not None])
        reference = gradient if reference is None else reference
        yield {
            "kind": "precision",
            "name": name,
            "seconds": seconds,
            "gigabytes": peak_gigabytes(),
            "error": float((gradient - reference).norm() / reference.norm()),
        }


def _set_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def _rows(run: Path) -> list[Record]:
    """Return the rows of metrics.jsonl that training wrote so far."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line is incomplete
            break
    return [row for row in rows if "loss/generator" in row]


def _is_enough(times: Sequence[float], seconds: float) -> bool:
    """Return True if the intervals after the first are numerous enough and last long enough together."""
    return len(times) >= LEAST_INTERVALS + 2 and times[-1] - times[1] >= seconds


def _enough(clock: Iterable[float], seconds: float) -> list[float]:
    times: list[float] = []
    for now in clock:
        times.append(now)
        if _is_enough(times, seconds):
            break
    return times


def _stop_in_time(run: Path, seconds: float, over: threading.Event) -> None:
    """Ask a run to stop after enough measured intervals."""
    from distgan.runs.stop_request import request_stop

    while not over.wait(0.2):
        if _is_enough([row["time"] for row in _rows(run)], seconds):
            request_stop(run)
            return


def _speed(by: str, times: Sequence[float], images: int) -> Record:
    """Return the record of the speed, given the times at the ends of the intervals. The first interval is a warm-up."""
    lengths = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    return {
        "kind": "speed",
        "by": by,
        "images_per_second": images / statistics.median(lengths),
        "gigabytes": peak_gigabytes(),
        "intervals": len(lengths),
    }
