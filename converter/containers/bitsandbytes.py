"""bitsandbytes' 4 bits with double quantization: NF4 and FP4, loaded by transformers for inference and for QLoRA.

    weight               u8 [n / 2, 1], two codes in a byte, the first one high, through all rows
    weight.absmax        u8 [B], and weight.nested_absmax f32 [M]: see converter/grids/codebook.py
    weight.quant_map     f32 [16], weight.nested_quant_map f32 [256]: what codes and absmax mean
    weight.quant_state.bitsandbytes__nf4 (or __fp4)   u8, JSON: shape, block sizes, the mean of absmax, the type

Source: bitsandbytes 0.50 (functional.py, QuantState).
"""

# O out, I in (columns), B blocks of weights, M blocks of absmax

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, TensorPlan
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import SafetensorsModel, kept_linears
from converter.containers.selection import Choice
from converter.grids import Grid
from converter.grids.codebook import FACTORS, FP4_POSITIVE, LEVELS, CodebookGrid, fractions
from converter.grids.plain import DTYPES, PlainGrid
from converter.manifest import Target
from converter.source import Header, Snapshot

MEAN = "%.16e"  # of a number that is not negative: always as long
# What the reader's codes mean, by code: FP4's are a sign and an index that rises neither way.
QUANT_MAPS = {
    "nf4": LEVELS["nf4"],
    "fp4": tuple(sign * FP4_POSITIVE[at] for sign in (1, -1) for at in (0, 1, 6, 7, 4, 5, 2, 3)),
}


class BitsAndBytes(SafetensorsModel):
    """The container of `format: bitsandbytes`."""

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        if header.shape[1] % 2:
            return PlainGrid(dtype=dtype), f"kept: rows of {header.shape[1]} values do not fill whole bytes"
        return choice.grid(group_size=choice.scheme.group_size, scale_dtype=dtype), ""

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        grid, name, count = tensor.grid, tensor.name, math.prod(tensor.shape)
        assert isinstance(grid, CodebookGrid)
        blocks = -(-count // grid.block)
        return (
            Entry(name=name, dtype="U8", shape=(count // 2, 1)),
            Entry(name=f"{name}.absmax", dtype="U8", shape=(blocks,)),
            Entry(name=f"{name}.quant_map", dtype="F32", shape=(16,)),
            Entry(name=f"{name}.nested_absmax", dtype="F32", shape=(-(-blocks // FACTORS),)),
            Entry(name=f"{name}.nested_quant_map", dtype="F32", shape=(256,)),
            Entry(
                name=f"{name}.quant_state.bitsandbytes__{grid.values}", dtype="U8", shape=(len(_state(tensor, 0.0)),)
            ),
        )

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        grid = tensor.grid
        assert isinstance(grid, CodebookGrid)
        quant_map = torch.tensor(QUANT_MAPS[grid.values])
        code_of = quant_map.argsort(stable=True)  # FP4's second zero is never used
        if len(LEVELS[grid.values]) < len(quant_map):
            code_of = torch.cat([code_of[: len(FP4_POSITIVE) - 1], torch.tensor([0]), code_of[len(FP4_POSITIVE) + 1 :]])
        nibbles = code_of.to(torch.uint8)[parts["codes"].flatten().int()]
        state = torch.tensor(list(_state(tensor, float(parts["offset"]))), dtype=torch.uint8)
        packed = (nibbles[::2] << 4 | nibbles[1::2])[:, None]
        return [packed, parts["scale"], quant_map, parts["nested"], fractions(), state]

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        grid = next(tensor.grid for tensor in plan.tensors if tensor.quantized)
        assert isinstance(grid, CodebookGrid)
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": str(target.scheme).lower(),
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": _torch_name(grid.dtype),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": kept_linears(plan, snapshot, architecture) or None,
        }


def _state(tensor: TensorPlan, offset: float) -> bytes:
    """The JSON beside a weight, as long for every offset."""
    grid = tensor.grid
    assert isinstance(grid, CodebookGrid)
    said = {
        "quant_type": grid.values,
        "blocksize": grid.block,
        "dtype": _torch_name(grid.dtype),
        "shape": list(tensor.shape),
        "nested_blocksize": FACTORS,
        "nested_dtype": "float32",
    }
    return f'{json.dumps(said)[:-1]}, "nested_offset": {MEAN % offset}}}'.encode()


def _torch_name(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
