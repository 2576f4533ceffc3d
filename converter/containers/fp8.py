"""fp8 in blocks of 128 x 128 as DeepSeek publishes it: transformers' and the engines' own `fp8` method.

    weight            fp8 E4M3 [O, I]
    weight_scale_inv  f32 [O / 128, I / 128], what a block is multiplied by, whatever the name says

Inputs are quantized by whoever runs the model, each token in runs of 128 columns.
Source: DeepSeek-V3 (README_WEIGHTS.md); transformers 5.23 (integrations/finegrained_fp8.py).
"""

# O out, I in (columns)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, TensorPlan
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import SafetensorsModel, kept_linears, where_of
from converter.containers.selection import Choice
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.floats import Fp8Grid
from converter.manifest import Target
from converter.source import Header, Snapshot


class FP8(SafetensorsModel):
    """The container of `format: fp8`."""

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        if choice.target.granularity != "block":
            what = f"fp8 has no place for scales of granularity {choice.target.granularity}"
            raise UnsupportedError(where_of(choice.target), what, "Remove granularity, or use compressed-tensors")
        return choice.grid(group_size=None, scale_dtype="F32"), ""

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        assert isinstance(tensor.grid, Fp8Grid)
        shape = tensor.grid.scale_shape(tensor.shape[0], tensor.shape[1])
        scale = Entry(name=f"{tensor.name}_scale_inv", dtype="F32", shape=shape)
        return Entry(name=tensor.name, dtype="F8_E4M3", shape=tensor.shape), scale

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [parts["codes"], parts["scale"]]

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        grid = next(tensor.grid for tensor in plan.tensors if tensor.quantized)
        assert isinstance(grid, Fp8Grid) and grid.block
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(grid.block),
            "modules_to_not_convert": kept_linears(plan, snapshot, architecture) or None,
        }
