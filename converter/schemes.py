"""What each format can store, in one table.

A scheme is a name people know (W4A16, INT8, Q4_K_M) and what it means. The manifest checks names against these tables,
so that a wrong name is refused with its line number; the containers read the meaning from them. The alternative, each
container checking names for itself, would find the same mistake only after every model was opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integer weights, and what happens to the activations that meet them.

    group_size is the default number of input columns that share a scale; None is one scale per output row.
    activation_bits is None when activations keep their precision; otherwise each token is quantized at run time.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    activation_bits: int | None = None


GGUF_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K_M")
COMPRESSED_TENSORS_SCHEMES = {
    "W4A16": Scheme(bits=4, group_size=128),
    "W4A16_ASYM": Scheme(bits=4, group_size=128, symmetric=False),
    "W8A16": Scheme(bits=8),
    "W8A8": Scheme(bits=8, activation_bits=8),
}
PARQUET_SCHEMES = {
    "INT8": Scheme(bits=8),
    "INT4": Scheme(bits=4),
    "INT2": Scheme(bits=2),
}
SCHEMES: dict[str, dict[str, Scheme]] = {
    "compressed-tensors": COMPRESSED_TENSORS_SCHEMES,
    "parquet": PARQUET_SCHEMES,
}
# What the values of `type:` (gguf) or `scheme:` (the others) may be.
STORES: dict[str, tuple[str, ...]] = {
    "gguf": GGUF_TYPES,
    "compressed-tensors": tuple(COMPRESSED_TENSORS_SCHEMES),
    "parquet": tuple(PARQUET_SCHEMES),
}
TRANSFORMS = ("smoothquant",)
ROUNDERS = ("rtn", "gptq")
# GGUF blocks are rounded by ggml's own search; the others take every rounder and transform.
METHODS: dict[str, tuple[str, ...]] = {
    "gguf": ("rtn",),
    "compressed-tensors": TRANSFORMS + ROUNDERS,
    "parquet": TRANSFORMS + ROUNDERS,
}
Observer = Literal["minmax", "percentile", "kl", "mse"]
Granularity = Literal["tensor", "channel", "group"]
