"""Figures and names as people read them, the same in the report and in the model card. Pure.

A figure keeps three significant digits: more would claim what a few thousand tokens cannot show. What was not measured,
or is not finite, is a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

MISSING = "–"


def figure(value: float | None) -> str:
    """A number to three significant digits: 3,806 · 5.51 · 0.00119 · 2.34e-5."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    if abs(value) < 0.0001:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    rounded = float(f"{value:.2e}")  # first: 0.9996 has one digit fewer behind the point once it is 1.00
    digits = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:.{digits}f}"


def cosine(value: float | None) -> str:
    """A cosine to five decimals; only an exact one is written as 1."""
    if value is None or not math.isfinite(value):
        return MISSING
    return "1" if value == 1.0 else f"{math.floor(value * 1e5) / 1e5:.5f}"  # rounding up would claim exactness


def share(value: float | None) -> str:
    """A share of one as a percentage with one decimal: 98.7 %."""
    return MISSING if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def change(value: float | None) -> str:
    """A relative change as a signed percentage: +0.43 %."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{100 * value:+.2f} %" if abs(value) < 0.1 else f"{100 * value:+,.0f} %"


def ratio(value: float | None) -> str:
    """A factor with two decimals: 2.91×."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.2f}×"


def duration(seconds: float | None) -> str:
    """A time span: 0.91 s · 31.9 s · 12 min 5 s · 3 h 20 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 99.95:
        return f"{figure(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def bytes_text(count: float | None) -> str:
    """A number of bytes in decimal units, as hubs show them: 2.89 MB."""
    if count is None:
        return MISSING
    units = ("B", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 999.5 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{figure(count)} {units[power]}"


def one_line(text: object, limit: int = 200) -> str:
    """The text on one line without control and direction marks, shortened: safe to show, and to quote in YAML."""
    shown = " ".join("".join(mark if mark.isprintable() else " " for mark in str(text)).split())
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def text_name(text: str, part: str) -> str:
    """What a manifest's `text` names, without the folders of the machine it lay on."""
    if text == "builtin":
        return f"the built-in {part} text"
    kind, _, rest = text.partition(":")
    return f"the file {PurePosixPath(rest).name}" if kind == "file" else f"the data set {rest}"


def rows_of(settings: Mapping[str, Any] | None, part: str) -> str:
    """Which token rows a manifest's calibration or evaluation asks for, as a phrase."""
    if not settings:
        return MISSING
    name = text_name(settings["text"], part)
    return f"{settings['sequences']:,} rows of {settings['length']:,} tokens from {name}"


def group_notes(notes: Mapping[str, str]) -> dict[str, list[str]]:
    """The tensors by what was not as asked, most frequent first."""
    grouped: dict[str, list[str]] = {}
    for name, text in notes.items():
        grouped.setdefault(text, []).append(name)
    return dict(sorted(grouped.items(), key=lambda item: -len(item[1])))
