"""Format records of `measures.py`: one line each as they come, and a Markdown page at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]


class PartOutcome(NamedTuple):
    """How a part of the benchmark ended."""

    part: str
    verdict: str
    """`ok`, or what went wrong, in one line."""
    seconds: float


def line(record: Record) -> str:
    """Format one record as a line of progress output."""
    match record["kind"]:
        case "machine":
            return f"{_card(record)}, torch {record['torch']}, CUDA {record['cuda']}"
        case "peak":
            return f"{record['precision']} product of {record['side']}^3: {record['flops'] / 1e12:,.1f} TFLOP/s"
        case "speed":
            return f"{record['by']}: {record['images_per_second']:,.1f} img/s {_gigabytes(record)}".strip()
        case "flops":
            return f"a step is {record['flops'] / 1e9:,.2f} GFLOP"
        case "kernels":
            return f"device busy {record['busy'] * 1e3:,.2f} ms of {record['step'] * 1e3:,.2f} ms per step"
        case "precision":
            return f"{record['name']}: {record['seconds'] * 1e3:,.2f} ms, gradient off by {record['error']:.1e}"
        case "tests":
            return f"{record['passed']} passed, {record['skipped']} skipped, failed: {record['failed'] or 'none'}"
        case _:
            return str(record["text"])


def page(records: Sequence[Record], outcomes: Sequence[PartOutcome], command: str, *, rehearsal: bool) -> str:
    """Return the Markdown page of all records. Parts that failed have no row, but the last table lists them."""
    machine = next((record for record in records if record["kind"] == "machine"), {})
    lines = [f"# Benchmarks on a GPU: {_card(machine) if machine else 'unknown card'}", ""]
    if rehearsal:
        lines += ["**Dry run on the CPU at tiny sizes: the numbers mean nothing.**", ""]
    lines += [
        f"Command: `{command}`. Versions: torch {machine.get('torch')}, CUDA {machine.get('cuda')}, cuDNN "
        f"{machine.get('cudnn')}, NCCL {machine.get('nccl')}. Speeds are those of one process: medians over intervals "
        "after a warm-up.",
        "",
    ]
    for section in (_tests, _speeds, _peaks, _precisions, _kernels, _texts):
        lines += section(records)
    lines += ["## Parts", "", *_table(["part", "outcome", "seconds"], ([*o[:2], f"{o.seconds:.0f}"] for o in outcomes))]
    return "\n".join(lines) + "\n"


def _tests(records: Sequence[Record]) -> list[str]:
    found = [line(record) for record in records if record["kind"] == "tests"]
    return ["## tests/gpu", "", *found, ""] if found else []


def _speeds(records: Sequence[Record]) -> list[str]:
    """Compare speeds with the bare loop of the same recipe, and give the fraction of the measured float32 peak."""
    peak = next((r["flops"] for r in records if r["kind"] == "peak" and r["precision"] == "float32"), None)
    operations = {r["part"]: r["flops"] / r["step_images"] for r in records if r["kind"] == "flops"}
    bare = {r["recipe"]: r["images_per_second"] for r in records if r["kind"] == "speed" and r["by"] == "bare PyTorch"}
    found = [record for record in records if record["kind"] == "speed"]
    order = list(dict.fromkeys(record["recipe"] for record in found))
    rows = []
    for record in sorted(found, key=lambda record: order.index(record["recipe"])):
        speed, recipe = record["images_per_second"], record["recipe"]
        flops = speed * operations.get(recipe, 0)
        share = f"{flops / peak:.1%}" if peak and flops else ""
        rows.append([
            recipe, record["by"], f"{speed:,.0f}", f"{speed / bare[recipe]:.3f}" if recipe in bare else "",
            _gigabytes(record), f"{flops / 1e12:,.2f}" if flops else "", share,
            f"{1e3 * record['data_wait']:.2f}" if "data_wait" in record else "",
        ])  # fmt: skip
    head = ["recipe", "by", "img/s", "of bare", "peak memory", "TFLOP/s", "of float32 peak", "data wait, ms per step"]
    described = [f"- {r['recipe']}: {r['text']}" for r in records if r["kind"] == "recipe"]
    return ["## Recipes", "", *_table(head, rows), "", *described, ""] if rows else []


def _peaks(records: Sequence[Record]) -> list[str]:
    rows = [[r["precision"], r["side"], f"{r['flops'] / 1e12:,.1f}"] for r in records if r["kind"] == "peak"]
    head = ["precision", "side of the square matrices", "TFLOP/s"]
    return ["## Peak arithmetic, measured", "", *_table(head, rows), ""] if rows else []


def _precisions(records: Sequence[Record]) -> list[str]:
    found = [record for record in records if record["kind"] == "precision"]
    rows = [
        [r["name"], f"{1e3 * r['seconds']:,.1f}", f"{found[0]['seconds'] / r['seconds']:.2f}", _gigabytes(r),
         f"{r['error']:.1e}"]
        for r in found
    ]  # fmt: skip
    head = ["R3GAN-32, discriminator", "ms", "speedup over float32", "peak memory", "relative error of the gradient"]
    return ["## A discriminator update with R1 and R2", "", *_table(head, rows), ""] if rows else []


def _kernels(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in (record for record in records if record["kind"] == "kernels"):
        rows = [
            [f"`{each['name'][:90]}`", f"{1e3 * each['seconds']:,.3f}", f"{each['calls']:,.0f}", f"{each['share']:.1%}"]
            for each in record["longest"]
        ]
        lines += [f"## Longest kernels: {record['part']}", "", f"Under the profiler: {line(record)}.", ""]
        lines += [*_table(["kernel", "ms per step", "calls per step", "share"], rows), ""]
    return lines


def _texts(records: Sequence[Record]) -> list[str]:
    lines = []
    for record in (record for record in records if record["kind"] == "page"):
        lines += [f"## {record['title']}", "", record["text"].strip(), ""]
    return lines


def _table(head: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{' --- |' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in row)} |"


def _card(machine: Record) -> str:
    return machine["card"] if machine["gigabytes"] is None else f"{machine['card']}, {machine['gigabytes']:.0f} GB"


def _gigabytes(record: Record) -> str:
    return "" if record["gigabytes"] is None else f"{record['gigabytes']:.2f} GB"
