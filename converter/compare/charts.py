"""Charts as SVG text: size against loss, and error by block. Pure.

Drawn here instead of by a plotting library: two kinds of chart need a few hundred lines, come out as a few kilobytes of
text that scales, follows the page's light or dark colours and can be reached by keyboard, and need nothing at run time.
The price is that labels are placed by a simple search. Every text that comes from outside goes through `escape`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from converter.compare.choice import Candidate, Measure
from converter.compare.wording import bytes_text, figure, one_line

FONT_SIZE = 12.0
CHARACTER_WIDTH = 0.57 * FONT_SIZE  # of sans-serif letters on average; labels are placed with it
COLOURS = 8
MOST_DECADES = 6
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STEPS = (0.1, 0.2, 0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 50)  # between ticks

# Contrast at least 3 to 1 on the page's ground, light and dark; shape and label say the same without colour.
LIGHT = ("#2563eb", "#c2410c", "#15803d", "#a21caf", "#0e7490", "#854d0e", "#475569", "#be185d")
DARK = ("#60a5fa", "#fb923c", "#4ade80", "#e879f9", "#22d3ee", "#facc15", "#94a3b8", "#f472b6")
MARK = 5.5  # half the width of a mark

TRIANGLE = "m0 -6.5l6.5 11.5h-13z"
SQUARE = "m-5 -5h10v10h-10z"
SHAPES: Mapping[str, str] = {  # of a mark, by format, drawn from its middle; other formats get a triangle
    "gguf": "m-5.5 0a5.5 5.5 0 1 0 11 0a5.5 5.5 0 1 0 -11 0z",
    **dict.fromkeys(("compressed-tensors", "gptq", "gptq_v2", "auto-round", "awq", "fp8"), SQUARE),
    "parquet": "m0 -6.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z",
}

Box = tuple[float, float, float, float]  # left, top, right, bottom
AROUND = (  # where a label may stand from its mark's middle, best first
    (11.0, 4.0, "start"),
    (-11.0, 4.0, "end"),
    (0.0, -11.0, "middle"),
    (0.0, 21.0, "middle"),
    (8.0, -9.0, "start"),
    (8.0, 18.0, "start"),
    (-8.0, -9.0, "end"),
    (-8.0, 18.0, "end"),
)


def colour_variables(colours: Sequence[str]) -> str:
    """The palette as CSS variables --c0 to --c7."""
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(colours))


CHART_STYLE = (
    "svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .soft{fill:var(--soft)}"
    "svg .title{font-size:15px;font-weight:600}"
    "svg .grid{stroke:var(--line);stroke-width:1}svg .halo{stroke:var(--ground);stroke-width:3;paint-order:stroke}"
    "svg .front{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4}"
    "svg .series{fill:none;stroke-width:2;stroke-linejoin:round}svg .mark{stroke-width:2}"
    "svg .off{fill:var(--ground)}"
    + "".join(
        f"svg .c{n}{{stroke:var(--c{n})}}svg .mark.c{n}:not(.off){{fill:var(--c{n})}}svg text.c{n}{{fill:var(--c{n});"
        f"stroke:none}}"
        for n in range(COLOURS)
    )
)


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The plot's box in a picture, and what its sides stand for; y is the base-10 logarithm of the value."""

    width: float
    height: float
    box: Box
    x_from: float
    x_to: float
    y_from: int
    y_to: int
    cut: bool  # whether something below the axis lies on its bottom line

    def x(self, value: float) -> float:
        left, _, right, _ = self.box
        return left + (right - left) * (value - self.x_from) / (self.x_to - self.x_from)

    def y(self, value: float) -> float:
        """The height of a value; one of zero, or below the axis, lies on the bottom line."""
        _, top, _, bottom = self.box
        exponent = max(self.y_from, math.log10(value)) if value > 0 else self.y_from
        return bottom - (bottom - top) * (exponent - self.y_from) / (self.y_to - self.y_from)


@dataclass(frozen=True, kw_only=True)
class Label:
    """Where a text stands: its base line, and which part of it is at x."""

    x: float
    y: float
    anchor: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """One artifact in the scatter: colour counts from 0; link is where a click leads, empty for nowhere."""

    candidate: Candidate
    colour: int
    on_front: bool
    link: str = ""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One target's error by block, block number -> error."""

    name: str
    colour: int
    errors: Mapping[int, float]


def scatter(
    points: Sequence[Point], measure: Measure, label: str, width: float = 440, height: float = 320, title: str = ""
) -> str:
    """An SVG of size against loss, the Pareto front as a dashed line; empty text when there is nothing to draw.

    label tells a screen reader what is seen; title stands above the chart when it is not empty.
    """
    if not points:
        return ""
    top = 62.0 if title else 34.0
    box = (46.0, top, width - 14, height - 64)
    bits = [point.candidate.bits_per_weight for point in points]
    margin = 0.08 * (max(bits) - min(bits)) or 0.5
    y_from, y_to = decades([point.candidate.loss for point in points])
    axes = Axes(
        width=width,
        height=height,
        box=box,
        x_from=max(0.0, min(bits) - margin),
        x_to=max(bits) + margin,
        y_from=y_from,
        y_to=y_to,
        cut=any(point.candidate.loss < 10.0**y_from for point in points),
    )
    bytes_per_bit = points[0].candidate.size_bytes / points[0].candidate.bits_per_weight
    places = [(axes.x(point.candidate.bits_per_weight), axes.y(point.candidate.loss)) for point in points]
    labels = place_labels([one_line(point.candidate.target, 24) for point in points], places, box)
    parts = [
        *([_text(14, 22, title, "title")] if title else []),
        *_level_lines(axes, f"{measure.name}, {measure.unit}"),
        *_size_ticks(axes, bytes_per_bit),
        _front_line([point.candidate for point in points if point.on_front], axes),
    ]
    parts += [_point(point, place, measure) for point, place in zip(points, places, strict=True)]
    parts += [
        _text(label.x, label.y, one_line(point.candidate.target, 24), "halo", label.anchor)
        for point, label in zip(points, labels, strict=True)
    ]
    parts += _legend(points, axes)
    return _picture(axes, label, parts)


def block_lines(series: Sequence[Series], label: str, width: float = 440, height: float = 320) -> str:
    """An SVG of each target's error by block, on a logarithmic axis; empty text when there is nothing to draw."""
    drawn = [line for line in series if line.errors]
    if not drawn:
        return ""
    names = [one_line(line.name, 16) for line in drawn]
    box = (46.0, 34.0, width - 18 - CHARACTER_WIDTH * max(map(len, names)), height - 64)
    blocks = sorted({block for line in drawn for block in line.errors})
    y_from, y_to = decades([error for line in drawn for error in line.errors.values()])
    first, last = blocks[0], blocks[-1]
    alone = 0.5 if first == last else 0.0
    axes = Axes(
        width=width,
        height=height,
        box=box,
        x_from=first - alone,
        x_to=last + alone,
        y_from=y_from,
        y_to=y_to,
        cut=any(error < 10.0**y_from for line in drawn for error in line.errors.values()),
    )
    parts = _level_lines(axes, "relative squared error of the block's output")
    step = next((step for step in (1, 2, 5, 10, 20, 50) if (last - first) / step <= 9), 100)
    for block in range(first, last + 1, step):
        parts.append(_text(axes.x(block), box[3] + 17, str(block), "soft", anchor="middle"))
    parts.append(_text((box[0] + box[2]) / 2, box[3] + 36, "block, first to last", "soft", anchor="middle"))
    ends = spread([axes.y(line.errors[max(line.errors)]) for line in drawn], FONT_SIZE + 2, box[1], box[3])
    for line, name, end in zip(drawn, names, ends, strict=True):
        corners = [(axes.x(block), axes.y(error)) for block, error in sorted(line.errors.items())]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        steps = ", ".join(f"{block}: {figure(error)}" for block, error in sorted(line.errors.items())[:12])
        parts.append(f'<g data-target="{escape(line.name)}"><title>{escape(f"{name} by block: {steps}")}</title>')
        parts.append(f'<polyline class="series c{line.colour % COLOURS}" points="{path}"/>')
        if len(blocks) <= 24:
            parts += [
                f'<circle class="mark c{line.colour % COLOURS}" cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in corners
            ]
        parts.append(f"{_text(box[2] + 8, end + 4, name, f'c{line.colour % COLOURS}')}</g>")
    return _picture(axes, label, parts)


def standalone(charts: Sequence[str], heights: Sequence[float], width: float, label: str) -> str:
    """SVG charts below each other as one picture that brings its own colours, for a page that knows none of ours."""
    dark = f"--ground:#0f1419;--ink:#e6e9ee;--soft:#9aa4b2;--line:#2b333d;{colour_variables(DARK)}"
    light = f"--ground:#ffffff;--ink:#1b1f24;--soft:#59636e;--line:#e3e6ea;{colour_variables(LIGHT)}"
    style = f"svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}{CHART_STYLE}"
    height = sum(heights)
    offsets = [sum(heights[:number]) for number in range(len(heights))]
    moved = [chart.replace("<svg ", f'<svg y="{offset:g}" ', 1) for chart, offset in zip(charts, offsets, strict=True)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"><style>{style}</style>'
        f'<rect width="100%" height="100%" rx="8" style="fill:var(--ground)"/>{"".join(moved)}</svg>\n'
    )


def decades(values: Sequence[float]) -> tuple[int, int]:
    """The powers of ten that a logarithmic axis begins and ends with.

    At most MOST_DECADES, so that one artifact without loss does not press the others together; what is smaller, zeros
    too, lies on the bottom line.
    """
    positive = [math.log10(value) for value in values if value > 0 and math.isfinite(value)]
    if not positive:
        return -1, 0
    high = math.ceil(max(positive))
    low = min(math.floor(min(positive)), high - 1)
    if any(value <= 0 for value in values):
        low -= 1  # so that zeros do not lie where something was lost
    return max(low, high - MOST_DECADES), high


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Heights near the wanted ones, in the same order, at least `gap` apart as far as top and bottom leave room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    found = list(wanted)
    gap = min(gap, (bottom - top) / max(1, len(wanted) - 1))
    for before, index in itertools.pairwise(order):
        found[index] = max(found[index], found[before] + gap)
    limit = bottom
    for index in reversed(order):
        found[index] = min(found[index], limit)
        limit = found[index] - gap
    return found


def place_labels(names: Sequence[str], places: Sequence[tuple[float, float]], box: Box) -> list[Label]:
    """Where the labels of these points stand: beside, above or below, wherever they cover least."""
    taken: list[Box] = [(x - MARK - 2, y - MARK - 2, x + MARK + 2, y + MARK + 2) for x, y in places]
    found = []
    for name, (x, y) in zip(names, places, strict=True):
        long = CHARACTER_WIDTH * len(name)
        choices = [Label(x=x + dx, y=y + dy, anchor=anchor) for dx, dy, anchor in AROUND]
        boxes = [_label_box(choice, long) for choice in choices]
        costs = [sum(_overlap(one, other) for other in taken) + 4 * _outside(one, box) for one in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        found.append(choices[best])
    return found


def _label_box(label: Label, long: float) -> Box:
    left = label.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[label.anchor] * long
    return left, label.y - FONT_SIZE, left + long, label.y + 3


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _outside(one: Box, box: Box) -> float:
    area = (one[2] - one[0]) * (one[3] - one[1])
    return area - _overlap(one, box)


def _level_lines(axes: Axes, name: str) -> list[str]:
    """A line for each power of ten, few enough to read, and the name of the axis above them."""
    left, top, right, _ = axes.box
    step = max(1, math.ceil((axes.y_to - axes.y_from) / 6))
    parts = [_text(left - 32, top - 14, name, "soft")]
    for exponent in range(axes.y_from, axes.y_to + 1, step):
        y = axes.y(10.0**exponent)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        below = "≤" if axes.cut and exponent == axes.y_from else ""
        parts.append(_text(left - 7, y + 4, below + power_of_ten(exponent), "soft", anchor="end"))
    return parts


def power_of_ten(exponent: int) -> str:
    """0.1, 1 and 10 as numbers, the others as powers."""
    return f"{10.0**exponent:g}" if -2 <= exponent <= 2 else f"10{str(exponent).translate(SUPERSCRIPTS)}"


def _size_ticks(axes: Axes, bytes_per_bit: float) -> list[str]:
    """Ticks in bits per weight, and under each the size of the files that this comes to."""
    _, top, _, bottom = axes.box
    step = next((step for step in STEPS if (axes.x_to - axes.x_from) / step <= 6), 100)
    parts = []
    for count in range(math.ceil(axes.x_from / step), math.floor(axes.x_to / step) + 1):
        value = count * step
        x = axes.x(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(_text(x, bottom + 17, f"{value:g} bits", "soft", anchor="middle"))
        parts.append(_text(x, bottom + 32, bytes_text(value * bytes_per_bit), "soft", anchor="middle"))
    return parts


def _front_line(found: Sequence[Candidate], axes: Axes) -> str:
    """The steps of what can be had: at each size the least loss among artifacts up to that size."""
    ordered = sorted(found, key=lambda candidate: candidate.bits_per_weight)
    if not ordered:
        return ""
    path = f"M{axes.x(ordered[0].bits_per_weight):.1f} {axes.box[1]:.1f}"
    for candidate in ordered:
        path += f"H{axes.x(candidate.bits_per_weight):.1f}V{axes.y(candidate.loss):.1f}"
    return f'<path class="front" d="{path}H{axes.box[2]:.1f}"/>'


def _mark(format: str, x: float, y: float, classes: str) -> str:
    return f'<path class="{classes}" d="M{x:.1f} {y:.1f}{SHAPES.get(format, TRIANGLE)}"/>'


def _point(point: Point, place: tuple[float, float], measure: Measure) -> str:
    one = point.candidate
    said = (
        f"{one_line(one.target)}: {figure(one.bits_per_weight)} bits per weight, {bytes_text(one.size_bytes)}, "
        f"{measure.short} {figure(one.loss)} {measure.unit}{', on the front' if point.on_front else ''}"
    )
    classes = f"mark c{point.colour % COLOURS}{'' if point.on_front else ' off'}"
    inside = f"<title>{escape(said)}</title>{_mark(one.format, *place, classes)}"
    if not point.link:
        return f"<g>{inside}</g>"
    target = f'data-target="{escape(one.target)}" aria-label="{escape(said)}"'
    return f'<a href="{escape(point.link)}" {target}>{inside}</a>'


def _legend(points: Sequence[Point], axes: Axes) -> list[str]:
    """What the shapes, full and hollow marks, and the dashed line mean."""
    x, y = axes.box[0] - 32, axes.height - 10
    parts = []
    for format in dict.fromkeys(point.candidate.format for point in points):
        parts.append(_mark(format, x + 6, y - 4, "mark off c6"))
        parts.append(_text(x + 17, y, one_line(format, 24), "soft"))
        x += 17 + CHARACTER_WIDTH * len(format) + 12
    parts.append(f'<path class="front" d="M{x:.1f} {y - 4:.1f}h22"/>')
    parts.append(_text(x + 28, y, "best for its size", "soft"))
    return parts


def _text(x: float, y: float, text: str, classes: str, anchor: str = "start") -> str:
    return f'<text class="{classes}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _picture(axes: Axes, label: str, parts: Sequence[str]) -> str:
    size = f'width="{axes.width:g}" height="{axes.height:g}" viewBox="0 0 {axes.width:g} {axes.height:g}"'
    return f'<svg {size} role="group" aria-label="{escape(label)}">{"".join(parts)}</svg>'
