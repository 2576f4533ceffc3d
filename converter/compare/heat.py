"""Heat maps as SVG text: a figure of every linear in every block, so that a glance finds what is fragile. Pure.

Lines of one target each, as in the chart of blocks, would be hundreds; a table has the figures and shows no pattern. A
cell is a colour whose strength is the logarithm of its value, and says the value to who points at it. Experts of a
mixture share a row, in which the worst of them stands: a block has hundreds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from converter.compare.charts import CHARACTER_WIDTH, decades, power_of_ten
from converter.compare.wording import figure, one_line

WIDTH = 440.0
ROW = 16.0  # the height of a row
WIDEST_CELL = 26.0
FAINTEST = 0.06  # the strength of the least value, so that it differs from a cell without one
LEGEND_STEPS = 24
EXPERT = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values by row and block: cells[row, block]; rows in the order that they are drawn."""

    rows: tuple[str, ...]
    blocks: tuple[int, ...]
    cells: Mapping[tuple[str, int], float]


def grid_of(tensors: Sequence[Mapping[str, Any]], key: str) -> Grid:
    """The values under `key` of tensors inside blocks: rows of tensors.parquet, of one target."""
    cells: dict[tuple[str, int], float] = {}
    for tensor in tensors:
        value, block = tensor.get(key), tensor["block"]
        if value is None or block is None or not math.isfinite(value):
            continue
        place = local_name(tensor["name"]), block
        cells[place] = max(value, cells.get(place, 0.0))
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    return Grid(rows=rows, blocks=tuple(sorted({block for _, block in cells})), cells=cells)


def local_name(tensor: str) -> str:
    """A linear's name inside its block, "mlp.up_proj", with "*" in place of an expert's number."""
    local = re.sub(r"^.*?\.\d+\.", "", tensor).removesuffix(".weight")
    return EXPERT.sub(".*", local)


def merged(grid: Grid) -> Grid:
    """The grid with rows that are the same everywhere as one: linears that read one hidden state share its figures."""
    alike: dict[tuple[float | None, ...], list[str]] = {}
    for row in grid.rows:
        alike.setdefault(tuple(grid.cells.get((row, block)) for block in grid.blocks), []).append(row)
    cells = {
        (", ".join(rows), block): value
        for values, rows in alike.items()
        for block, value in zip(grid.blocks, values, strict=True)
        if value is not None
    }
    return Grid(rows=tuple(", ".join(rows) for rows in alike.values()), blocks=grid.blocks, cells=cells)


def heat_map(grid: Grid, label: str, *, ends: tuple[int, int] | None = None) -> str:
    """An SVG of the grid; empty text when there is nothing in it.

    label tells a screen reader what is seen. ends: the powers of ten of the faintest and of the strongest colour, where
    several maps share them.
    """
    if not grid.cells:
        return ""
    names = [_short(row) for row in grid.rows]
    left = 12 + CHARACTER_WIDTH * max(map(len, names))
    cell = min(WIDEST_CELL, (WIDTH - left - 6) / len(grid.blocks))
    low, high = ends or decades(list(grid.cells.values()))
    bottom = 8 + ROW * len(grid.rows)
    parts = []
    for number, (row, name) in enumerate(zip(grid.rows, names, strict=True)):
        top = 8 + ROW * number
        parts.append(
            f'<text class="soft" x="{left - 6:.1f}" y="{top + 12:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for column, block in enumerate(grid.blocks):
            value = grid.cells.get((row, block))
            if value is not None:
                said = escape(f"block {block} {one_line(row, 60)}: {figure(value)}")
                place = f'x="{left + cell * column:.1f}" y="{top:.1f}" width="{cell:.2f}" height="{ROW:g}"'
                parts.append(
                    f'<rect class="heat" {place} fill-opacity="{_strength(value, low, high):.2f}">'
                    f"<title>{said}</title></rect>"
                )
    step = next((step for step in (1, 2, 5, 10, 20, 50) if step * cell >= 22), 100)
    for column, block in enumerate(grid.blocks):
        if block % step == 0:
            x = left + cell * (column + 0.5)
            parts.append(f'<text class="soft" x="{x:.1f}" y="{bottom + 15:.1f}" text-anchor="middle">{block}</text>')
    parts += _legend(left, bottom + 26, low, high)
    height = bottom + 48
    size = f'width="{WIDTH:g}" height="{height:g}" viewBox="0 0 {WIDTH:g} {height:g}"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _strength(value: float, low: int, high: int) -> float:
    """How opaque a cell is, FAINTEST to 1, by the logarithm of its value."""
    share = (math.log10(value) - low) / (high - low) if value > 0 else 0.0
    return FAINTEST + (1 - FAINTEST) * min(1.0, max(0.0, share))


def _legend(left: float, top: float, low: int, high: int) -> list[str]:
    """A strip from the faintest to the strongest colour between the values that they stand for."""
    first, last = power_of_ten(low), power_of_ten(high)
    parts = [f'<text class="soft" x="{left:.1f}" y="{top + 10:.1f}">≤{first}</text>']
    start = left + CHARACTER_WIDTH * (len(first) + 2)
    for step in range(LEGEND_STEPS):
        opacity = FAINTEST + (1 - FAINTEST) * (step + 0.5) / LEGEND_STEPS
        place = f'x="{start + 5 * step:.1f}" y="{top:.1f}" width="5" height="11"'
        parts.append(f'<rect class="heat" {place} fill-opacity="{opacity:.2f}"/>')
    end = start + 5 * LEGEND_STEPS + 6
    parts.append(f'<text class="soft" x="{end:.1f}" y="{top + 10:.1f}">≥{last}</text>')
    return parts


def _short(row: str) -> str:
    """A row's name, or the last parts of the names that it stands for, at most 26 characters of it."""
    names = row.split(", ")
    return one_line(row if len(names) == 1 else ", ".join(name.rpartition(".")[2] for name in names), 26)
