"""A kernel with its arguments, so that what makes a type is a list that can be run, or compiled and looked at.

The floating-point rules of ggml hold because of the options here: multiply and add are never fused, and a denormal
number is no zero (Triton's default).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

from quantkernels.ggml.layout import BlockType

Argument: TypeAlias = torch.Tensor | int | float

TILE = 128  # lanes of one program, one thread each
INTERPRETED_TILE = 2048  # the interpreter runs a program's lanes as one numpy operation
OPTIONS: Mapping[str, Any] = {"num_warps": TILE // 32, "enable_fp_fusion": False}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """`kernel` for `count` lanes; it takes the arguments, then count, then the constants by name.

    tile is the lanes of a program on a GPU: fewer where lanes wait for the slowest of them.
    """

    kernel: Any
    arguments: tuple[Argument, ...]
    count: int
    constants: Mapping[str, Any] = field(default_factory=dict)
    tile: int = TILE

    @property
    def options(self) -> Mapping[str, Any]:
        """How Triton is to compile it."""
        return {**OPTIONS, "num_warps": self.tile // 32}

    def run(self) -> None:
        """Start the kernel on the device of its tensors; on the CPU only Triton's interpreter can."""
        device = next(argument.device for argument in self.arguments if isinstance(argument, torch.Tensor))
        tile = self.tile if device.type == "cuda" else INTERPRETED_TILE
        grid = ((self.count + tile - 1) // tile,)
        self.kernel[grid](*self.arguments, self.count, **self.constants, T=tile, **self.options)


@dataclass(frozen=True, kw_only=True)
class Slab:
    """Some rows on their way to the blocks `out`; codes [weights] u8 are what packing reads."""

    rows: torch.Tensor
    known: BlockType
    importance: torch.Tensor | None
    out: torch.Tensor
    codes: torch.Tensor

    @property
    def blocks(self) -> int:
        return self.rows.numel() // self.known.weights

    def found(self, lines: int, size: int) -> torch.Tensor:
        """Room for `lines` numbers for each sub-block of `size` weights."""
        return torch.empty((lines, self.rows.numel() // size), dtype=torch.float32, device=self.rows.device)

    def floats(self, values: Iterable[float | np.float32]) -> torch.Tensor:
        """A small table on the device of the rows."""
        return floats(values, self.rows.device)


def floats(values: Iterable[float | np.float32], device: torch.device) -> torch.Tensor:
    """`values` as f32 on `device`."""
    return torch.tensor([float(value) for value in values], dtype=torch.float32).to(device)
