"""IQ3_XXS and IQ3_S in Triton: the steps of `reference/iq3.py`, and blocks back to weights."""

from __future__ import annotations

from types import MappingProxyType

import torch
import triton.language as tl

from quantkernels.ggml.gpu.lattice import prepare, tables, with_eighth
from quantkernels.ggml.gpu.lattice_search import Rules, search, steps
from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.numbers import jitted, lane_of, load_byte, load_half, store_byte, store_pair
from quantkernels.ggml.layout import BlockType

RULES = MappingProxyType(
    {
        "IQ3_XXS": Rules(
            size=32,
            dimensions=4,
            top=7,
            trials=steps(15, 0.2, 15),
            middle=15.0,
            tiny=1e-8,
            again="off",
            fudge=1.0125,
            overflow=False,
        ),
        "IQ3_S": Rules(
            size=32,
            dimensions=4,
            top=7,
            trials=steps(15, 0.2, 9),
            middle=15.0,
            tiny=0.0,
            again="all",
            fudge=1.033,
            overflow=False,
        ),
    }
)


def iq3(slab: Slab) -> list[Launch]:
    """IQ3_XXS and IQ3_S, with importance and without."""
    weights = "square" if slab.importance is None else "importance * root"
    prepared = prepare(slab, weights, 2.0, "even" if slab.known.name == "IQ3_XXS" else "free")
    found = search(slab, prepared, RULES[slab.known.name])
    packing = Launch(
        kernel=pack_iq3_kernel,
        arguments=(found.entries, found.codes, found.signs, found.reach, slab.out),
        count=found.codes.numel(),
        constants={"NAME": slab.known.name},
    )
    return [*found.launches, packing]


def reading_iq3(blocks: torch.Tensor, known: BlockType, out: torch.Tensor) -> Launch:
    """What turns `blocks` of IQ3_XXS or IQ3_S into the weights `out`."""
    return Launch(
        kernel=unpack_iq3_kernel,
        arguments=(blocks, tables(known.name, blocks.device).values, out),
        count=out.numel(),
        constants={"NAME": known.name},
    )


@jitted
def place_of(reach: tl.tensor, lane: tl.tensor, present: tl.tensor) -> tl.tensor:
    """The place of a sub-block among the eight: those of zeros come last, as ggml writes IQ3_S."""
    own = lane % 8
    skipped = tl.load(reach + lane, mask=present, other=0.0) == 0.0
    place = tl.zeros_like(own)
    for k in tl.static_range(8):
        other = tl.load(reach + lane - own + k, mask=present, other=0.0) == 0.0
        before = tl.where(skipped, (other == 0) | (k < own), (other == 0) & (k < own))
        place += tl.where(before, 1, 0)
    return place


@jitted
def pack_iq3_kernel(
    entries: tl.tensor,
    codes: tl.tensor,
    signs: tl.tensor,
    reach: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """All of a block but d; a lane is a sub-block."""
    lane = lane_of(T)
    present = lane < count
    sub = lane % 8
    code = load_byte(codes, lane, present)
    if NAME == "IQ3_XXS":
        at = lane // 8 * 98
        word = tl.zeros((T,), tl.int32)
        for g in tl.static_range(4):
            word = word | ((load_byte(signs, lane * 4 + g, present) & 127) << (7 * g))
        word = tl.where(code > 15, 0, word | (code << 28))
        store_pair(out, at + 66 + sub * 4, word, word >> 8, present)
        store_pair(out, at + 68 + sub * 4, word >> 16, word >> 24, present)
        for g in tl.static_range(8):
            entry = tl.load(entries + lane * 8 + g, mask=present, other=0)
            store_byte(out, at + 2 + sub * 8 + g, tl.where(code > 15, 0, entry >> 16), present)
    else:
        at = lane // 8 * 110
        place = place_of(reach, lane, present)
        ninth = tl.zeros((T,), tl.int32)
        for g in tl.static_range(8):
            entry = tl.load(entries + lane * 8 + g, mask=present, other=0)
            ninth = ninth | (((entry >> 24) & 1) << g)
            store_byte(out, at + 2 + place * 8 + g, entry >> 16, present)
        store_byte(out, at + 66 + sub, ninth, present)
        for g in tl.static_range(4):
            store_byte(out, at + 74 + place * 4 + g, load_byte(signs, lane * 4 + g, present), present)
        first = present & (sub % 2 == 0)
        pair = (code & 15) | ((load_byte(codes, lane + 1, first) & 15) << 4)
        store_byte(out, at + 106 + sub // 2, pair, first)


@jitted
def unpack_iq3_kernel(
    blocks: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """out [count] f32: the weights of `blocks`; values f32 [points * 4]."""
    lane = lane_of(T)
    present = lane < count
    n = (lane % 256).to(tl.int32)
    sub = n // 32
    eight = n // 8
    if NAME == "IQ3_XXS":
        at = lane // 256 * 98
        index = load_byte(blocks, at + 2 + n // 4, present)
        word = load_byte(blocks, at + 66 + sub * 4, present) | (load_byte(blocks, at + 67 + sub * 4, present) << 8)
        word = word | (load_byte(blocks, at + 68 + sub * 4, present) << 16)
        last = load_byte(blocks, at + 69 + sub * 4, present)
        minus = with_eighth(((word | (last << 24)) >> (7 * (eight % 4))) & 127)
        scale = load_half(blocks, at, present) * (0.5 + (last >> 4).to(tl.float32)) * 0.5
    else:
        at = lane // 256 * 110
        ninth = (load_byte(blocks, at + 66 + sub, present) >> (n // 4 % 8)) & 1
        index = load_byte(blocks, at + 2 + n // 4, present) | (ninth << 8)
        minus = load_byte(blocks, at + 74 + eight, present)
        code = (load_byte(blocks, at + 106 + sub // 2, present) >> (4 * (sub % 2))) & 15
        scale = load_half(blocks, at, present) * (1.0 + 2.0 * code.to(tl.float32))
    value = tl.load(values + index * 4 + n % 4, mask=present, other=0.0)
    sign = tl.where((minus >> (n % 8)) & 1 == 1, -1.0, 1.0)
    tl.store(out + lane, scale * value * sign, mask=present)
