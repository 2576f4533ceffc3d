"""Mixtures of experts, expert by expert: every expert's linears are tensors and modules of their own.

transformers 5 computes with all experts of a block fused into two tensors, most checkpoints hold a tensor for each
linear of each expert, and newer ones the fused tensors. Everything here sees the middle form, so that each expert has
its own statistics, grids and errors like any other linear. Slices of a fused tensor are ranges of its file's bytes and
cost nothing; the alternative, keeping it whole, would quantize 128 experts with one set of statistics.
"""

# E experts, I in, M middle width of an expert, N rows (tokens), K experts of a token

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from converter.architecture import Architecture, Experts
from converter.errors import SourceError
from converter.source import Header, Snapshot


class SeparateExperts(nn.Module):
    """The experts of a block, each with linears of its own, in place of transformers' fused module.

    Children are named "0", "1", ..., each with the checkpoint's names of its gate, up and down linear.
    """

    def __init__(self, fused: Any, experts: Experts, dtype: torch.dtype) -> None:
        """fused holds gate_up_proj [E, 2 M, I], down_proj [E, I, M] and act_fn, as Mixtral's and Qwen's do."""
        super().__init__()
        count, twice_middle, width = fused.gate_up_proj.shape
        self.activation = fused.act_fn
        self.names = experts.linears
        gate, up, down = self.names
        for e in range(count):
            linears = {
                gate: nn.Linear(width, twice_middle // 2, bias=False, dtype=dtype, device="meta"),
                up: nn.Linear(width, twice_middle // 2, bias=False, dtype=dtype, device="meta"),
                down: nn.Linear(twice_middle // 2, width, bias=False, dtype=dtype, device="meta"),
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
            middle = self.activation(linears[gate](seen)) * linears[up](seen)  # type: ignore[index]
            out = linears[down](middle) * share[rows, place, None]  # type: ignore[index]
            total.index_add_(0, rows, out.to(total.dtype))
        return total


def separate(snapshot: Snapshot, architecture: Architecture) -> Snapshot:
    """`snapshot` with fused experts as slices, one per linear of an expert; as it is where nothing is fused.

    gate_up_proj [E, 2 M, I] holds an expert's gate rows and then its up rows, down_proj [E, I, M] its down rows.
    Raises SourceError when a fused tensor has another shape than config.json's number of experts calls for.
    """
    experts = architecture.experts
    if experts is None:
        return snapshot
    tensors: dict[str, Header] = {}
    for name, header in snapshot.tensors.items():
        b = architecture.block_of(name)
        local = name.removeprefix(architecture.prefix(b)) if b is not None else ""
        if local not in (f"{experts.module}.gate_up_proj", f"{experts.module}.down_proj"):
            tensors[name] = header
            continue
        halves = 2 if local.endswith("gate_up_proj") else 1
        if len(header.shape) != 3 or header.shape[0] != experts.count or header.shape[1] % halves:
            what = f"tensor {name} has the shape {list(header.shape)}, and config.json counts {experts.count} experts"
            raise SourceError(snapshot.repo, what, "Config.json and weights are of different models: fetch both again")
        linears = experts.linears[:2] if halves == 2 else experts.linears[2:]
        size_bytes = (header.end - header.start) // (experts.count * halves)
        for piece in range(experts.count * halves):
            e, half = divmod(piece, halves)
            own = f"{architecture.prefix(b or 0)}{experts.module}.{e}.{linears[half]}.weight"
            tensors[own] = replace(
                header,
                name=own,
                shape=(header.shape[1] // halves, header.shape[2]),
                start=header.start + piece * size_bytes,
                end=header.start + (piece + 1) * size_bytes,
            )
    return replace(snapshot, tensors=dict(sorted(tensors.items())))
