"""The launches that find the scales and codes of each family of types; packing comes after them, in `gpu.py`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from quantkernels.ggml.gpu.launch import Launch, Slab
from quantkernels.ggml.gpu.levels import levels_kernel
from quantkernels.ggml.gpu.plain import (
    mxfp4_kernel,
    nvfp4_kernel,
    range_kernel,
    searched_scale_kernel,
    ternary_kernel,
)
from quantkernels.ggml.gpu.round import (
    float4_codes_kernel,
    half_away_codes_kernel,
    level_codes_kernel,
    range_codes_kernel,
    scale_min_codes_kernel,
    symmetric_codes_kernel,
)
from quantkernels.ggml.gpu.scales import (
    fit_scales_kernel,
    iq4_xs_scales_kernel,
    q3_k_scales_kernel,
    q6_k_scales_kernel,
    scale_min_fields_kernel,
)
from quantkernels.ggml.gpu.search import (
    descent_kernel,
    mean_square_kernel,
    scale_min_kernel,
    symmetric_kernel,
)
from quantkernels.ggml.layout import SUPER_BLOCK
from quantkernels.ggml.reference import ALONE, WITH_IMPORTANCE
from quantkernels.ggml.reference.search import Steps

# What a search weighs by, as `gpu_search.weights_of` names it.
SQUARE = "square"
SIZE = "size"
ROOT_AND_SIZE = "root mean square + size"
IMPORTANCE = "importance"
IMPORTANCE_ROOT = "importance * root"


@dataclass(frozen=True, kw_only=True)
class Search:
    """The launches of a search and what they find, [lines, sub-blocks] f32."""

    launches: tuple[Launch, ...]
    found: torch.Tensor

    @property
    def subs(self) -> int:
        return self.found.shape[1]


@dataclass(frozen=True, kw_only=True)
class _Weighing:
    """The arguments from which a kernel makes search weights; importance and means are any tensor where unused."""

    launches: tuple[Launch, ...]
    importance: torch.Tensor
    means: torch.Tensor
    span: int


def _weighing(slab: Slab, weights: str) -> _Weighing:
    if slab.importance is None or weights != IMPORTANCE_ROOT:
        importance = slab.rows if slab.importance is None else slab.importance
        return _Weighing(launches=(), importance=importance, means=slab.rows, span=1)
    known = slab.known
    of_rows = known.weights == 32 and known.name != "IQ4_NL"
    span = slab.rows.shape[1] if of_rows else known.weights
    # 2 * sum / n for most super-blocks, sum * (2 / n) for IQ4: they differ where 2 * sum is infinite.
    factor = 2.0 if known.name in ("Q3_K", "Q4_K", "Q5_K") else 1.0
    divisor = span / 2 if known.name.startswith("IQ4") else float(span)
    means = slab.found(1, span)
    launch = Launch(kernel=mean_square_kernel, arguments=(slab.rows, means, span, factor, divisor), count=means.numel())
    return _Weighing(launches=(launch,), importance=slab.importance, means=means, span=span)


def _search_scale_min(slab: Slab, steps: Steps, weights: str, top: int, size: int) -> Search:
    weighing = _weighing(slab, weights)
    first, width, high = np.float32(steps.first), np.float32(steps.width), np.float32(top)
    trials = slab.floats([high, *(first + width * np.float32(step) + high for step in range(steps.count + 1))])
    found = slab.found(5, size)
    launch = Launch(
        kernel=scale_min_kernel,
        arguments=(
            slab.rows,
            weighing.importance,
            weighing.means,
            trials,
            found,
            slab.rows.shape[1],
            weighing.span,
        ),
        count=found.shape[1],
        constants={
            "TRIALS": trials.numel(),
            "WEIGHTS": weights,
            "TOP": float(top),
            "ABSOLUTE": steps.absolute,
            "BOUNDED": steps.bounded,
            "N": size,
        },
    )
    return Search(launches=(*weighing.launches, launch), found=found)


def _symmetric_trials(slab: Slab, limit: int) -> torch.Tensor:
    steps = (0, *range(-9, 0), *range(1, 10))
    return slab.floats(-(np.float32(limit) + np.float32(0.1) * np.float32(step)) for step in steps)


def _search_symmetric(slab: Slab, weights: str, limit: int, size: int) -> Search:
    weighing = _weighing(slab, weights)
    found = slab.found(3, size)
    launch = Launch(
        kernel=symmetric_kernel,
        arguments=(
            slab.rows,
            weighing.importance,
            weighing.means,
            _symmetric_trials(slab, limit),
            found,
            slab.rows.shape[1],
            weighing.span,
        ),
        count=found.shape[1],
        constants={"WEIGHTS": weights, "LOW": float(-limit), "HIGH": float(limit - 1), "N": size},
    )
    return Search(launches=(*weighing.launches, launch), found=found)


def _scale_min_codes(slab: Slab, search: Search, bits: int, size: int, bounded: bool) -> Launch:
    return Launch(
        kernel=scale_min_codes_kernel,
        arguments=(slab.rows, search.found, slab.out, slab.codes, search.subs),
        count=slab.rows.numel(),
        constants={
            "BITS": bits,
            "TOP": float((1 << bits) - 1),
            "BOUNDED": bounded,
            "SUPER": slab.known.weights == SUPER_BLOCK,
            "N": size,
        },
    )


def _symmetric_codes(slab: Slab, search: Search, limit: int, size: int, descent: bool) -> Launch:
    return Launch(
        kernel=symmetric_codes_kernel,
        arguments=(slab.rows, search.found, slab.out, slab.codes, search.subs),
        count=slab.rows.numel(),
        constants={
            "NAME": slab.known.name,
            "LOW": float(-limit),
            "HIGH": float(limit - 1),
            "DESCENT": descent,
            "N": size,
        },
    )


def scale_min_k(slab: Slab) -> list[Launch]:
    """Q2_K, Q4_K and Q5_K."""
    bits, weighed = int(slab.known.name[1]), slab.importance is not None
    size, limit = (16, 15) if bits == 2 else (32, 63)
    weights = IMPORTANCE_ROOT if weighed else (SIZE if bits == 2 else ROOT_AND_SIZE)
    steps = WITH_IMPORTANCE if weighed else ALONE[slab.known.name]
    search = _search_scale_min(slab, steps, weights, (1 << bits) - 1, size)
    deltas = (-4, -3, -2, -1, 1, 2, 3, 4)
    trials = slab.floats(np.float32(0.1) * np.float32(delta) + np.float32(limit) for delta in deltas)
    count = SUPER_BLOCK // size
    fitted = slab.found(2, SUPER_BLOCK)
    fields = torch.empty(2 * slab.blocks * count, dtype=torch.uint8, device=slab.rows.device)
    fit = Launch(
        kernel=fit_scales_kernel,
        arguments=(search.found, trials, fitted, fields),
        count=fitted.numel(),
        constants={"WEIGHED": weighed, "LIMIT": float(limit), "N": count},
    )
    scales = Launch(
        kernel=scale_min_fields_kernel,
        arguments=(fitted, fields, slab.out),
        count=slab.blocks,
        constants={"BITS": bits, "N": count},
    )
    return [*search.launches, fit, scales, _scale_min_codes(slab, search, bits, size, weighed)]


def q6_k(slab: Slab) -> list[Launch]:
    """Q6_K, which takes importance as it is."""
    search = _search_symmetric(slab, SQUARE if slab.importance is None else IMPORTANCE, 32, 16)
    scales = Launch(kernel=q6_k_scales_kernel, arguments=(search.found, slab.out), count=slab.blocks)
    return [*search.launches, scales, _symmetric_codes(slab, search, 32, 16, False)]


def q3_k(slab: Slab) -> list[Launch]:
    """Q3_K, which descends coordinate by coordinate without importance and searches with it."""
    weighed = slab.importance is not None
    if weighed:
        search = _search_symmetric(slab, IMPORTANCE_ROOT, 4, 16)
    else:
        found = slab.found(1, 16)
        descent = Launch(
            kernel=descent_kernel,
            arguments=(slab.rows, found, slab.codes),
            count=found.numel(),
            constants={"LOW": -4.0, "HIGH": 3.0, "N": 16},
        )
        search = Search(launches=(descent,), found=found)
    scales = Launch(
        kernel=q3_k_scales_kernel,
        arguments=(search.found, _symmetric_trials(slab, 32), slab.out),
        count=slab.blocks,
        constants={"WEIGHED": weighed},
    )
    return [*search.launches, scales, _symmetric_codes(slab, search, 4, 16, not weighed)]


def iq4(slab: Slab) -> list[Launch]:
    """IQ4_NL and IQ4_XS."""
    weights = SQUARE if slab.importance is None else IMPORTANCE_ROOT
    weighing = _weighing(slab, weights)
    found = slab.found(2, 32)
    trials = slab.floats(np.float32(step - 127) for step in (0, *range(-7, 8)))  # the first has its own rounding
    arguments = (slab.rows, weighing.importance, weighing.means, trials, found, slab.rows.shape[1], weighing.span)
    search = Launch(
        kernel=levels_kernel,
        arguments=arguments,
        count=found.shape[1],
        constants={"WEIGHTS": weights, "N": 32},
    )
    if slab.known.name == "IQ4_XS":
        scales = Launch(kernel=iq4_xs_scales_kernel, arguments=(found, slab.out), count=slab.blocks)
    else:
        scales = _searched_scale(slab, found, False)
    codes = Launch(
        kernel=level_codes_kernel,
        arguments=(slab.rows, found, slab.codes, found.shape[1]),
        count=slab.rows.numel(),
    )
    return [*weighing.launches, search, scales, codes]


def _searched_scale(slab: Slab, found: torch.Tensor, minimum: bool) -> Launch:
    return Launch(
        kernel=searched_scale_kernel,
        arguments=(found, slab.out),
        count=slab.blocks,
        constants={"MINIMUM": minimum, "BYTES": slab.known.size_bytes},
    )


def legacy_by_search(slab: Slab) -> list[Launch]:
    """Q4_0, Q4_1, Q5_0 and Q5_1 with importance."""
    bits, minimum = int(slab.known.name[1]), slab.known.name.endswith("_1")
    if minimum:
        search = _search_scale_min(slab, WITH_IMPORTANCE, IMPORTANCE_ROOT, (1 << bits) - 1, 32)
        codes = _scale_min_codes(slab, search, bits, 32, True)
    else:
        search = _search_symmetric(slab, IMPORTANCE_ROOT, 1 << (bits - 1), 32)
        codes = _symmetric_codes(slab, search, 1 << (bits - 1), 32, False)
    return [*search.launches, _searched_scale(slab, search.found, minimum), codes]


def legacy_by_range(slab: Slab) -> list[Launch]:
    """Q4_0, Q4_1, Q5_0 and Q5_1 without importance."""
    bits, minimum = int(slab.known.name[1]), slab.known.name.endswith("_1")
    top, middle = (1 << bits) - 1, 1 << (bits - 1)
    found = slab.found(2, 32)
    scales = Launch(
        kernel=range_kernel,
        arguments=(slab.rows, found, slab.out),
        count=slab.blocks,
        constants={
            "DIVISOR": float(top if minimum else -middle),
            "MINIMUM": minimum,
            "BYTES": slab.known.size_bytes,
        },
    )
    codes = Launch(
        kernel=range_codes_kernel,
        arguments=(slab.rows, found, slab.codes, slab.blocks),
        count=slab.rows.numel(),
        constants={"SHIFT": 0.5 if minimum else middle + 0.5, "TOP": top},
    )
    return [scales, codes]


def half_away(slab: Slab) -> list[Launch]:
    """Q8_0, TQ1_0 and TQ2_0: the largest magnitude, then rounding half away from 0."""
    size, known = slab.known.weights, slab.known
    found = slab.found(2, size)
    ternary = known.name != "Q8_0"
    constants = (
        {"BYTES": known.size_bytes} if ternary else {"DIVISOR": 127.0, "MINIMUM": False, "BYTES": known.size_bytes}
    )
    scales = Launch(
        kernel=ternary_kernel if ternary else range_kernel,
        arguments=(slab.rows, found, slab.out),
        count=slab.blocks,
        constants=constants,
    )
    codes = Launch(
        kernel=half_away_codes_kernel,
        arguments=(slab.rows, found, slab.codes),
        count=slab.rows.numel(),
        constants={"N": size, "SHIFT": 1 if ternary else 0},
    )
    return [scales, codes]


def float4(slab: Slab) -> list[Launch]:
    """MXFP4 and NVFP4."""
    kernel, size = (mxfp4_kernel, 32) if slab.known.name == "MXFP4" else (nvfp4_kernel, 16)
    scales = Launch(kernel=kernel, arguments=(slab.rows, slab.out), count=slab.rows.numel() // size)
    codes = Launch(
        kernel=float4_codes_kernel,
        arguments=(slab.rows, slab.out, slab.codes),
        count=slab.rows.numel(),
        constants={"NAME": slab.known.name},
    )
    return [scales, codes]
