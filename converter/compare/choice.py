"""Which artifact to take, worked out from measured figures: the Pareto front and a pick for each common need. Pure.

Loss is the mean KL divergence where the model could be run, or what the cosine of its embeddings lacks of 1 where it
makes those, otherwise the relative error of its weights. A weighted sum of size and loss would give one winner, at the
price of weights that nobody can explain; a front and a few stated rules leave the choice to the reader.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.schemes import SCHEMES


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What loss means: its name and unit, and below which values an artifact counts as near the original, or usable."""

    name: str
    short: str
    unit: str
    near: float
    usable: float


# Of Llama 3 8B, llama.cpp's Q5_K_M loses 0.011 nats and its Q3_K_M 0.10 (llama.cpp, pull request 6936).
KL = Measure(name="mean KL divergence", short="KL", unit="nats per token", near=0.01, usable=0.1)
# 0.01 and 0.1 of a weight's energy: the cosine is then about 0.995 and 0.95.
WEIGHT_ERROR = Measure(
    name="relative squared error of the weights", short="error", unit="a share of their squares", near=0.01, usable=0.1
)

# Q8_0 keeps MiniLM above a cosine of 0.999, which a test holds; the other is ten times as far, as for KL divergence.
EMBEDDING = Measure(
    name="1 − cosine of the embeddings", short="1 − cosine", unit="mean over texts", near=0.001, usable=0.01
)

# Where formats are at home: a phrase for a person who knows the machine but not the formats.
HOMES: Mapping[str, tuple[str, ...]] = {
    "On a CPU, laptop or phone": ("gguf",),
    "On a GPU server": ("compressed-tensors", "gptq", "gptq_v2", "auto-round", "awq", "fp8", "torchao"),
    "For fine-tuning with adapters": ("bitsandbytes",),
    "For data analysis in SQL": ("parquet",),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A finished artifact: its target, size and loss."""

    target: str
    format: str
    scheme: str
    size_bytes: int
    bits_per_weight: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class Pick:
    """The answer to one need: the rule in words, and the artifact that it gives.

    `fits` is False when nothing meets the rule's limit and `chosen` is only the nearest to it.
    """

    need: str
    rule: str
    chosen: Candidate
    fits: bool = True


@dataclass(frozen=True, kw_only=True)
class Fragile:
    """A tensor that rounding hurts: its error in each target, and how many times the target's median that is.

    times is the geometric mean over targets, so that a coarse target does not drown the others.
    """

    name: str
    times: float
    errors: Mapping[str, float]
    times_by_target: Mapping[str, float]


def candidates(rows: Iterable[Mapping[str, Any]]) -> tuple[Measure, tuple[Candidate, ...]]:
    """The finished artifacts of one model, smallest first, and what their loss means; without a finite loss: left out.

    rows are those of comparison.json.
    """
    done = [row for row in rows if row["status"] == "done"]
    measured = {name for row in done for name in row["output"]}
    measure = KL if "kl_mean" in measured else EMBEDDING if "embedding_cosine" in measured else WEIGHT_ERROR
    found = [
        Candidate(
            target=row["target"],
            format=row["format"],
            scheme=row["scheme"] or "",
            size_bytes=row["size_bytes"],
            bits_per_weight=row["bits_per_weight"],
            loss=_loss(measure, row),
        )
        for row in done
    ]
    found = [candidate for candidate in found if math.isfinite(candidate.loss)]
    return measure, tuple(sorted(found, key=lambda candidate: (candidate.size_bytes, candidate.loss, candidate.target)))


def _loss(measure: Measure, row: Mapping[str, Any]) -> float:
    """What a row's artifact loses; NaN where that was not measured."""
    if measure is KL:
        return float(row["output"].get("kl_mean", math.nan))
    if measure is EMBEDDING:
        return 1.0 - float(row["output"].get("embedding_cosine", math.nan))
    return float(row["weight"]["relative_mse"])


def front(found: Sequence[Candidate]) -> frozenset[str]:
    """The targets that no other beats: none is at most as large with at most the loss, and better in one of the two."""

    def beats(one: Candidate, other: Candidate) -> bool:
        pair, against = (one.size_bytes, one.loss), (other.size_bytes, other.loss)
        return pair != against and pair[0] <= against[0] and pair[1] <= against[1]

    return frozenset(one.target for one in found if not any(beats(other, one) for other in found))


def bits_of(scheme: str) -> int | None:
    """The bits of a scheme's codes; of a type of GGUF file the first number in its name: Q4_K_M 4."""
    known = next((schemes[scheme].bits for schemes in SCHEMES.values() if scheme in schemes), None)
    if known is not None:
        return known
    number = re.search(r"\d+", scheme)
    return int(number.group()) if number else None


def picks(measure: Measure, found: Sequence[Candidate]) -> tuple[Pick, ...]:
    """A pick for each need that the artifacts can answer."""
    if not found:
        return ()
    answers = [
        _smallest("Close to the original", "the smallest", found, measure, measure.near),
        _smallest("Small and still usable", "the smallest", found, measure, measure.usable),
    ]
    four = [candidate for candidate in found if bits_of(candidate.scheme) == 4]
    if four:
        rule = f"the lowest {measure.short} among 4-bit schemes"
        answers.append(Pick(need="Best with 4 bits", rule=rule, chosen=min(four, key=lambda item: item.loss)))
    for need, formats in HOMES.items():
        at_home = [candidate for candidate in found if candidate.format in formats]
        if at_home:
            names = " or ".join(dict.fromkeys(candidate.format for candidate in at_home))
            answers.append(_smallest(need, f"the smallest {names}", at_home, measure, measure.near))
    return tuple(answers)


def _smallest(need: str, what: str, found: Sequence[Candidate], measure: Measure, limit: float) -> Pick:
    rule = f"{what} with {measure.short} at most {limit:g}"
    within = [candidate for candidate in found if candidate.loss <= limit]
    if within:
        return Pick(need=need, rule=rule, chosen=min(within, key=lambda item: (item.size_bytes, item.loss)))
    return Pick(need=need, rule=rule, chosen=min(found, key=lambda item: item.loss), fits=False)


def error_key(tensors: Iterable[Mapping[str, Any]]) -> str:
    """Which error of a tensor to go by: that of its output where inputs were at hand, otherwise that of its values."""
    measured = any(tensor["output_relative_mse"] is not None for tensor in tensors)
    return "output_relative_mse" if measured else "relative_mse"


def fragile(tensors: Sequence[Mapping[str, Any]], key: str, count: int = 10) -> tuple[Fragile, ...]:
    """The tensors of one model that rounding hurts most, worst first.

    tensors: rows of tensors.parquet, of all targets; key: see `error_key`. Tensors without an error are left out.
    """
    errors: dict[str, dict[str, float]] = {}  # target -> tensor -> error
    for tensor in tensors:
        error = tensor[key]
        if error is not None and math.isfinite(error) and error > 0:
            errors.setdefault(tensor["target"], {})[tensor["name"]] = error
    medians = {target: statistics.median(found.values()) for target, found in errors.items()}
    names = dict.fromkeys(name for found in errors.values() for name in found)
    rows = []
    for name in names:
        own = {target: found[name] for target, found in errors.items() if name in found}
        times = {target: error / medians[target] for target, error in own.items()}
        mean = math.exp(statistics.fmean(math.log(value) for value in times.values()))
        rows.append(Fragile(name=name, times=mean, errors=own, times_by_target=times))
    return tuple(sorted(rows, key=lambda row: (-row.times, row.name))[:count])
