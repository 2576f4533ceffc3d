"""Weights that a checkpoint holds in parts: quantized by somebody else, decoded here row by row, in f32.

Each format is a module with its layout and two pure functions: which weights of a checkpoint are in it (`find`, from
headers), and their values (`values`, from parts). The alternative, each format's own library, would load whole modules,
mostly onto a GPU, and none of them can be installed beside all others; the price is that layouts are ours to keep
right, which tests against what those libraries wrote do.
"""

from __future__ import annotations

from converter.packed.find import check_quantization, find_packed, kept_type
from converter.packed.formats import FORMATS
from converter.packed.notes import packed_notes
from converter.packed.repack import same_grid
from converter.packed.rows import blocks_of, rows_of
from converter.packed.weight import Format, Packed, ReadBytes, part_of

__all__ = [
    "FORMATS",
    "Format",
    "Packed",
    "ReadBytes",
    "blocks_of",
    "check_quantization",
    "find_packed",
    "kept_type",
    "packed_notes",
    "part_of",
    "rows_of",
    "same_grid",
]
