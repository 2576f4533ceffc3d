"""Double quantization: the scales (and offsets) of a row as codes of a few bits, in units that the row keeps.

A code that is nearest to a scale is not the one whose weights err least, so the codes on both sides are tried, and so
are units that do not reach the largest of a row: one outlying group then errs more and all others less.
"""

# O out, I in (columns), G groups of a row

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from converter.grids.parts import stored_scale
from quantkernels import codebooks

SHARES = (1.0, 0.85, 0.7)  # of the unit at which the largest code is the row's largest value


def bounds(bits: int, *, signed: bool) -> tuple[int, int]:
    """The least and the largest code: those of offsets have a sign, those of scales have none."""
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def coded(
    weight_OI: Tensor,
    importance: Tensor | None,
    side: Mapping[str, Tensor],
    levels: Sequence[float],
    *,
    group_size: int,
    bits: int,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """`scale` u8 [O, G], `offset` i8 [O, G] where side has one, and their `units` [O, 1 or 2] of dtype.

    side: `scale` [O, G] f32, not negative, and perhaps `offset` [O, G] f32. weight_OI f32 is to become levels * scale +
    offset; each row takes the units, and each group the codes, with the least weighted squared error.
    """
    parts, threads = tuple(side), torch.get_num_threads()
    ends = [bounds(bits, signed=part == "offset") for part in parts]
    best: dict[str, Tensor] = {}
    least_O = torch.full((len(weight_OI), 1), torch.inf, dtype=torch.float64)
    for shares in product(SHARES, repeat=len(parts)):
        units_OU = torch.cat(
            [
                stored_scale(side[part].abs().amax(1, keepdim=True) * (share / high), dtype)
                for part, share, (_, high) in zip(parts, shares, ends, strict=True)
            ],
            1,
        )
        below = _positions(side, units_OU)
        error_OG = torch.full_like(below["scale"], torch.inf, dtype=torch.float64)
        found = dict(below)
        for steps in product((0, 1), repeat=len(parts)):
            tried = {
                part: (below[part] + step).clamp(low, high)
                for part, step, (low, high) in zip(parts, steps, ends, strict=True)
            }
            values = [tried[part] * units_OU[:, at : at + 1].float() for at, part in enumerate(parts)]
            offset_OG = values[1] if len(values) > 1 else torch.zeros_like(values[0])
            with_OG = codebooks.errors(
                weight_OI, importance, levels, values[0], offset_OG, group_size=group_size, threads=threads
            )
            better_OG = with_OG < error_OG
            error_OG = torch.where(better_OG, with_OG, error_OG)
            found = {part: torch.where(better_OG, tried[part], found[part]) for part in parts}
        error_O1 = error_OG.sum(1, keepdim=True)
        better_O1 = error_O1 < least_O
        least_O = torch.where(better_O1, error_O1, least_O)
        found["units"] = units_OU
        best = {part: torch.where(better_O1, values, best.get(part, values)) for part, values in found.items()}
    return {part: values if part == "units" else _integers(part, values) for part, values in best.items()}


def codes_of(side: Mapping[str, Tensor], units_OU: Tensor) -> dict[str, Tensor]:
    """The codes of scales and offsets that are multiples of their units."""
    ratios = _ratios(side, units_OU)
    return {part: _integers(part, ratio_OG.round()) for part, ratio_OG in ratios.items()}


def _positions(side: Mapping[str, Tensor], units_OU: Tensor) -> dict[str, Tensor]:
    """The codes below each value, as floats."""
    return {part: ratio_OG.floor() for part, ratio_OG in _ratios(side, units_OU).items()}


def _ratios(side: Mapping[str, Tensor], units_OU: Tensor) -> dict[str, Tensor]:
    divisor_OU = torch.where(units_OU == 0, torch.inf, units_OU.float())
    return {part: side[part] / divisor_OU[:, at : at + 1] for at, part in enumerate(side)}


def _integers(part: str, values_OG: Tensor) -> Tensor:
    return values_OG.to(torch.int8 if part == "offset" else torch.uint8)
