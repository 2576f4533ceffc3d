"""Mixtures of experts, expert by expert: every expert's linears are tensors and modules of their own.

transformers 5 computes with all experts of a block fused into two tensors, most checkpoints hold a tensor for each
linear of each expert, and newer ones the fused tensors. Everything here sees the middle form, so that each expert has
its own statistics, grids and errors like any other linear (see adapt for their tensors). The alternative, keeping them
fused, would quantize 128 experts with one set of statistics.
"""

# E experts, I in, M middle width of an expert, N rows (tokens), K experts of a token

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from converter.architecture import Experts


class SeparateExperts(nn.Module):
    """The experts of a block, each with linears of its own, in place of transformers' fused module.

    Children are named "0", "1", ..., each with the checkpoint's names of its gate, up and down linear.
    """

    def __init__(self, fused: Any, experts: Experts, dtype: torch.dtype) -> None:
        """fused holds gate_up_proj [E, 2 M, I] and down_proj [E, O, M], or experts turned over as experts.fused says.

        Its own gate makes one middle value from each pair of gate and up, which it wants side by side or in turn.
        """
        super().__init__()
        twice_middle, width = (
            fused.gate_up_proj.shape[:0:-1] if experts.fused.transposed else fused.gate_up_proj.shape[1:]
        )
        bias = hasattr(fused, "gate_up_proj_bias")
        self.apply_gate = fused._apply_gate
        self.interleaved = experts.fused.interleaved
        self.names = experts.linears
        gate, up, down = self.names
        for e in range(len(fused.gate_up_proj)):
            linears = {
                gate: nn.Linear(width, twice_middle // 2, bias=bias, dtype=dtype, device="meta"),
                up: nn.Linear(width, twice_middle // 2, bias=bias, dtype=dtype, device="meta"),
                down: nn.Linear(twice_middle // 2, width, bias=bias, dtype=dtype, device="meta"),
            }
            self.add_module(str(e), nn.ModuleDict(linears))

    def forward(self, hidden: Tensor, chosen: Tensor, share: Tensor) -> Tensor:
        """The weighted sum [N, I] of what the experts `chosen` [N, K] make of each row; share [N, K]."""
        gate, up, down = self.names
        total = torch.zeros_like(hidden)
        for e in sorted(set(chosen.flatten().tolist())):
            rows, place = torch.where(chosen == e)
            linears = self.get_submodule(str(e))
            seen = hidden[rows]
            pairs = torch.stack([linears[gate](seen), linears[up](seen)], -1 if self.interleaved else -2)  # type: ignore[index]
            out = linears[down](self.apply_gate(pairs.flatten(-2))) * share[rows, place, None]  # type: ignore[index]
            total.index_add_(0, rows, out.to(total.dtype))
        return total
