"""GPTQ's layouts, which most engines load: integers of 2, 3, 4 or 8 bits, stored column by column.

    qweight  i32 [I b / 32, O], the codes of each output as a stream of bits along the inputs
    qzeros   i32 [G, O b / 32], zero points the same way along the outputs
    scales   f16 [G, O]
    g_idx    i32 [I], the group of each input; AutoRound's files leave it out

Codes are unsigned. "gptq" keeps zero points less one, "gptq_v2" as they are, so symmetric codes of 4 bits have 7 or 8
there. Inputs stay in order: activation order is GPTQ's own affair here, and costs readers nothing. Modules with other
bits or groups than most, and those that are kept, are named in `dynamic` (AutoRound: `extra_config`).

Source: GPTQModel 7.7 (nn_modules/qlinear, quantization/config.py); AutoRound 0.16 (export/export_to_autogptq).
"""

# O out, I in (columns), G groups

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from converter import __version__
from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.packing import pack_words
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import (
    SafetensorsModel,
    group_or_fallback,
    kept_linears,
    module_of,
    where_of,
)
from converter.containers.selection import Choice
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.affine import AffineGrid
from converter.grids.plain import PlainGrid
from converter.manifest import Target
from converter.source import Header, Snapshot

WHOLE_ROW = -1  # the group size of one scale for a row


class GPTQ(SafetensorsModel):
    """The containers of `format: gptq`, `gptq_v2` and `auto-round`, which have the same tensors."""

    def __init__(self, layout: Literal["gptq", "gptq_v2", "auto-round"]) -> None:
        self.layout = layout

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        plain, (out, columns), bits = PlainGrid(dtype=dtype), header.shape, choice.scheme.bits
        if choice.target.granularity == "tensor":
            what = f"{self.layout} has no place for one scale per tensor"
            raise UnsupportedError(where_of(choice.target), what, "Use granularity channel or group")
        if not choice.target.symmetric and self.layout != "gptq_v2":
            what = f"{self.layout} keeps zero points less one, and readers disagree about a zero point of 0"
            raise UnsupportedError(where_of(choice.target), what, "Write format: gptq_v2, or symmetric codes")
        if columns * bits % 32 or out * bits % 32:
            return plain, f"kept: {out} x {columns} codes of {bits} bits do not fill whole 32-bit words"
        group_size, fallback = group_or_fallback(choice, columns)
        return choice.grid(group_size=group_size, scale_dtype="F16"), fallback

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        grid, (out, columns), module = tensor.grid, tensor.shape, module_of(tensor)
        assert isinstance(grid, AffineGrid)
        groups = columns // grid.columns_per_scale(columns)
        entries = (
            Entry(name=f"{module}.qweight", dtype="I32", shape=(columns * grid.bits // 32, out)),
            Entry(name=f"{module}.qzeros", dtype="I32", shape=(groups, out * grid.bits // 32)),
            Entry(name=f"{module}.scales", dtype="F16", shape=(groups, out)),
        )
        if self.layout == "auto-round":
            return entries
        return (*entries, Entry(name=f"{module}.g_idx", dtype="I32", shape=(columns,)))

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        grid, scale_OG = tensor.grid, parts["scale"]
        assert isinstance(grid, AffineGrid)
        zero_OG = parts.get("zero_point", torch.zeros(scale_OG.shape, dtype=torch.int8))
        if self.layout != "gptq_v2":
            zero_OG = zero_OG - 1
        values = [pack_words(parts["codes"], grid.bits).T, pack_words(zero_OG.T.contiguous(), grid.bits), scale_OG.T]
        if self.layout == "auto-round":
            return values
        columns = tensor.shape[1]
        return [*values, torch.arange(columns, dtype=torch.int32) // grid.columns_per_scale(columns)]

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        quantized = [tensor for tensor in plan.tensors if tensor.quantized]
        kinds = [_kind(tensor) for tensor in quantized]
        usual = max(kinds, key=kinds.count)
        others = {module_of(t): kind for t, kind in zip(quantized, kinds, strict=True) if kind != usual}
        kept = kept_linears(plan, snapshot, architecture)
        head = architecture.head if architecture else "lm_head"
        inside = [module for module in kept if module != head]  # a head is kept unless `lm_head` says otherwise
        if self.layout == "auto-round":
            return {
                "quant_method": "auto-round",
                "packing_format": "auto_round:auto_gptq",
                "data_type": "int",
                **usual,
                "extra_config": others | {module: {"bits": 16, "data_type": "float"} for module in inside},
                "block_name_to_quantize": architecture.block.partition(".{b}")[0] if architecture else "",
            }
        return {
            "quant_method": "gptq",
            "checkpoint_format": self.layout,
            **usual,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": False,
            "damp_percent": target.damping,
            "lm_head": any(module_of(tensor) == head for tensor in quantized),
            "dynamic": {f"+:^{re.escape(module)}$": kind for module, kind in others.items()}
            | {f"-:^{re.escape(module)}$": {} for module in inside},
            "meta": {"quantizer": [f"hubmill:{__version__}"]},
        }

    def write(
        self,
        plan: ArtifactPlan,
        snapshot: Snapshot,
        architecture: Architecture | None,
        target: Target,
        parts: Parts,
        folder: Path,
    ) -> None:
        super().write(plan, snapshot, architecture, target, parts, folder)
        if self.layout != "auto-round":  # where older readers look
            said = self.settings(plan, snapshot, architecture, target)
            (folder / "quantize_config.json").write_text(json.dumps(said, indent=2) + "\n", "utf-8")


def _kind(tensor: TensorPlan) -> dict[str, Any]:
    """What readers must know of a weight."""
    grid = tensor.grid
    assert isinstance(grid, AffineGrid)
    return {"bits": grid.bits, "group_size": grid.group_size or WHOLE_ROW, "sym": grid.symmetric}
