"""AWQ's layout ("gemm"): asymmetric codes of 4 bits, row by row of the transposed weight, eight outputs in a word.

    qweight  i32 [I, O / 8], nibble k of a word holds output [0, 2, 4, 6, 1, 3, 5, 7][k] of its eight
    qzeros   i32 [G, O / 8], zero points in the same order
    scales   f16 [G, O]

Codes and zero points are unsigned. The layout says nothing about how codes were found; any method may fill it.
Source: AutoAWQ 0.2.9 (modules/linear/gemm.py).
"""

# O out, I in (columns), G groups

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, TensorPlan
from converter.containers.packing import pack_words
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import SafetensorsModel, kept_linears, module_of, where_of
from converter.containers.selection import Choice
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.source import Header, Snapshot

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that each nibble of a word holds, lowest first
BITS = 4


class AWQ(SafetensorsModel):
    """The container of `format: awq`."""

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        plain, (out, columns), size = PlainGrid(dtype=dtype), header.shape, choice.target.group_size
        if choice.target.symmetric or choice.target.granularity != "group":
            what = "the layout of AWQ has a zero point for each group"
            raise UnsupportedError(where_of(choice.target), what, "Remove symmetric and granularity")
        if out % len(ORDER) or columns % (size or 1):
            return plain, f"kept: {out} outputs do not fill words of 8, or {columns} columns groups of {size}"
        return choice.grid(group_size=size, scale_dtype="F16"), ""

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        (out, columns), module = tensor.shape, module_of(tensor)
        assert isinstance(tensor.grid, AffineGrid)
        groups = columns // tensor.grid.columns_per_scale(columns)
        return (
            Entry(name=f"{module}.qweight", dtype="I32", shape=(columns, out // len(ORDER))),
            Entry(name=f"{module}.qzeros", dtype="I32", shape=(groups, out // len(ORDER))),
            Entry(name=f"{module}.scales", dtype="F16", shape=(groups, out)),
        )

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [_interleaved(parts["codes"]), _interleaved(parts["zero_point"]), parts["scale"].T]

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": target.with_defaults().group_size,
            "zero_point": True,
            "modules_to_not_convert": kept_linears(plan, snapshot, architecture) or None,
        }


def _interleaved(codes_OC: Tensor) -> Tensor:
    """Signed codes i8 [O, C] as words i32 [C, O / 8]."""
    ordered = codes_OC.T.reshape(codes_OC.shape[1], -1, len(ORDER))[:, :, torch.tensor(ORDER)]
    return pack_words(ordered.flatten(1).contiguous(), BITS)
