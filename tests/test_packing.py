"""Streams of codes: what is packed comes back, and lies where the format says."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st

from converter.containers.packing import pack_bytes, pack_words, to_signed, to_unsigned, unpack_bytes, unpack_words

BITS = range(1, 9)
SHAPES = st.tuples(st.integers(1, 7), st.integers(1, 133))


def random_codes(bits: int, shape: tuple[int, int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)


@given(bits=st.sampled_from(BITS), shape=SHAPES, seed=st.integers(0, 1 << 30))
def test_element_i_lies_in_bits_i_times_bits_of_its_row(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(bits, shape, seed)
    for row, packed in zip(codes.tolist(), pack_bytes(codes, bits), strict=True):
        stream = sum(code << (place * bits) for place, code in enumerate(row))
        assert int.from_bytes(packed.numpy().tobytes(), "little") == stream
        assert len(packed) == -(-shape[1] * bits // 8)


@given(bits=st.sampled_from(BITS), shape=SHAPES, seed=st.integers(0, 1 << 30))
def test_unpacking_gives_what_was_packed(bits: int, shape: tuple[int, int], seed: int) -> None:
    codes = random_codes(bits, shape, seed)
    assert torch.equal(unpack_bytes(pack_bytes(codes, bits), bits, shape[1]), codes)
    signed = to_signed(codes, bits)
    assert torch.equal(unpack_words(pack_words(signed, bits), bits, shape[1]), signed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (5, 32), (51, 35), (8, 128)])
def test_words_are_those_of_compressed_tensors(bits: int, shape: tuple[int, int]) -> None:
    codes = to_signed(random_codes(bits, shape, 0), bits)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(codes, bits))


@pytest.mark.parametrize("bits", BITS)
def test_offset_codes_count_from_the_lowest(bits: int) -> None:
    lowest, highest = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    signed = torch.tensor([lowest, 0, highest], dtype=torch.int8)
    assert to_unsigned(signed, bits).tolist() == [0, -lowest, (1 << bits) - 1]
    assert torch.equal(to_signed(to_unsigned(signed, bits), bits), signed)
