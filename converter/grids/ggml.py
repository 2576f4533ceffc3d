"""The block formats of ggml: values are whole encoded rows, exactly as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from converter.grids import Framed
from quantkernels import ggml
from quantkernels.ggml import frames


@dataclass(frozen=True, kw_only=True)
class GgmlGrid:
    """One ggml type, such as "Q4_K" or "F32"; parts: `blocks` uint8 [O, bytes a row], one row for a vector.

    search: ggml's own, byte for byte, or the thorough one, of lower error in the same format.
    """

    type: str
    search: Literal["ggml", "thorough"] = "ggml"

    @property
    def name(self) -> str:
        return self.type

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The encoded rows of `weight` [O, I] or [I] f32, by the grid's search; importance [I] f32 weighs columns."""
        rows, threads = weight.reshape(-1, weight.shape[-1]), torch.get_num_threads()
        return {"blocks": ggml.quantize(rows, self.type, importance, threads=threads, search=self.search)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return ggml.dequantize(parts["blocks"], self.type)

    def framed(self, parts: Mapping[str, Tensor]) -> Framed | None:
        """The blocks with their codes set apart; None for floating point."""
        blocks = parts["blocks"]
        frame = frames.frame(blocks, self.type)
        if frame is None:
            return None
        return Framed(
            frame=frame,
            with_frame=lambda new, codes: {"blocks": frames.with_frame(blocks, self.type, new, codes)},
        )
