"""What a ggml block type is: how many weights a block holds, how many bytes they take, where each field lies.

Source: the block structs of ggml (ggml-common.h) and the GGUF specification's type numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

SUPER_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One ggml type: `number` is its id in a GGUF file, `half_fields` the byte offsets of its float16 fields."""

    name: str
    number: int
    weights: int
    size_bytes: int
    half_fields: tuple[int, ...]
    uses_importance: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.weights


def _type(
    name: str, number: int, weights: int, size_bytes: int, half_fields: tuple[int, ...] = (), importance: bool = False
) -> BlockType:
    return BlockType(
        name=name,
        number=number,
        weights=weights,
        size_bytes=size_bytes,
        half_fields=half_fields,
        uses_importance=importance,
    )


# In brackets the fields of a block in file order, with their sizes in bytes.
TYPES = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            _type("F32", 0, 1, 4),
            _type("F16", 1, 1, 2, (0,)),
            _type("BF16", 30, 1, 2),
            _type("Q4_0", 2, 32, 18, (0,), True),  # scale 2, codes 16
            _type("Q4_1", 3, 32, 20, (0, 2), True),  # scale 2, minimum 2, codes 16
            _type("Q5_0", 6, 32, 22, (0,), True),  # scale 2, fifth bits 4, codes 16
            _type("Q5_1", 7, 32, 24, (0, 2), True),  # scale 2, minimum 2, fifth bits 4, codes 16
            _type("Q8_0", 8, 32, 34, (0,)),  # scale 2, codes 32
            _type("Q2_K", 10, SUPER_BLOCK, 84, (80, 82), True),  # scales 16, codes 64, d 2, dmin 2
            _type("Q3_K", 11, SUPER_BLOCK, 110, (108,), True),  # third bits 32, codes 64, scales 12, d 2
            _type("Q4_K", 12, SUPER_BLOCK, 144, (0, 2), True),  # d 2, dmin 2, scales 12, codes 128
            _type("Q5_K", 13, SUPER_BLOCK, 176, (0, 2), True),  # d 2, dmin 2, scales 12, fifth bits 32, codes 128
            _type("Q6_K", 14, SUPER_BLOCK, 210, (208,), True),  # low codes 128, high codes 64, scales 16, d 2
        )
    }
)
