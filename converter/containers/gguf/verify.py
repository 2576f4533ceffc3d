"""Read a written GGUF file again: is it what was planned, and can every block be computed with?

A block whose scale is NaN or infinite turns the model's output into NaN, and no reader looks before it computes. The
kernels refuse to make one; this looks at the bytes on the disk, which may come from a source file or a bad disk.
llama.cpp has the same check when it quantizes and, when asked, when it loads.
"""

# B blocks, S bytes of a block

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converter.containers.gguf.header import BLOCKS, read_head
from converter.containers.gguf.shards import Piece, Shard, copied
from converter.errors import NumericsError, SourceError
from quantkernels.ggml import TYPES

CHUNK_BYTES = 1 << 23
IQ1_M_SCALES = 48
MXFP4_LARGEST = 252  # an exponent beyond it is NaN, or overflows f32 with the largest code


def verify(folder: Path, shards: Sequence[Shard]) -> None:
    """Raise SourceError unless the files in `folder` are these, NumericsError when a block cannot be computed with."""
    for shard in shards:
        path = folder / shard.name
        head = read_head(path)
        if path.stat().st_size != shard.size_bytes or tuple(head.tensors.values()) != shard.placed:
            raise SourceError(
                path.name, "the written file is not what was planned", "Check the disk, and convert again"
            )
        for stored in shard.placed:
            check_tensor(folder, Piece(file=shard.name, start=head.data_start + stored.offset, stored=stored))


def check_tensor(folder: Path, piece: Piece) -> None:
    """Raise NumericsError when a scale of the tensor, or a value of one that is not quantized, is not finite."""
    type = piece.stored.type
    if type not in TYPES:  # integers, which cannot be wrong
        return
    size_bytes = BLOCKS[type][1]
    done = 0
    for chunk in copied(folder, piece, CHUNK_BYTES // size_bytes * size_bytes):
        blocks_BS = chunk.numpy().reshape(-1, size_bytes)
        wrong = np.flatnonzero(broken(blocks_BS, type))
        if len(wrong):
            what = f"block {done + int(wrong[0])} of {type} in {piece.file} has a scale that is not finite"
            raise NumericsError(piece.stored.name, what, "Check the disk and the source's weights, and convert again")
        done += len(blocks_BS)


def broken(blocks_BS: NDArray[np.uint8], type: str) -> NDArray[np.bool_]:
    """Which blocks [B, S] u8 of a ggml type hold a scale, or a value of a float type, that is NaN or infinite: [B]."""
    if type == "F32":
        return np.asarray((blocks_BS.view("<u4")[:, 0] & 0x7F800000) == 0x7F800000)
    if type == "BF16":
        return np.asarray((blocks_BS.view("<u2")[:, 0] & 0x7F80) == 0x7F80)
    if type == "MXFP4":
        return np.asarray(blocks_BS[:, 0] > MXFP4_LARGEST)
    if type == "IQ1_M":  # the float16 is spread over the upper four bits of four words; its exponent is in the last two
        high = blocks_BS[:, IQ1_M_SCALES + 7] & 0x70, blocks_BS[:, IQ1_M_SCALES + 5] & 0xC0
        return np.asarray((high[0] == 0x70) & (high[1] == 0xC0))
    found = np.zeros(len(blocks_BS), np.bool_)  # and stays so for NVFP4, each of whose scale bytes is a number
    for offset in TYPES[type].half_fields:
        found |= (blocks_BS[:, offset + 1] & 0x7C) == 0x7C
    return found
