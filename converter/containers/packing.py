"""Codes of 1 to 8 bits as a dense stream of bits, low bits first: element i lies in bits [i * bits, i * bits + bits).

Eight elements fill exactly `bits` bytes, so eight strided slices and a few shifts pack any width, also those whose
elements straddle bytes (3, 5, 6, 7 bits), without ever widening a byte. The alternative, one bit plane after another,
is shorter and needs eight times the memory. Words are little-endian: 32 elements fill exactly `bits` words.
"""

from __future__ import annotations

import torch
from torch import Tensor

# R rows, N elements in a row, B bytes in a row, W words in a row


def pack_bytes(codes_RN: Tensor, bits: int) -> Tensor:
    """The stream of each row as bytes [R, ceil(N * bits / 8)] uint8; the last byte is filled up with zero bits.

    codes_RN uint8, each below 2**bits.
    """
    rows, count = codes_RN.shape
    assert codes_RN.dtype == torch.uint8 and 1 <= bits <= 8
    if bits == 8:
        return codes_RN.contiguous()
    eights = torch.nn.functional.pad(codes_RN, (0, -count % 8)).reshape(rows, -1, 8)
    packed = torch.zeros(rows, eights.shape[1], bits, dtype=torch.uint8, device=codes_RN.device)
    for element in range(8):
        byte, shift = divmod(element * bits, 8)
        packed[:, :, byte] |= eights[:, :, element] << shift  # bits above the byte fall off
        if shift + bits > 8:
            packed[:, :, byte + 1] |= eights[:, :, element] >> (8 - shift)
    return packed.reshape(rows, -1)[:, : -(-count * bits // 8)].contiguous()


def unpack_bytes(packed_RB: Tensor, bits: int, count: int) -> Tensor:
    """The codes [R, count] uint8 of streams that `pack_bytes` wrote; packed_RB uint8 may be longer than needed."""
    rows, length = packed_RB.shape
    assert packed_RB.dtype == torch.uint8 and 1 <= bits <= 8 and length * 8 >= count * bits
    if bits == 8:
        return packed_RB[:, :count].contiguous()
    groups = torch.nn.functional.pad(packed_RB, (0, -length % bits)).reshape(rows, -1, bits)
    codes = torch.empty(rows, groups.shape[1], 8, dtype=torch.uint8, device=packed_RB.device)
    for element in range(8):
        byte, shift = divmod(element * bits, 8)
        codes[:, :, element] = groups[:, :, byte] >> shift
        if shift + bits > 8:
            codes[:, :, element] |= groups[:, :, byte + 1] << (8 - shift)
    codes &= (1 << bits) - 1
    return codes.reshape(rows, -1)[:, :count].contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes in [-2**(bits-1), 2**(bits-1) - 1], int8, as uint8 counted from the lowest."""
    return codes.view(torch.uint8) + (1 << (bits - 1))  # wraps, as two's complement does


def to_signed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `to_unsigned`: uint8 to int8."""
    return (codes - (1 << (bits - 1))).view(torch.int8)


def pack_words(codes_RN: Tensor, bits: int) -> Tensor:
    """Signed codes int8 as int32 words [R, ceil(N * bits / 32)], each row a stream of its own (compressed-tensors)."""
    packed_RB = pack_bytes(to_unsigned(codes_RN, bits), bits)
    padded_RB = torch.nn.functional.pad(packed_RB, (0, -packed_RB.shape[1] % 4))
    return padded_RB.reshape(-1).view(torch.int32).reshape(len(codes_RN), -1)


def unpack_words(words_RW: Tensor, bits: int, count: int) -> Tensor:
    """The signed codes [R, count] int8 of words that `pack_words` wrote."""
    packed_RB = words_RW.reshape(-1).view(torch.uint8).reshape(len(words_RW), -1)
    return to_signed(unpack_bytes(packed_RB, bits, count), bits)


def pack_trits(codes_RN: Tensor) -> Tensor:
    """Codes 0, 1 and 2 uint8, five in a byte [R, ceil(N / 5)]: the code of element 5 k + n counts 3**n in byte k."""
    fives = torch.nn.functional.pad(codes_RN, (0, -codes_RN.shape[1] % 5)).reshape(len(codes_RN), -1, 5)
    packed = fives[:, :, 4].clone()
    for element in (3, 2, 1, 0):
        packed.mul_(3).add_(fives[:, :, element])
    return packed


def unpack_trits(packed_RB: Tensor, count: int) -> Tensor:
    """The codes [R, count] uint8 of bytes that `pack_trits` wrote. Raises ValueError for a byte above 242."""
    if packed_RB.numel() and int(packed_RB.max()) >= 3**5:
        raise ValueError(f"{int(packed_RB.max())} is no five digits of base 3")
    codes = torch.stack([packed_RB // 3**element % 3 for element in range(5)], 2)
    return codes.reshape(len(packed_RB), -1)[:, :count].contiguous()
