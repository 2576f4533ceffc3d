"""IQ2_XXS, IQ2_XS and IQ2_S in Triton: the steps of `reference/iq2.py`, and blocks back to weights."""

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
        "IQ2_XXS": Rules(
            size=32,
            dimensions=8,
            top=2,
            trials=steps(5, 0.1, 6),
            middle=None,
            tiny=0.0,
            again="always",
            fudge=1.0,
            overflow=True,
        ),
        "IQ2_XS": Rules(
            size=16,
            dimensions=8,
            top=2,
            trials=steps(5, 0.1, 9),
            middle=5.0,
            tiny=1e-15,
            again="off",
            fudge=1.0,
            overflow=True,
        ),
        "IQ2_S": Rules(
            size=16,
            dimensions=8,
            top=2,
            trials=steps(5, 0.1, 9),
            middle=5.0,
            tiny=1e-8,
            again="off",
            fudge=0.9875,
            overflow=True,
        ),
    }
)


def iq2(slab: Slab) -> list[Launch]:
    """IQ2_XXS, IQ2_XS and IQ2_S, the last one also without importance."""
    name = slab.known.name
    weights = "mean + square" if slab.importance is None else "importance * root"
    free = name == "IQ2_S"
    found = search(slab, prepare(slab, weights, 2.0 if free else 1.0, "free" if free else "even"), RULES[name])
    packing = Launch(
        kernel=pack_iq2_kernel,
        arguments=(found.entries, found.codes, found.signs, slab.out),
        count=slab.rows.numel() // 32,
        constants={"NAME": name},
    )
    return [*found.launches, packing]


def reading_iq2(blocks: torch.Tensor, known: BlockType, out: torch.Tensor) -> Launch:
    """What turns `blocks` of an IQ2 type into the weights `out`."""
    return Launch(
        kernel=unpack_iq2_kernel,
        arguments=(blocks, tables(known.name, blocks.device).values, out),
        count=out.numel(),
        constants={"NAME": known.name},
    )


@jitted
def pack_iq2_kernel(
    entries: tl.tensor,
    codes: tl.tensor,
    signs: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """All of a block but d; a lane is four groups. Where all scales are zero IQ2_S alone keeps indices and signs."""
    lane = lane_of(T)
    present = lane < count
    part = lane % 8
    if NAME == "IQ2_XXS":
        at = lane // 8 * 66 + 2 + part * 8
        code = load_byte(codes, lane, present)
        word = code << 28
        for g in tl.static_range(4):
            word = word | ((load_byte(signs, lane * 4 + g, present) & 127) << (7 * g))
        word = tl.where(code > 15, 0, word)
        store_pair(out, at + 4, word, word >> 8, present)
        store_pair(out, at + 6, word >> 16, word >> 24, present)
        for g in tl.static_range(4):
            entry = tl.load(entries + lane * 4 + g, mask=present, other=0)
            store_byte(out, at + g, tl.where(code > 15, 0, entry >> 16), present)
    else:
        at = lane // 8 * (74 if NAME == "IQ2_XS" else 82)
        low = load_byte(codes, lane * 2, present)
        pair = (low & 15) | ((load_byte(codes, lane * 2 + 1, present) & 15) << 4)
        store_byte(out, at + (66 if NAME == "IQ2_XS" else 74) + part, pair, present)
        crumbs = tl.zeros((T,), tl.int32)
        for g in tl.static_range(4):
            index = (tl.load(entries + lane * 4 + g, mask=present, other=0) >> 16) & 1023
            minus = load_byte(signs, lane * 4 + g, present)
            if NAME == "IQ2_XS":
                word = tl.where(low > 15, 0, index | ((minus & 127) << 9))
                store_pair(out, at + 2 + part * 8 + g * 2, word, word >> 8, present)
            else:
                crumbs = crumbs | ((index >> 8) << (2 * g))
                store_byte(out, at + 2 + part * 4 + g, index, present)
                store_byte(out, at + 34 + part * 4 + g, minus, present)
        if NAME == "IQ2_S":
            store_byte(out, at + 66 + part, crumbs, present)


@jitted
def unpack_iq2_kernel(
    blocks: tl.tensor,
    values: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    NAME: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """out [count] f32: the weights of `blocks`; values f32 [points * 8]."""
    lane = lane_of(T)
    present = lane < count
    n = (lane % 256).to(tl.int32)
    group = n // 8
    if NAME == "IQ2_XXS":
        block = lane // 256 * 66
        at = block + 2 + n // 32 * 8
        index = load_byte(blocks, at + group % 4, present)
        low = load_byte(blocks, at + 4, present) | (load_byte(blocks, at + 5, present) << 8)
        last = load_byte(blocks, at + 7, present)
        word = low | (load_byte(blocks, at + 6, present) << 16) | (last << 24)
        minus = with_eighth((word >> (7 * (group % 4))) & 127)
        code = last >> 4
    else:
        block = lane // 256 * (74 if NAME == "IQ2_XS" else 82)
        pairs = block + (66 if NAME == "IQ2_XS" else 74)
        code = (load_byte(blocks, pairs + n // 32, present) >> (4 * (n // 16 % 2))) & 15
        if NAME == "IQ2_XS":
            high = load_byte(blocks, block + 3 + group * 2, present)
            index = load_byte(blocks, block + 2 + group * 2, present) | ((high & 1) << 8)
            minus = with_eighth(high >> 1)
        else:
            high = (load_byte(blocks, block + 66 + group // 4, present) >> (2 * (group % 4))) & 3
            index = load_byte(blocks, block + 2 + group, present) | (high << 8)
            minus = load_byte(blocks, block + 34 + group, present)
    scale = load_half(blocks, block, present) * (0.5 + code.to(tl.float32)) * 0.25
    value = tl.load(values + index * 8 + n % 8, mask=present, other=0.0)
    sign = tl.where((minus >> (n % 8)) & 1 == 1, -1.0, 1.0)
    tl.store(out + lane, scale * value * sign, mask=present)
