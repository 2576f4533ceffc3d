"""A weight that a checkpoint holds in parts: codes, scales and whatever else its format keeps beside them."""

# O out, I in (columns), N rows of a slab, R rows of scales, Q scales in a row

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from converter.errors import SourceError

if TYPE_CHECKING:
    from converter.source import Header

# The bytes of tensors, in order: what little of the weights planning has to look at.
ReadBytes = Callable[[Sequence["Header"]], list[bytes]]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """How to get a weight from its parts; plain data.

    format: its key in FORMATS. shape: the weight's. parts: by role, such as "codes" and "scale"; where the codes lie
    row by row, their header's leading dimensions count the rows of the weight. bits: of a code. block: how many rows
    and columns share a scale. offset: what is added to stored zero points (GPTQ's first layout keeps one less).
    """

    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, Header]
    bits: int = 8
    block: tuple[int, int] = (1, 1)
    offset: int = 0

    @property
    def size_bytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.end - part.start for part in self.parts.values())

    @property
    def files(self) -> frozenset[str]:
        """The files that hold the parts."""
        return frozenset(part.file for part in self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Format:
    """How parts become values.

    values(packed, parts, first, count, where) gives rows [first, first + count) of the weight, f32 [count, I]; parts
    are tensors by role, each whole but for the codes of a format that is `by_row`, of which there are just these rows.
    coded gives the same rows with codes and scales apart, where values are evenly spaced. Raises SourceError for parts
    that contradict each other.
    """

    title: str
    by_row: bool
    values: Callable[[Packed, Mapping[str, Tensor], int, int, str], Tensor]
    coded: Callable[[Packed, Mapping[str, Tensor], int, int, str], Coded] | None = None


def evenly(title: str, by_row: bool, coded: Callable[[Packed, Mapping[str, Tensor], int, int, str], Coded]) -> Format:
    """The format whose values are what its codes and scales say."""

    def values(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Tensor:
        return coded(packed, parts, first, count, where).values()

    return Format(title=title, by_row=by_row, values=values, coded=coded)


def mismatch(where: str, name: str, what: str) -> SourceError:
    """The error for a weight whose parts do not go together."""
    remedy = "config.json and weights are of different models or the export is broken: fetch both again"
    return SourceError(where, f"the parts of {name} do not go together: {what}", remedy)


def part_of(packed: Packed, index: int, count: int, where: str) -> Packed:
    """Slice `index` of `count` equal ones along the rows of all leading dimensions: [rows / count, I].

    An expert of a fused tensor, or half of one. The parts are ranges of the parts' bytes; what the whole weight shares,
    such as one scale for all of it, is shared by the slices. Raises SourceError where a scale or the codes of a row
    belong to two slices.
    """
    rows, columns = math.prod(packed.shape[:-1]), packed.shape[-1]
    parts: dict[str, Header] = {}
    for role, part in packed.parts.items():
        own = math.prod(part.shape[:-1])
        if math.prod(part.shape) == 1:
            parts[role] = part
        elif own % count == 0:
            parts[role] = _rows(part, index * (own // count), own // count)
        elif role == "scale" and count % own == 0:
            parts[role] = _rows(part, index // (count // own), 1)
        else:
            what = f"{own} rows of {part.name} cannot be split into {count}"
            raise mismatch(where, packed.parts["codes"].name, what)
    height, step = rows // count, packed.block[0]
    if rows % count or (height % step and step % height):
        what = f"{count} slices of {rows} rows cut through blocks of {step} rows with one scale"
        raise mismatch(where, packed.parts["codes"].name, what)
    return replace(packed, shape=(height, columns), parts=parts, block=(min(step, height), packed.block[1]))


def _rows(part: Header, first: int, count: int) -> Header:
    row_bytes = (part.end - part.start) // math.prod(part.shape[:-1])
    start = part.start + first * row_bytes
    return replace(part, shape=(count, part.shape[-1]), start=start, end=start + count * row_bytes)


def scale_rows(packed: Packed, scale_RQ: Tensor, first: int, count: int) -> Tensor:
    """The rows of scales, or of zero points, that rows [first, first + count) of the weight use: [count, Q].

    Every matrix of a stack [..., O, I] has scales of its own, the last of them for what is left of its rows.
    """
    outs = packed.shape[-2] if len(packed.shape) > 1 else 1
    of_matrix = -(-outs // packed.block[0])
    if packed.block[0] == 1:
        return scale_RQ[first : first + count]
    row = torch.arange(first, first + count)
    return scale_RQ[row // outs * of_matrix + row % outs // packed.block[0]]


@dataclass(frozen=True, kw_only=True)
class Coded:
    """Rows of a weight as evenly spaced values: (code - zero) * scale.

    codes [N, I] int8 or uint8; scale, and zero where there is one, f32 [N, Q], for each run of so many columns.
    group_I, int64, says instead which of the Q each column has.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    columns: int
    group_I: Tensor | None = None

    def values(self) -> Tensor:
        """The values, f32 [N, I]."""
        return dequantize(self.codes.float(), self.scale, self.zero, self.columns, self.group_I)


def dequantize(
    values_NI: Tensor, scale_NQ: Tensor, zero_NQ: Tensor | None, columns: int, group_I: Tensor | None = None
) -> Tensor:
    """(values - zero) * scale, in place; values f32, and scale and zero f32 for each run of so many columns.

    group_I, int64, says instead which scale each column has.
    """
    width = values_NI.shape[1]
    if group_I is None and width % columns:
        group_I = torch.arange(width) // columns
    if group_I is not None:
        if zero_NQ is not None:
            values_NI -= zero_NQ[:, group_I]
        values_NI *= scale_NQ[:, group_I]
        return values_NI
    grouped = values_NI.view(len(values_NI), -1, columns)
    if zero_NQ is not None:
        grouped -= zero_NQ[:, :, None]
    grouped *= scale_NQ[:, :, None]
    return values_NI
