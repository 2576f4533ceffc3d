"""What a server does to the inputs of a quantized linear, simulated: an artifact is measured as it will be run."""

# I columns of a token, G groups of them

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from converter.schemes import Activations

FP8_MAX = 448.0  # of float8_e4m3fn
FP4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1
FP4_MAX = FP4_LEVELS[-1]
FP4_EXPONENT = 2  # of the largest level
NEXT_POWER = 0.875
FP8_EXPONENT = 8  # of 256, the largest power of two that E4M3 holds


def quantize_inputs(hidden: Tensor, activations: Activations) -> Tensor:
    """`hidden` [..., I] f32 as the linear behind it reads it, rounded to the grid of `activations`.

    Integers: -2^(b-1) to 2^(b-1)-1 with scale = max|x| / ((2^b - 1) / 2), so 127.5 at 8 bits. FP8: scale = max|x| /
    448. NVFP4: groups of 16 whose fp8 scales are in units of activations.largest / (6 * 448). MX: a power of two for
    32. Zeros stay zeros. A group size that does not divide I leaves a shorter last group. A static range has one scale
    and, where it is not symmetric, one zero point (see `fixed_scale`).
    Source: compressed-tensors 0.20, quantization/utils/helpers.py (calculate_qparams), utils/mxfp_utils.py.
    """
    if activations.static and activations.scale == "float":
        scale, zero = fixed_scale(activations)
        return (_nearest(hidden / scale + zero, activations) - zero) * scale
    columns = hidden.shape[-1]
    size = activations.group_size or columns
    padded = torch.nn.functional.pad(hidden, (0, -columns % size))
    grouped = padded.reshape(*hidden.shape[:-1], -1, size)
    range_G1 = grouped.abs().amax(-1, keepdim=True)
    scale_G1 = _scale(range_G1, activations)
    scale_G1 = torch.where(scale_G1 == 0, torch.finfo(scale_G1.dtype).eps, scale_G1)
    rounded = _nearest(grouped / scale_G1, activations) * scale_G1
    return rounded.reshape(*hidden.shape[:-1], -1)[..., :columns]


def fixed_scale(activations: Activations) -> tuple[float, int]:
    """The scale of a static range of integers or fp8, and its zero point; codes mean (code - zero point) * scale.

    Both are f32's: what a file holds is what is computed with. A range without extent has the smallest scale.
    """
    low, high = -(1 << (activations.bits - 1)), (1 << (activations.bits - 1)) - 1
    extent = torch.tensor(activations.largest if activations.symmetric else activations.largest - activations.lowest)
    scale = _scale(extent, activations) if activations.symmetric else extent / (high - low)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    if activations.symmetric:
        return float(scale), 0
    return float(scale), int((low - activations.lowest / scale).round().clamp(low, high))


def fixed_range(activations: Activations, scale: float, zero_point: int = 0) -> Activations:
    """`activations` with the range that this scale and zero point, read from a file, give them."""
    if activations.values != "int":
        return replace(activations, lowest=-FP8_MAX * scale, largest=FP8_MAX * scale)
    half = 1 << (activations.bits - 1)
    if activations.symmetric:
        return replace(activations, lowest=-(half - 0.5) * scale, largest=(half - 0.5) * scale)
    return replace(activations, lowest=(-half - zero_point) * scale, largest=(half - 1 - zero_point) * scale)


def fixed_levels(activations: Activations) -> Tensor:
    """What a static range of integers or fp8 can hold: f64, rising."""
    scale, zero = fixed_scale(activations)
    if activations.values == "int":
        half = 1 << (activations.bits - 1)
        return (torch.arange(-half, half, dtype=torch.float64) - zero) * scale
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return codes[codes.isfinite()].unique() * scale  # type: ignore[no-untyped-call,no-any-return]


def _scale(range_G1: Tensor, activations: Activations) -> Tensor:
    if activations.values == "int":
        return range_G1 / (((1 << activations.bits) - 1) / 2)
    top, exponent = (FP4_MAX, FP4_EXPONENT) if activations.values == "e2m1" else (FP8_MAX, FP8_EXPONENT)
    if activations.scale == "power of two":
        mantissa_G1, power_G1 = torch.frexp(range_G1)  # from 1/2 to 1; from 7/8 on the next power is nearer
        return torch.ldexp(torch.ones_like(range_G1), power_G1 - 1 + (mantissa_G1 >= NEXT_POWER) - exponent)
    if activations.scale == "fp8":
        unit = (activations.largest or 1.0) / (top * FP8_MAX)
        return (range_G1 / top / unit).clamp(max=FP8_MAX).to(torch.float8_e4m3fn).to(range_G1.dtype) * unit
    return range_G1 / top


def _nearest(steps: Tensor, activations: Activations) -> Tensor:
    if activations.values == "int":
        half = 1 << (activations.bits - 1)
        return steps.round().clamp(-half, half - 1)
    if activations.values == "e4m3":
        return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(steps.dtype)
    return nearest_fp4(steps)


def nearest_fp4(steps: Tensor) -> Tensor:
    """The level of E2M1 nearest to each value, of two as near the one with the even code; beyond the largest, that."""
    levels = torch.tensor(FP4_LEVELS, dtype=steps.dtype, device=steps.device)
    middles = (levels[1:] + levels[:-1]) / 2
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros_like(middles[1::2]))  # so that these go up
    return levels[torch.bucketize(steps.abs(), middles)].copysign(steps)
