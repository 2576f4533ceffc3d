"""Integer grids: a weight is (code - zero point) * scale, with one scale per tensor, row or group of columns.

The scale is rounded to the dtype it is stored in before any code is chosen, so that a code is nearest on the grid that
a reader sees. Groups are contiguous columns and the last one of a row may be short. The alternative, a class per
granularity, would give every method and container three cases where a scale's shape tells them apart.

# O out, I in, G groups of a row (1 when a row or the tensor shares a scale), N columns of a group, K histogram bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from converter.errors import UnsupportedError
from converter.grids import Framed, observers
from converter.grids.parts import check_weights, row_chunks, stored_scale
from converter.grids.plain import DTYPES
from converter.schemes import Granularity, Observer
from quantkernels import scales
from quantkernels.columns import AnyFrame, Frame, Ladder

SAMPLE_WEIGHTS = 1 << 20  # one scale for a tensor is searched on every k-th row, about this many weights


@dataclass(frozen=True, kw_only=True)
class AffineGrid:
    """Codes of 2 to 8 bits; parts: `codes` i8 [O, I], `scale` [O, G] and, when not symmetric, `zero_point` i8 [O, G].

    With granularity "tensor" the scale is [1, 1], with "channel" [O, 1]. Codes are signed (-8 .. 7 at 4 bits), and so
    are the zero points. Only the observer "mse" heeds importance and signed_scale. signed_scale lets a scale be
    negative, so that the one code without a partner can serve either sign; None means where it pays, up to 4 bits: the
    squared error of Gaussian groups of 128 falls by 10 % at 2 bits and by 8 % at 4. Readers multiply by the scale,
    whatever its sign; transformers was seen to. by_size: see quantkernels.scales.
    Raises UnsupportedError for observer "kl" with groups.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    observer: Observer = "mse"
    scale_dtype: str = "F32"
    signed_scale: bool | None = None
    by_size: bool = True

    def __post_init__(self) -> None:
        assert 2 <= self.bits <= 8 and self.scale_dtype in DTYPES
        assert (self.group_size is not None) == (self.granularity == "group"), "a group size belongs to groups"
        if self.observer == "kl" and self.granularity == "group":
            what = f"observer kl reads a histogram of {observers.BINS} bins; {self.group_size} weights cannot fill it"
            raise UnsupportedError(self.name, what, "Choose observer mse, or granularity channel or tensor")

    @property
    def name(self) -> str:
        where = f"g{self.group_size}" if self.granularity == "group" else self.granularity
        return f"int{self.bits} {where}" + ("" if self.symmetric else " asym")

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def columns_per_scale(self, columns: int) -> int:
        """How many of a row's `columns` share a scale."""
        return self.group_size or columns

    def encode(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts of `weight` [O, I] or [I] f32, each value rounded to nearest on the fitted grid."""
        params = self.fit(weight, importance)
        return {"codes": self.round(weight, params), **params}

    def decode(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight [O, I] f32 that a reader of these parts computes with."""
        codes_OI = parts["codes"]
        columns = codes_OI.shape[1]
        scale_OG, zero_OG = per_row(parts, len(codes_OI))

        def chunk(rows: slice) -> Tensor:
            steps_OGN = observers.grouped(codes_OI[rows].float(), self.columns_per_scale(columns))
            weight_OGN = (steps_OGN - zero_OG[rows, :, None]).mul_(scale_OG[rows, :, None])
            return weight_OGN.flatten(1)[:, :columns]

        return torch.cat([chunk(rows) for rows in row_chunks(codes_OI)])

    def framed(self, parts: Mapping[str, Tensor]) -> Framed:
        """The parts with their codes set apart; rows and groups may have other scales of the type that is stored."""
        rows, columns = parts["codes"].shape
        scale_OG, zero_OG = per_row(parts, rows)
        size, dtype = self.columns_per_scale(columns), DTYPES[self.scale_dtype]
        shared = self.granularity == "tensor"  # one scale for all rows, which are solved some at a time
        frame = Frame(
            scale_OG=scale_OG,
            zero_OG=zero_OG,
            offset_OG=torch.zeros(1, 1).expand_as(scale_OG),
            group_size=size,
            low=self.low,
            high=self.high,
            scales=None if shared else Ladder(unit_OG=scale_OG, group_size=size, dtype=dtype),
        )

        def with_frame(new: AnyFrame, codes: Tensor) -> Mapping[str, Tensor]:
            return {**parts, "codes": codes} | ({} if shared else {"scale": new.scale_OG.to(dtype)})

        return Framed(frame=frame, with_frame=with_frame)

    def round(self, weight: Tensor, params: Mapping[str, Tensor]) -> Tensor:
        """The codes [O, I] i8 nearest to `weight` [O, I] or [I] f32; where the scale is 0, the codes that mean 0."""
        weight_OI = weight.reshape(-1, weight.shape[-1])
        columns = weight_OI.shape[1]
        scale_OG, zero_OG = per_row(params, len(weight_OI))
        divisor_OG = torch.where(scale_OG == 0, torch.inf, scale_OG)

        def chunk(rows: slice) -> Tensor:
            weight_OGN = observers.grouped(weight_OI[rows], self.columns_per_scale(columns))
            steps_OGN = (weight_OGN / divisor_OG[rows, :, None]).round_().add_(zero_OG[rows, :, None])
            return steps_OGN.clamp_(self.low, self.high).to(torch.int8).flatten(1)[:, :columns]

        return torch.cat([chunk(rows) for rows in row_chunks(weight_OI)])

    def borders(self, params: Mapping[str, Tensor]) -> Tensor:
        """Where, with one positive scale a row, the first code begins and where each code ends: [O, codes + 1] f32."""
        scale_O1, zero_O1 = per_row(params, len(params["scale"]))
        return (torch.arange(self.low, self.high + 2) - 0.5 - zero_O1) * scale_O1

    def fit(self, weight: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The parts `scale` (and `zero_point`) for `weight` [O, I] or [I] f32; importance [I], not negative, or None.

        A group of zeros gets scale 0; another group only when its weights are too small for f32 to hold their step.
        Raises NumericsError when a weight is not finite.
        """
        weight_OI = weight.reshape(-1, weight.shape[-1])
        check_weights(weight_OI)
        if self.observer == "mse":
            return self._least_error(weight_OI, importance)
        # To these observers a whole tensor is one long row.
        rows_ON = weight_OI.reshape(1, -1) if self.granularity == "tensor" else weight_OI
        if self.observer == "kl":
            return _joined([self._least_divergence(rows_ON[rows]) for rows in row_chunks(rows_ON)])
        return self._of_ranges(rows_ON)

    def _of_ranges(self, weight_OI: Tensor) -> Mapping[str, Tensor]:
        """The parameters that minmax or percentile gives."""

        def chunk(rows: slice) -> Mapping[str, Tensor]:
            weight_OGN = observers.grouped(weight_OI[rows], self.columns_per_scale(weight_OI.shape[1]))
            if self.observer == "percentile":
                return self._of_range(*observers.percentile(weight_OGN, self.symmetric))
            return self._of_range(*observers.minmax(weight_OGN))

        return _joined([chunk(rows) for rows in row_chunks(weight_OI)])

    def _of_range(self, minimum_OG: Tensor, maximum_OG: Tensor) -> Mapping[str, Tensor]:
        """The parameters whose codes just cover these ranges, which include 0: no value inside is off by more than half
        a step. Source: the formulas of compressed-tensors."""
        steps = self.high - self.low
        if self.symmetric:
            return {"scale": self._stored(torch.maximum(maximum_OG, -minimum_OG) / (steps / 2))}
        scale_OG = self._stored(maximum_OG / steps - minimum_OG / steps)
        wide_OG = scale_OG.float()
        below_OG = (minimum_OG / torch.where(wide_OG == 0, torch.inf, wide_OG)).round()
        return {"scale": scale_OG, "zero_point": (self.low - below_OG).clamp(self.low, self.high).to(torch.int8)}

    def _stored(self, scale_OG: Tensor) -> Tensor:
        return stored_scale(scale_OG, DTYPES[self.scale_dtype])

    def _least_divergence(self, weight_ON: Tensor) -> Mapping[str, Tensor]:
        """The parameters [O, 1] of the share of minmax's range with the least KL divergence; the widest of equals."""
        found = observers.histogram(weight_ON)
        minimum_O1, maximum_O1 = observers.minmax(weight_ON[:, None, :])
        best: dict[str, Tensor] = dict(self._of_range(minimum_O1, maximum_O1))
        least_O1 = torch.full((len(weight_ON), 1), torch.inf, dtype=torch.float64)
        for percent in range(100, 30, -1):
            params = self._of_range(minimum_O1 * (percent / 100), maximum_O1 * (percent / 100))
            divergence_O1 = observers.divergence(found, self.borders(params))[:, None]
            better_O1 = divergence_O1 < least_O1
            least_O1 = torch.where(better_O1, divergence_O1, least_O1)
            best = {part: torch.where(better_O1, params[part], best[part]) for part in best}
        return best

    def _least_error(self, weight_OI: Tensor, importance: Tensor | None) -> Mapping[str, Tensor]:
        """The searched parameters, and minmax's for each group where rounding the scale for storage undid the gain."""
        columns = weight_OI.shape[1]
        searched_OI, share_I, group_size = weight_OI, importance, self.columns_per_scale(columns)
        if self.granularity == "tensor":
            sample_OI = weight_OI[:: max(1, weight_OI.numel() // SAMPLE_WEIGHTS)]
            searched_OI = sample_OI.reshape(1, -1)
            share_I = None if importance is None else importance.repeat(len(sample_OI))
            group_size = searched_OI.shape[1]
        scale_OG, zero_OG = scales.search(
            searched_OI,
            share_I,
            group_size=group_size,
            low=self.low,
            high=self.high,
            symmetric=self.symmetric,
            signed=self.symmetric and self._signed(),
            by_size=self.by_size,
            threads=torch.get_num_threads(),
        )
        searched: dict[str, Tensor] = {"scale": self._stored(scale_OG)}
        if not self.symmetric:
            searched["zero_point"] = zero_OG
        plain = replace(self, observer="minmax").fit(weight_OI, None)
        worse = self._errors(weight_OI, importance, searched) > self._errors(weight_OI, importance, plain)
        return {part: torch.where(worse, plain[part], searched[part]) for part in searched}

    def _signed(self) -> bool:
        return self.bits <= 4 if self.signed_scale is None else self.signed_scale

    def _errors(self, weight_OI: Tensor, importance: Tensor | None, params: Mapping[str, Tensor]) -> Tensor:
        """The weighted squared error f64 of rounding to nearest, in the shape of the scale."""
        scale_OG, zero_OG = per_row(params, len(weight_OI))
        error_OG = scales.errors(
            weight_OI,
            importance,
            scale_OG,
            zero_OG,
            group_size=self.columns_per_scale(weight_OI.shape[1]),
            low=self.low,
            high=self.high,
            by_size=self.by_size,
            threads=torch.get_num_threads(),
        )
        return error_OG.sum().reshape(1, 1) if self.granularity == "tensor" else error_OG


def per_row(parts: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero point (0 when symmetric) as f32 [O, G], also where the whole tensor shares one scale."""
    scale_OG = parts["scale"].float().expand(rows, -1)
    if "zero_point" not in parts:
        return scale_OG, torch.zeros(1, 1).expand_as(scale_OG)
    return scale_OG, parts["zero_point"].float().expand(rows, -1)


def _joined(params: list[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    return {part: torch.cat([some[part] for some in params]) for part in params[0]}
