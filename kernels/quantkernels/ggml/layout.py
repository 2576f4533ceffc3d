"""What a ggml block type is: how many weights a block holds, how many bytes they take, where each field lies.

Source: the block structs of ggml (ggml-common.h) and the GGUF specification's type numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

SUPER_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class BlockType:
    """One ggml type: `number` is its id in a GGUF file, `half_fields` the byte offsets of its float16 fields.

    half_nibbles are the offsets of the bytes whose high halves are a float16 field, the lowest bits first.
    byte_fields are the offsets of its one-byte float scales, and byte_nan is what stands for NaN there.
    needs_importance: ggml refuses to make it without importance.
    """

    name: str
    number: int
    weights: int
    size_bytes: int
    half_fields: tuple[int, ...]
    half_nibbles: tuple[int, ...]
    byte_fields: tuple[int, ...]
    byte_nan: int
    uses_importance: bool
    needs_importance: bool

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.weights


def _type(
    name: str,
    number: int,
    weights: int,
    size_bytes: int,
    half_fields: tuple[int, ...] = (),
    uses_importance: bool = False,
    needs_importance: bool = False,
    byte_fields: tuple[int, ...] = (),
    byte_nan: int = 0,
    half_nibbles: tuple[int, ...] = (),
) -> BlockType:
    return BlockType(
        name=name,
        number=number,
        weights=weights,
        size_bytes=size_bytes,
        half_fields=half_fields,
        half_nibbles=half_nibbles,
        byte_fields=byte_fields,
        byte_nan=byte_nan,
        uses_importance=uses_importance,
        needs_importance=needs_importance,
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
            _type("IQ1_S", 19, SUPER_BLOCK, 50, (0,), True, True),  # d 2, low index bits 32, high bits and scales 16
            # low index bits 32, high bits 16, scales with d in their high nibbles 8
            _type("IQ1_M", 29, SUPER_BLOCK, 56, (), True, half_nibbles=(49, 51, 53, 55)),
            _type("IQ2_XXS", 16, SUPER_BLOCK, 66, (0,), True, True),  # d 2, indices, signs and scales 64
            _type("IQ2_XS", 17, SUPER_BLOCK, 74, (0,), True, True),  # d 2, indices and signs 64, scales 8
            _type("IQ2_S", 22, SUPER_BLOCK, 82, (0,), True),  # d 2, low index bits 32, signs 32, high bits 8, scales 8
            _type("IQ3_XXS", 18, SUPER_BLOCK, 98, (0,), True),  # d 2, indices 64, signs and scales 32
            _type(
                "IQ3_S", 21, SUPER_BLOCK, 110, (0,), True
            ),  # d 2, low index bits 64, ninth bits 8, signs 32, scales 4
            _type("IQ4_NL", 20, 32, 18, (0,), True),  # scale 2, codes 16
            _type("IQ4_XS", 23, SUPER_BLOCK, 136, (0,), True),  # d 2, high scale bits 2, low scale bits 4, codes 128
            _type("TQ1_0", 34, SUPER_BLOCK, 54, (52,)),  # five trits a byte 48, four trits a byte 4, d 2
            _type("TQ2_0", 35, SUPER_BLOCK, 66, (64,)),  # codes 64, d 2
            _type("MXFP4", 39, 32, 17, byte_fields=(0,), byte_nan=255),  # exponent 1, codes 16
            _type("NVFP4", 40, 64, 36, byte_fields=(0, 1, 2, 3), byte_nan=127),  # scales 4, codes 32
        )
    }
)
