"""The Triton backend: which kernels make which type, and which read it. Bytes and weights equal those of the CPU.

A type is a list of launches: search, scales, codes, packing. Between them lie small arrays of what was found for each
sub-block, and codes of one byte a weight. The alternative, one kernel for each type from weights to bytes, would save
a few bytes of traffic a weight in a task that is bound by arithmetic, and leaves most threads idle while scales are
searched. Rows go through in slabs, so that the arrays between stay small whatever the tensor.

A family that is not here comes in by a line in `launches`, and one in `reading`.
"""

from __future__ import annotations

import torch
import triton

from quantkernels.ggml.checks import check_scales, check_values
from quantkernels.ggml.gpu import families as families
from quantkernels.ggml.gpu.iq1 import iq1, reading_iq1
from quantkernels.ggml.gpu.iq2 import iq2, reading_iq2
from quantkernels.ggml.gpu.iq3 import iq3, reading_iq3
from quantkernels.ggml.gpu.launch import Launch, Slab, floats
from quantkernels.ggml.gpu.round import pack_kernel, pack_trits_kernel
from quantkernels.ggml.gpu.unpack import unpack_kernel
from quantkernels.ggml.layout import BlockType
from quantkernels.ggml.packing.fp4 import LEVELS as FLOAT4_LEVELS
from quantkernels.ggml.packing.iq4 import LEVELS as IQ4_LEVELS

SLAB_WEIGHTS = 1 << 26  # 64 MiB of codes
LATTICE_SLAB_WEIGHTS = 1 << 24  # 700 MiB for the 31 trials of IQ3_XXS
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# The fields of codes in a block: (first byte, weights in a run, codes in a byte, bits of each, how far shifted down).
# Codes that share a byte lie a run apart.
FIELDS: dict[str, tuple[tuple[int, int, int, int, int], ...]] = {
    "Q8_0": ((2, 1, 1, 8, 0),),
    "Q4_0": ((2, 16, 2, 4, 0),),
    "Q4_1": ((4, 16, 2, 4, 0),),
    "Q5_0": ((6, 16, 2, 4, 0), (2, 1, 8, 1, 4)),
    "Q5_1": ((8, 16, 2, 4, 0), (4, 1, 8, 1, 4)),
    "Q2_K": ((16, 32, 4, 2, 0),),
    "Q3_K": ((32, 32, 4, 2, 0), (0, 32, 8, 1, 2)),
    "Q4_K": ((16, 32, 2, 4, 0),),
    "Q5_K": ((48, 32, 2, 4, 0), (16, 32, 8, 1, 4)),
    "Q6_K": ((0, 64, 2, 4, 0), (128, 32, 4, 2, 4)),
    "IQ4_NL": ((2, 16, 2, 4, 0),),
    "IQ4_XS": ((8, 16, 2, 4, 0),),
    "TQ1_0": (),  # in base 3, by kernels of its own
    "TQ2_0": ((0, 32, 4, 2, 0),),
    "MXFP4": ((1, 16, 2, 4, 0),),
    "NVFP4": ((4, 8, 2, 4, 0),),
}


def quantize(rows: torch.Tensor, known: BlockType, importance: torch.Tensor | None) -> torch.Tensor:
    """The ggml bytes of `rows` [R, C] f32, f16 or bf16, as u8 [R, bytes] on the same device; importance [C] f32.

    Raises ValueError as `quantkernels.ggml.quantize` does, and for a type that has no kernel here.
    """
    if rows.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"rows must be f32, f16 or bf16; got {rows.dtype}")
    _check_device(rows)
    weights = importance.to(rows.device) if importance is not None and known.uses_importance else None
    width = rows.shape[1] // known.weights * known.size_bytes
    out = torch.empty((len(rows), width), dtype=torch.uint8, device=rows.device)
    slab_weights = LATTICE_SLAB_WEIGHTS if known.name[:3] in ("IQ1", "IQ2", "IQ3") else SLAB_WEIGHTS
    height = max(1, slab_weights // rows.shape[1])
    for start in range(0, len(rows), height):
        slab, blocks = _aligned(rows[start : start + height].detach()), out[start : start + height]
        check_values(slab, known, start)
        if known.name in FLOATS:
            blocks.copy_(slab.float().to(FLOATS[known.name]).view(torch.uint8))
        else:
            for launch in launches(slab, known, weights, blocks):
                launch.run()
        check_scales(blocks, known, start)
    return out


def dequantize(blocks: torch.Tensor, known: BlockType) -> torch.Tensor:
    """The weights that `blocks` [R, bytes] u8 stand for: [R, C] f32 on the same device."""
    _check_device(blocks)
    blocks = _aligned(blocks)
    if known.name in FLOATS:
        return blocks.view(FLOATS[known.name]).float()
    columns = blocks.shape[1] // known.size_bytes * known.weights
    out = torch.empty((len(blocks), columns), dtype=torch.float32, device=blocks.device)
    reading(blocks, known, out).run()
    return out


def _check_device(values: torch.Tensor) -> None:
    if not values.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"the backend triton needs tensors on a GPU, or TRITON_INTERPRET=1; got {values.device}")


def _aligned(values: torch.Tensor) -> torch.Tensor:
    """`values` as a contiguous tensor that starts at a multiple of eight bytes, which is what kernels load at once."""
    values = values.contiguous()
    return values if values.data_ptr() % 8 == 0 else values.clone()


def launches(rows: torch.Tensor, known: BlockType, importance: torch.Tensor | None, out: torch.Tensor) -> list[Launch]:
    """What makes the blocks `out` of `rows`, in order.

    rows [R, C] f32, f16 or bf16, finite; importance [C] f32 or None; out [R, bytes] u8; all contiguous and on one
    device, rows at a multiple of eight bytes. Raises ValueError for a type that has no kernel here.
    """
    codes = torch.empty(rows.numel(), dtype=torch.uint8, device=rows.device)
    slab = Slab(rows=rows, known=known, importance=importance, out=out, codes=codes)
    match known.name:
        case "Q2_K" | "Q4_K" | "Q5_K":
            searching = families.scale_min_k(slab)
        case "Q3_K":
            searching = families.q3_k(slab)
        case "Q6_K":
            searching = families.q6_k(slab)
        case "IQ4_NL" | "IQ4_XS":
            searching = families.iq4(slab)
        case "Q4_0" | "Q4_1" | "Q5_0" | "Q5_1":
            searching = families.legacy_by_range(slab) if importance is None else families.legacy_by_search(slab)
        case "Q8_0" | "TQ1_0" | "TQ2_0":
            searching = families.half_away(slab)
        case "MXFP4" | "NVFP4":
            searching = families.float4(slab)
        case "IQ3_XXS" | "IQ3_S":
            return iq3(slab)
        case "IQ2_XXS" | "IQ2_XS" | "IQ2_S":
            return iq2(slab)
        case "IQ1_S" | "IQ1_M":
            return iq1(slab)
        case _:
            raise ValueError(f"no GPU kernel makes {known.name}; move the weights to the CPU")
    return [*searching, *_packing(slab)]


def _packing(slab: Slab) -> list[Launch]:
    known = slab.known
    if known.name == "TQ1_0":
        return [Launch(kernel=pack_trits_kernel, arguments=(slab.codes, slab.out), count=slab.blocks * 52)]
    return [
        Launch(
            kernel=pack_kernel,
            arguments=(slab.codes, slab.out),
            count=slab.rows.numel() // parts,
            constants={
                "WEIGHTS": known.weights,
                "BYTES": known.size_bytes,
                "AT": at,
                "RUN": run,
                "PARTS": parts,
                "WIDTH": width,
                "SHIFT": shift,
            },
        )
        for at, run, parts, width, shift in FIELDS[known.name]
    ]


def reading(blocks: torch.Tensor, known: BlockType, out: torch.Tensor) -> Launch:
    """What turns `blocks` into the weights `out`."""
    if known.name in ("IQ3_XXS", "IQ3_S"):
        return reading_iq3(blocks, known, out)
    if known.name in ("IQ2_XXS", "IQ2_XS", "IQ2_S"):
        return reading_iq2(blocks, known, out)
    if known.name in ("IQ1_S", "IQ1_M"):
        return reading_iq1(blocks, known, out)
    if known.name not in FIELDS:
        raise ValueError(f"no GPU kernel reads {known.name}; move the blocks to the CPU")
    levels = IQ4_LEVELS if known.name.startswith("IQ4") else (*FLOAT4_LEVELS, *(-level for level in FLOAT4_LEVELS))
    return Launch(
        kernel=unpack_kernel,
        arguments=(blocks, floats(levels, blocks.device), out),
        count=out.numel(),
        constants={
            "NAME": known.name,
            "WEIGHTS": known.weights,
            "BYTES": known.size_bytes,
            "FIELDS": FIELDS[known.name],
        },
    )
