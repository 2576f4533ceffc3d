"""bitsandbytes' 4 bits: NF4 and FP4, with and without double quantization.

    weight                        U8 [n / 2, 1] or any other type of as many bytes, of the n weights in row order; the
                                  first of two is the high nibble
    weight.quant_map              F32 [16], what codes mean
    weight.absmax                 F32, what each block of weights is multiplied by; U8 with double quantization: an
                                  index into nested_quant_map
    weight.nested_quant_map       F32 [256]
    weight.nested_absmax          F32, for each block of absmax
    weight.quant_state.bitsandbytes__nf4 (or __fp4)   U8, JSON: shape, blocksize, nested_blocksize, nested_offset, dtype

absmax = nested_quant_map[index] * nested_absmax + nested_offset; value = quant_map[code] * absmax, all in f32; readers
round it to the model's type. The shape stands in the JSON alone, so planning reads those few bytes of each weight.

Source: bitsandbytes 0.50 (functional.py, QuantState; backends/default/ops.py).
"""

# N rows of a slab, B bytes of a row

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from converter.errors import SourceError
from converter.packed.fp4 import pairs_of
from converter.packed.weight import Format, Packed, ReadBytes, mismatch
from converter.untrusted import check_small, load_json

if TYPE_CHECKING:
    from converter.source import Header

STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
ROLES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@dataclass(frozen=True, kw_only=True)
class State:
    """What the JSON beside a weight says; nested_block is 0 without double quantization."""

    shape: tuple[int, ...]
    block: int
    nested_block: int
    nested_offset: float


def find(
    settings: Mapping[str, Any], found: Mapping[str, Header], read: ReadBytes, where: str
) -> Iterable[tuple[str, Packed]]:
    """Every 4-bit weight, by name."""
    names = [(name, end) for name in found for end in STATES if name.endswith(end)]
    for name, _ in names:
        check_small(name, found[name].end - found[name].start, where)
    texts = read([found[name] for name, _ in names])
    for (name, end), text in zip(names, texts, strict=True):
        weight = name.removesuffix(end)
        codes, state = found.get(weight), state_of(text, f"{where}: {name}")
        if codes is None:
            raise mismatch(where, weight, f"there is {name} and no {weight}")
        parts = {role: found[f"{weight}.{role}"] for role in ROLES if f"{weight}.{role}" in found}
        needed = ROLES if state.nested_block else ROLES[:2]
        if missing := [role for role in needed if role not in parts]:
            raise mismatch(where, weight, f"there is no {weight}.{missing[0]}")
        rows, columns, count = math.prod(state.shape[:-1]), state.shape[-1], math.prod(state.shape)
        blocks = -(-count // state.block)
        fits = columns % 2 == 0 and codes.end - codes.start == count // 2
        fits = fits and math.prod(parts["absmax"].shape) == blocks and math.prod(parts["quant_map"].shape) == 16
        if state.nested_block:
            fits = fits and math.prod(parts["nested_absmax"].shape) == -(-blocks // state.nested_block)
        if not fits:
            listed = ", ".join(f"{role} {list(part.shape)}" for role, part in parts.items())
            what = f"{codes.end - codes.start} bytes and {listed} for a weight of {list(state.shape)}"
            raise mismatch(where, weight, what)
        parts["codes"] = replace(codes, dtype="U8", shape=(rows, columns // 2))
        parts["state"] = found[name]
        yield weight, Packed(format="bitsandbytes", shape=state.shape, parts=parts, bits=4, block=(1, state.block))


def state_of(text: bytes, where: str) -> State:
    """The state beside a weight. Raises SourceError when it is none."""
    try:
        said = load_json(text, where)
        state = State(
            shape=tuple(int(length) for length in said["shape"]),
            block=int(said["blocksize"]),
            nested_block=int(said.get("nested_blocksize") or 0),
            nested_offset=float(said.get("nested_offset") or 0.0),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"it does not describe a weight: {error!r}"
        raise SourceError(where, what, "The checkpoint is damaged: fetch it again") from error
    if not state.shape or min(*state.shape, state.block) < 1 or state.nested_block < 0:
        raise SourceError(where, f"it describes a weight of {list(state.shape)}", "Fetch the checkpoint again")
    return state


def values(packed: Packed, parts: Mapping[str, Tensor], first: int, count: int, where: str) -> Tensor:
    """See Format.values."""
    state = state_of(parts["state"].numpy().tobytes(), where)
    code = parts["quant_map"].float().flatten()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)
    decoded = pairs_of(parts["codes"], pairs)
    start, size, block = first * packed.shape[-1], decoded.numel(), state.block
    low, high = start // block, -(-(start + size) // block)
    factor = parts["absmax"].flatten()[low:high]
    if state.nested_block:
        place = torch.arange(low, high) // state.nested_block
        table = parts["nested_quant_map"].float().flatten()
        factor = table[factor.long()] * parts["nested_absmax"].float().flatten()[place] + state.nested_offset
    spread = factor.float().repeat_interleave(block)[start - low * block :][:size]
    return decoded.mul_(spread.view_as(decoded))


BITSANDBYTES = Format(title="bitsandbytes 4 bits", by_row=True, values=values)
