"""What calibration remembers of a tap: sums over every row that passed through it, never the rows themselves.

The sums serve every method at once: RTN and imatrix read `sum_squares`, AWQ `abs_sum`, SmoothQuant `abs_max`, static
activation scales `minimum`, `maximum` and `histogram`, GPTQ `gram`; of a target's own chain `drift` tells how far its
rows are from the original's. They add up, so rows can be sharded, and they follow a column scale, so a fold needs no
second forward. The alternative, keeping the rows, is needed only by gradient methods and costs sequences x length x
columns per tap.
"""

# N rows (tokens), I columns (input features of the tap's linears)
from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from converter import histogram
from converter.errors import NumericsError
from quantkernels import gram as grams
from quantkernels import sums, symmetric

# Columns per accumulation step. It fixes the shapes of the matrix products, hence the bits of the result, so it must
# not follow the number of workers. Only the part right of each stripe's left edge is computed: half the work.
STRIPE_COLUMNS = 512
# Columns of a product in f32 within a step on a CPU: narrower ones take less of what lies below the diagonal. A sixth
# faster than whole stripes at 1024 columns, 6 % at 2816; a GPU would rather have few products.
PRODUCT_COLUMNS = 128
# What takes far more room than all the rest, and is left in its file by who does not need it.
LARGE = ("gram", "drift", "histogram")
Counted = Literal["tap", "column"]  # what a histogram is of


@dataclass(frozen=True, kw_only=True)
class TapStats:
    """Sums over the N = `rows` rows x of one tap.

    sum_squares, abs_sum [I] f64; abs_max, minimum, maximum [I] f32; gram [I, I] f32 is the sum of x x^T, None when it
    was not asked for. diag(gram) equals sum_squares to f32 rounding; where linears multiply in bf16 on a CPU that sums
    such products in f32, gram is of what they read, x rounded to bf16, and its diagonal within 2^-7 of sum_squares.
    drift [I, I] f32 is the sum of (o - x) x^T, the original having the row o for x; None when it was not asked for. The
    sum of o x^T is gram + drift, but rows that are alike make a drift of zeros, where two large sums would leave their
    rounding. histogram i64 [1, B], or [I, B] where each column is counted apart: how many values each bin of
    converter.histogram holds; None when it was not asked for.
    Raises NumericsError when any of it is not finite.
    """

    rows: int
    sum_squares: Tensor
    abs_sum: Tensor
    abs_max: Tensor
    minimum: Tensor
    maximum: Tensor
    gram: Tensor | None = None
    drift: Tensor | None = None
    histogram: Tensor | None = None

    def __post_init__(self) -> None:
        columns = len(self.sum_squares)
        finite = torch.isfinite(self.sum_squares) & torch.isfinite(self.abs_max)
        if self.gram is not None:
            assert self.gram.shape == (columns, columns)
            finite &= torch.isfinite(self.gram.diagonal())
        if self.drift is not None:
            assert self.drift.shape == (columns, columns)
            finite &= torch.isfinite(self.drift.diagonal())
        broken = columns - int(finite.sum())
        if broken:
            raise NumericsError(
                "activation statistics",
                f"{broken} of {columns} columns are not finite over {self.rows} rows",
                "Check the model's weights for overflow, or set calibration.skip_bad_rows",
            )

    def __add__(self, other: TapStats) -> TapStats:
        """The statistics of both sets of rows together, associative up to rounding; what either one lacks is None."""
        return TapStats(
            rows=self.rows + other.rows,
            sum_squares=self.sum_squares + other.sum_squares,
            abs_sum=self.abs_sum + other.abs_sum,
            abs_max=torch.maximum(self.abs_max, other.abs_max),
            minimum=torch.minimum(self.minimum, other.minimum),
            maximum=torch.maximum(self.maximum, other.maximum),
            gram=_sum(self.gram, other.gram),
            drift=_sum(self.drift, other.drift),
            histogram=_sum(self.histogram, other.histogram),
        )

    def scaled(self, column_scale: Tensor) -> TapStats:
        """The statistics of x / column_scale: what a tap sees once a norm absorbed 1 / column_scale.

        column_scale [I], none of it 0. With D = diag(column_scale): gram' = D^-1 gram D^-1, and drift' likewise, since
        the original's rows go through the same norm. A histogram of the whole tap cannot follow and is None afterwards;
        one of each column follows to within a bin, see histogram.divided.
        """
        assert bool((column_scale != 0).all()), "columns are divided by their scales"
        wide, narrow = column_scale.double(), column_scale.float()
        ends = self.minimum / narrow, self.maximum / narrow
        return TapStats(
            rows=self.rows,
            sum_squares=self.sum_squares / wide.square(),
            abs_sum=self.abs_sum / wide.abs(),
            abs_max=self.abs_max / narrow.abs(),
            minimum=torch.minimum(*ends),
            maximum=torch.maximum(*ends),
            gram=None if self.gram is None else (self.gram / narrow[:, None]).div_(narrow),
            drift=None if self.drift is None else (self.drift / narrow[:, None]).div_(narrow),
            histogram=self._divided_histogram(column_scale),
        )

    def _divided_histogram(self, column_scale: Tensor) -> Tensor | None:
        if self.histogram is None or bool((column_scale == 1).all()):
            return self.histogram
        return histogram.divided(self.histogram, column_scale) if len(self.histogram) == len(column_scale) else None

    def reordered(self, order_I: Tensor) -> TapStats:
        """The statistics of x[order_I], the columns of x in another order."""
        counted = self.histogram is not None and len(self.histogram) == len(order_I)
        return TapStats(
            rows=self.rows,
            sum_squares=self.sum_squares[order_I],
            abs_sum=self.abs_sum[order_I],
            abs_max=self.abs_max[order_I],
            minimum=self.minimum[order_I],
            maximum=self.maximum[order_I],
            gram=None if self.gram is None else self.gram[order_I][:, order_I],
            drift=None if self.drift is None else self.drift[order_I][:, order_I],
            histogram=self.histogram[order_I] if self.histogram is not None and counted else self.histogram,
        )

    def turned(self, turn: Callable[[Tensor], Tensor], vectors: int = 1) -> TapStats:
        """The statistics of x R; `turn` multiplies rows [N, I] by an orthogonal R that turns each of `vectors` parts.

        gram' = R^T gram R, and drift' likewise. Sums of squares are its diagonal; without a gram every column has the
        mean of its part, which random signs in R make the expectation. What R does to a largest value or to a sum of
        magnitudes cannot be known: those become bounds, from the length that no row's part exceeds.
        """
        gram = None if self.gram is None else turn(turn(self.gram).T)
        parts = self.sum_squares.reshape(vectors, -1)
        squares = parts.mean(1, keepdim=True).expand_as(parts).flatten() if gram is None else gram.diagonal().double()
        length = self.abs_max.double().reshape(vectors, -1).square().sum(1, keepdim=True).sqrt()
        largest = length.expand_as(parts).flatten().float()
        return TapStats(
            rows=self.rows,
            sum_squares=squares.clamp(min=0),
            abs_sum=(self.rows * squares.clamp(min=0)).sqrt(),
            abs_max=largest,
            minimum=-largest,
            maximum=largest,
            gram=gram,
            drift=None if self.drift is None else turn(turn(self.drift).T).T.contiguous(),
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """These statistics as named tensors for a file; of the symmetric gram only the upper triangle, row by row."""
        tensors = {
            "rows": torch.tensor([self.rows], dtype=torch.int64),
            "sum_squares": self.sum_squares,
            "abs_sum": self.abs_sum,
            "abs_max": self.abs_max,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }
        if self.gram is not None:
            tensors["gram_upper"] = symmetric.pack(self.gram)
        if self.drift is not None:
            tensors["drift"] = self.drift
        if self.histogram is not None:
            tensors["histogram"] = self.histogram
        return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> TapStats:
    """The statistics that `TapStats.to_tensors` wrote, bit for bit."""
    return TapStats(
        rows=int(tensors["rows"]),
        sum_squares=tensors["sum_squares"],
        abs_sum=tensors["abs_sum"],
        abs_max=tensors["abs_max"],
        minimum=tensors["minimum"],
        maximum=tensors["maximum"],
        gram=symmetric.unpack(tensors["gram_upper"], len(tensors["abs_max"])) if "gram_upper" in tensors else None,
        drift=tensors.get("drift"),
        histogram=tensors.get("histogram"),
    )


def pack(stats: Mapping[str, TapStats]) -> dict[str, Tensor]:
    """The statistics of several taps as one flat set of tensors named "tap/field"."""
    return {f"{tap}/{field}": tensor for tap, one in stats.items() for field, tensor in one.to_tensors().items()}


def unpack(tensors: Mapping[str, Tensor], large: Collection[str] = LARGE) -> dict[str, TapStats]:
    """What `pack` packed, by tap name; a mapping that reads lazily is read one tap after another.

    large: which of LARGE to take along; the others stay where they are.
    """
    taps: dict[str, dict[str, str]] = {}
    for name in tensors:
        tap, _, field = name.rpartition("/")
        if (one := field.removesuffix("_upper")) not in LARGE or one in large:
            taps.setdefault(tap, {})[field] = name
    return {tap: from_tensors({field: tensors[name] for field, name in names.items()}) for tap, names in taps.items()}


def observe(hidden: Tensor, gram: bool, counted: Counted | None = None) -> TapStats:
    """The statistics of the rows of hidden [N, I]; with `gram` also the sum of x x^T, counted: a histogram of what."""
    collector = Collector(columns=hidden.shape[-1], gram=gram, device=hidden.device, counted=counted)
    collector.add(hidden)
    return collector.stats()


class RowSums:
    """Rows on their way into a Collector, and the sums over each of their columns."""

    def __init__(self, hidden: Tensor) -> None:
        """Sum the rows hidden [N, I]."""
        self.rows = hidden.float().contiguous()
        self.sum_squares, self.abs_sum, self.minimum, self.maximum = sums.of_columns(self.rows)

    def are_finite(self) -> bool:
        """Whether all values of the rows are: no f32 is so large that its square is not, in f64."""
        return bool(torch.isfinite(self.sum_squares).all())


class Collector:
    """Adds rows to one set of buffers in place: memory stays that of one TapStats however many rows come."""

    def __init__(
        self,
        columns: int,
        gram: bool,
        device: torch.device | str = "cpu",
        drift: bool = False,
        counted: Counted | None = None,
        products: torch.dtype = torch.float32,
    ) -> None:
        """products: the type in which linears multiply the rows; bf16 counts on CPUs that sum such products in f32."""
        self.rows = 0
        self.sum_squares = torch.zeros(columns, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros(columns, dtype=torch.float64, device=device)
        self.minimum = torch.full((columns,), torch.inf, device=device)
        self.maximum = torch.full((columns,), -torch.inf, device=device)
        self.gram = torch.zeros(columns, columns, device=device) if gram else None
        self.drift = torch.zeros(columns, columns, device=device) if drift else None
        on_cpu = torch.device(device).type == "cpu"
        self._rounds = gram and on_cpu and products == torch.bfloat16 and grams.available()
        self._product_columns = PRODUCT_COLUMNS if on_cpu else STRIPE_COLUMNS
        # A row for each column, or for each stripe, so that no two steps add to the same counts.
        counted_rows = columns if counted == "column" else -(-columns // STRIPE_COLUMNS) if counted else 0
        self.counts = torch.zeros(counted_rows, histogram.BINS, dtype=torch.int64, device=device)
        self._counted = counted

    def add(self, hidden: Tensor, original: Tensor | None = None) -> None:
        """Add the rows hidden [N, I] in this thread; original as for `steps`."""
        for step in self.steps(RowSums(hidden), original):
            step()

    def steps(self, given: RowSums, original: Tensor | None = None) -> list[Callable[[], None]]:
        """Add the sums of rows [N, I]; the rest are calls for disjoint columns: run all, in any order or at once.

        original [N, I]: the original's rows in the same places, where there is a drift. Calls for the next rows must
        wait until these are done; then the result is the same on any number of threads.
        """
        rows = given.rows
        self.rows += len(rows)
        self.sum_squares += given.sum_squares
        self.abs_sum += given.abs_sum
        self.minimum = torch.minimum(self.minimum, given.minimum)
        self.maximum = torch.maximum(self.maximum, given.maximum)
        away = None
        if self.drift is not None:
            assert original is not None and original.shape == rows.shape, "a drift needs the original's rows"
            away = original.float() - rows
        if self.gram is None and self.drift is None and self._counted is None:
            return []
        starts = range(0, rows.shape[-1], STRIPE_COLUMNS)
        return [lambda start=start: self._add_stripe(rows, away, start) for start in starts]  # type: ignore[misc]

    def stats(self) -> TapStats:
        """The statistics of everything added; the collector's buffers become theirs, so it is not used after this."""
        assert self.rows > 0, "no rows were added"
        if self.gram is not None:
            symmetric.mirror(self.gram)
        return TapStats(
            rows=self.rows,
            sum_squares=self.sum_squares,
            abs_sum=self.abs_sum,
            abs_max=torch.maximum(self.maximum, -self.minimum),
            minimum=self.minimum,
            maximum=self.maximum,
            gram=self.gram,
            drift=self.drift,
            histogram=self._histogram(),
        )

    def _histogram(self) -> Tensor | None:
        if self._counted is None:
            return None
        return self.counts if self._counted == "column" else histogram_of_tap(self.counts)

    def _add_stripe(self, rows: Tensor, away: Tensor | None, start: int) -> None:
        stop = min(start + STRIPE_COLUMNS, rows.shape[-1])
        if self.gram is not None:
            self._add_products(self.gram, rows, start, stop)
        if self.drift is not None and away is not None:
            self.drift[start:stop].addmm_(away[:, start:stop].T, rows)
        if self._counted is not None:
            apart = self._counted == "column"
            places = slice(start, stop) if apart else slice(start // STRIPE_COLUMNS, start // STRIPE_COLUMNS + 1)
            self.counts[places] += histogram.counts(rows[:, start:stop], apart)

    def _add_products(self, gram: Tensor, rows: Tensor, start: int, stop: int) -> None:
        if self._rounds:
            grams.add(gram, rows, start, stop)
            return
        for first in range(start, stop, self._product_columns):
            last = min(first + self._product_columns, stop)
            gram[first:last, first:].addmm_(rows[:, first:last].T, rows[:, first:])


def histogram_of_tap(counts: Tensor) -> Tensor:
    """The counts [1, B] of a whole tap from those of its parts [C, B]: the same, whatever the parts."""
    return counts.sum(0, keepdim=True)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return None
    assert first.shape == second.shape, (first.shape, second.shape)
    return first + second
