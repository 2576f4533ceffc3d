"""The block formats of ggml: values are whole encoded rows, exactly as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantkernels import ggml


@dataclass(frozen=True, kw_only=True)
class GgmlGrid:
    """One ggml type, such as "Q4_K" or "F32"; parts: `blocks` uint8 [O, bytes a row], one row for a vector."""

    type: str

    @property
    def name(self) -> str:
        return self.type

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The encoded rows of `weight` [O, I] or [I] f32, by ggml's own search; importance [I] f32 weighs columns."""
        return {"blocks": ggml.quantize(weight.reshape(-1, weight.shape[-1]), self.type, importance)}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return ggml.dequantize(parts["blocks"], self.type)
