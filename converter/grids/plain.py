"""Values as floating point: what norms, biases and everything that is not quantized is stored as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.errors import NumericsError

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class PlainGrid:
    """Floating point of one dtype ("F32", "F16" or "BF16"); parts: `values`, in the tensor's own shape."""

    dtype: str

    @property
    def name(self) -> str:
        return self.dtype

    def encode(self, weight: Tensor, importance: Tensor | None = None) -> Mapping[str, Tensor]:
        """`weight` cast to the dtype. Raises NumericsError when a finite value overflows to infinity (only F16 can)."""
        values = weight.to(DTYPES[self.dtype])
        if not bool(torch.isfinite(values).all()):
            largest = float(weight.abs().max())
            raise NumericsError(
                "a tensor", f"its largest value {largest:g} does not fit {self.dtype}", "Store it as BF16"
            )
        return {"values": values}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        return parts["values"].to(torch.float32)

    def framed(self, parts: Mapping[str, Tensor]) -> None:
        """None: there are no codes."""
