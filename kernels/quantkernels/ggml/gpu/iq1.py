"""IQ1_S and IQ1_M in Triton: the steps of `reference/iq1.py`, and blocks back to weights."""

from __future__ import annotations

import torch
import triton.language as tl

from quantkernels.ggml.gpu.iq1_search import (
    ENTRY_NEGATIVE,
    cuts_kernel,
    iq1_m_d_kernel,
    lattice_fit_kernel,
    points_kernel,
    rank_kernel,
    running_kernel,
    sub_scales_kernel,
)
from quantkernels.ggml.gpu.lattice import WARP, prepare, tables
from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.numbers import jitted, lane_of, load_byte, load_half, store_byte, store_pair
from quantkernels.ggml.layout import SUPER_BLOCK, BlockType


def iq1(slab: Slab) -> list[Launch]:
    """IQ1_S and IQ1_M, the latter also without importance."""
    name, device = slab.known.name, slab.rows.device
    size, halves, tiny = (32, 1, 1e-12) if name == "IQ1_S" else (16, 2, 1e-7)
    prepared = prepare(slab, "square" if slab.importance is None else "importance * root", 2.0, "kept")
    grid = tables("IQ1", device)
    running_x, running_w = slab.found(halves, 1), slab.found(halves, 1)
    scales, d_found = slab.found(1, size), slab.found(1, SUPER_BLOCK)
    subs = scales.numel()
    cuts = torch.empty(subs, dtype=torch.int32, device=device)
    entries = torch.empty(slab.rows.numel() // 8, dtype=torch.int32, device=device)
    codes = torch.empty(subs, dtype=torch.uint8, device=device)
    weighed = (prepared.values, prepared.weight)
    shape = {"HALVES": halves, "N": size}
    launches = [
        *prepared.launches,
        Launch(
            kernel=rank_kernel,
            arguments=(*weighed, slab.codes, running_x, running_w, subs),
            count=slab.rows.numel(),
            constants=shape,
        ),
        Launch(
            kernel=running_kernel, arguments=(running_x, running_w, subs), count=halves * subs, constants={"N": size}
        ),
        Launch(kernel=cuts_kernel, arguments=(running_x, running_w, scales, cuts), count=subs, constants=shape),
        Launch(
            kernel=points_kernel,
            arguments=(*weighed, slab.codes, scales, cuts, grid.bounds, grid.entries, entries),
            count=entries.numel(),
            constants=shape,
            tile=WARP,
        ),
        Launch(
            kernel=lattice_fit_kernel,
            arguments=(*weighed, entries, scales),
            count=subs,
            constants={"TINY": tiny, "N": size},
        ),
        Launch(
            kernel=sub_scales_kernel,
            arguments=(scales, slab.out, d_found, codes),
            count=slab.blocks,
            constants={"NAME": name, "J": SUPER_BLOCK // size},
        ),
    ]
    if name == "IQ1_M":
        arguments = (*weighed, entries, codes, d_found, slab.out)
        launches.append(Launch(kernel=iq1_m_d_kernel, arguments=arguments, count=slab.blocks))
    packing = Launch(
        kernel=pack_iq1_kernel,
        arguments=(entries, codes, slab.out),
        count=slab.rows.numel() // 32,
        constants={"NAME": name},
    )
    return [*launches, packing]


def reading_iq1(blocks: torch.Tensor, known: BlockType, out: torch.Tensor) -> Launch:
    """What turns `blocks` of IQ1_S or IQ1_M into the weights `out`."""
    return Launch(
        kernel=unpack_iq1_kernel,
        arguments=(blocks, tables("IQ1", blocks.device).values, out),
        count=out.numel(),
        constants={"NAME": known.name},
    )


@jitted
def pack_iq1_kernel(
    entries: tl.tensor, codes: tl.tensor, out: tl.tensor, count: tl.tensor, NAME: tl.constexpr, T: tl.constexpr
) -> None:
    """Indices and shifts, of IQ1_S with the sub-scales; a lane is four groups."""
    lane = lane_of(T)
    present = lane < count
    part = lane % 8
    code = load_byte(codes, lane if NAME == "IQ1_S" else lane * 2, present)
    low = lane // 8 * 50 + 2 + part * 4 if NAME == "IQ1_S" else lane // 8 * 56 + part * 4
    word = tl.zeros((T,), tl.int32)
    for g in tl.static_range(4):
        entry = tl.load(entries + lane * 4 + g, mask=present, other=0)
        store_byte(out, low + g, entry >> 16, present)
        high = (entry >> 24) & 7
        negative = tl.where((entry & ENTRY_NEGATIVE != 0) & (code < 16), 8, 0)
        # The four groups of IQ1_S share one shift.
        word = word | ((high << (3 * g)) | (negative << 12) if NAME == "IQ1_S" else (high | negative) << (4 * g))
    if NAME == "IQ1_S":
        word = word | ((code & 7) << 12)
        store_pair(out, lane // 8 * 50 + 34 + part * 2, word, word >> 8, present)
    else:
        store_pair(out, lane // 8 * 56 + 32 + part * 2, word, word >> 8, present)


@jitted
def unpack_iq1_kernel(
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
    if NAME == "IQ1_S":
        at = lane // 256 * 50
        first = load_byte(blocks, at + 34 + n // 32 * 2, present)
        word = first | (load_byte(blocks, at + 35 + n // 32 * 2, present) << 8)
        index = load_byte(blocks, at + 2 + group, present) | (((word >> (3 * (group % 4))) & 7) << 8)
        negative = word >> 15
        code = (word >> 12) & 7
        d = load_half(blocks, at, present)
    else:
        at = lane // 256 * 56
        nibble = (load_byte(blocks, at + 32 + group // 2, present) >> (4 * (group % 2))) & 15
        index = load_byte(blocks, at + group, present) | ((nibble & 7) << 8)
        negative = nibble >> 3
        first = load_byte(blocks, at + 48 + n // 64 * 2, present)
        word = first | (load_byte(blocks, at + 49 + n // 64 * 2, present) << 8)
        code = (word >> (3 * (n // 16 % 4))) & 7
        half = tl.zeros((T,), tl.int32)
        for k in tl.static_range(4):
            half = half | ((load_byte(blocks, at + 49 + 2 * k, present) >> 4) << (4 * k))
        d = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    scale = d * (2 * code + 1).to(tl.float32)
    value = tl.load(values + index * 8 + n % 8, mask=present, other=0.0)
    tl.store(out + lane, scale * (value + tl.where(negative == 1, -0.125, 0.125)), mask=present)
