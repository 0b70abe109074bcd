"""Draw line charts as PNGs with Pillow, for the figures in docs/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
"""Tol's bright color scheme, which is safe for color-blind readers."""
WIDTH, HEIGHT = 460, 330
"""Pixels of one chart."""
_FINER = 3  # charts are drawn larger by this factor and scaled down, which smooths the lines
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 34, 46
_INK, _GREY = "#222222", "#dddddd"

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """Points joined by straight lines. `color` is an index of COLOURS."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: int
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One pair of axes with curves. Parts of a curve outside `y_range` are cut off."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    y_range: tuple[float, float]
    logarithmic: bool = False
    """True for a logarithmic y axis."""


def draw(charts: Sequence[Chart], path: Path, *, columns: int) -> None:
    """Draw charts in rows of `columns`, and save them as one PNG. Creates the folder of `path` if needed."""
    rows = -(-len(charts) // columns)
    sheet = Image.new("RGB", (columns * WIDTH * _FINER, rows * HEIGHT * _FINER), "white")
    for number, chart in enumerate(charts):
        corner = (number % columns * WIDTH * _FINER, number // columns * HEIGHT * _FINER)
        sheet.paste(_picture(chart), corner)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((columns * WIDTH, rows * HEIGHT), Image.Resampling.LANCZOS).save(path, optimize=True)


def _picture(chart: Chart) -> Image.Image:
    image = Image.new("RGB", (WIDTH * _FINER, HEIGHT * _FINER), "white")
    canvas = ImageDraw.Draw(image)
    low, high = (min(min(curve.x) for curve in chart.curves), max(max(curve.x) for curve in chart.curves))
    bottom, top = (_scale(chart, y) for y in chart.y_range)

    def place(x: float, y: float) -> Point:
        """Convert a point to pixels. `y` is a logarithm on a logarithmic axis."""
        right = (x - low) / (high - low) * (WIDTH - _LEFT - _RIGHT) + _LEFT
        down = (top - y) / (top - bottom) * (HEIGHT - _TOP - _BOTTOM) + _TOP
        return right * _FINER, down * _FINER

    rows, columns = _ticks(bottom, top, chart.logarithmic), _ticks(low, high, False)
    for line in [
        *((place(low, y), place(high, y)) for y, _ in rows),
        *((place(x, bottom), place(x, top)) for x, _ in columns),
    ]:
        canvas.line(line, fill=_GREY, width=_FINER)
    for curve in chart.curves:
        _trace(canvas, [place(x, _scale(chart, y)) for x, y in zip(curve.x, curve.y, strict=True)], curve)
    (left, upper), (right, lower) = place(low, top), place(high, bottom)
    for outside in ((0, 0, image.width, upper), (0, lower, image.width, image.height)):
        canvas.rectangle(outside, fill="white")
    canvas.rectangle((left, upper, right, lower), outline=_INK, width=_FINER)
    for y, text in rows:
        _write(canvas, place(low, y), text, "rm", shift=(-6, 0))
    for x, text in columns:
        _write(canvas, place(x, bottom), text, "mt", shift=(0, 6))
    _write(canvas, ((left + right) / 2, upper), chart.title, "mb", shift=(0, -8), size=14)
    _write(canvas, ((left + right) / 2, lower), chart.x_label, "mt", shift=(0, 24))
    _legend(canvas, chart, (right, upper))
    return image


def _trace(canvas: ImageDraw.ImageDraw, points: Sequence[Point], curve: Curve) -> None:
    color = COLOURS[curve.color]
    if not curve.dashed:
        canvas.line(list(points), fill=color, width=2 * _FINER, joint="curve")
        return
    dash, gap, walked = 7.0 * _FINER, 5.0 * _FINER, 0.0
    for start, end in pairwise(points):
        length = math.dist(start, end)
        done = 0.0
        while done < length:
            phase = walked % (dash + gap)
            piece = min((dash if phase < dash else dash + gap) - phase + 1e-6, length - done)
            if phase < dash:
                ends = [_between(start, end, share / length) for share in (done, done + piece)]
                canvas.line(ends, fill=color, width=2 * _FINER)
            done, walked = done + piece, walked + piece


def _between(start: Point, end: Point, share: float) -> Point:
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


def _legend(canvas: ImageDraw.ImageDraw, chart: Chart, corner: Point) -> None:
    """Draw the legend in the upper right corner, over the curves."""
    labeled = [curve for curve in chart.curves if curve.label]
    if not labeled:
        return
    width = max(canvas.textlength(curve.label, font=_font(11)) for curve in labeled) + 44 * _FINER
    left, upper = corner[0] - width - 6 * _FINER, corner[1] + 6 * _FINER
    canvas.rectangle((left, upper, left + width, upper + (16 * len(labeled) + 6) * _FINER), fill="white", outline=_GREY)
    for number, curve in enumerate(labeled):
        middle = upper + (16 * number + 11) * _FINER
        _trace(canvas, [(left + 8 * _FINER, middle), (left + 30 * _FINER, middle)], curve)
        _write(canvas, (left, middle), curve.label, "lm", shift=(36, 0))


def _write(
    canvas: ImageDraw.ImageDraw, where: Point, text: str, anchor: str, *, shift: tuple[int, int], size: int = 11
) -> None:
    shifted = (where[0] + shift[0] * _FINER, where[1] + shift[1] * _FINER)
    canvas.text(shifted, text, fill=_INK, font=_font(size), anchor=anchor)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size * _FINER)


def _scale(chart: Chart, y: float) -> float:
    return math.log10(max(y, 1e-30)) if chart.logarithmic else y


def _ticks(low: float, high: float, logarithmic: bool) -> list[tuple[float, str]]:
    """Return positions and labels of about five ticks: round numbers, or powers of ten on a logarithmic axis."""
    step: float
    if logarithmic:
        step = max(1, math.ceil((high - low) / 6))
    else:
        magnitude = 10.0 ** math.floor(math.log10((high - low) / 5))
        step = next(factor * magnitude for factor in (1, 2, 5, 10) if (high - low) / (factor * magnitude) <= 6)
    ticks = [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(tick, f"1e{tick:.0f}" if logarithmic else f"{tick:.6g}") for tick in ticks]
