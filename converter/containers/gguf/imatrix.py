"""Importance of input columns, as a GGUF file that llama.cpp's tools read, merge and quantize with.

Source: llama.cpp, tools/imatrix (the GGUF form: sums and counts, so that files add up).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from converter.containers.gguf.header import compose, padded, place, string, strings, u32


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What was seen of one weight's input: sum_squares [I] over `count` rows."""

    sum_squares: Tensor
    count: int


def write_imatrix(path: Path, sums: Mapping[str, Sums], datasets: Sequence[str], chunks: int, chunk_size: int) -> None:
    """Write `sums` by GGUF tensor name ("blk.0.attn_q.weight"); chunks of `chunk_size` tokens were looked at."""
    fields = {
        "general.type": string("imatrix"),
        "imatrix.datasets": strings(list(datasets)),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk_size),
    }
    data: dict[str, Tensor] = {}
    for name, entry in sorted(sums.items()):
        data[f"{name}.in_sum2"] = entry.sum_squares.to(torch.float32).reshape(1, -1)
        data[f"{name}.counts"] = torch.tensor([[float(entry.count)]], dtype=torch.float32)
    placed = place([(name, tuple(values.shape), "F32") for name, values in data.items()])
    with path.open("wb") as file:
        file.write(compose(fields, placed))
        for stored in placed:
            file.write(data[stored.name].contiguous().numpy().tobytes())
            file.write(bytes(padded(stored.size_bytes) - stored.size_bytes))
