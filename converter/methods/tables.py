"""Every method by the name a manifest gives it. A new one is a file and a line here; the conformance tests follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from converter.architecture import Folding
from converter.methods import Needs, Rounder, Transform
from converter.methods.autoround import autoround
from converter.methods.awq import awq
from converter.methods.gptq import gptq
from converter.methods.hqq import hqq
from converter.methods.reorder import reorder
from converter.methods.rotation import rotation
from converter.methods.rtn import round_to_nearest
from converter.methods.smoothquant import smoothquant

TRANSFORMS: dict[str, Transform] = {
    "smoothquant": smoothquant,
    "awq": awq,
    "rotation": rotation,
    "reorder": reorder,
}

ROUNDERS: dict[str, Rounder] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
    "hqq": hqq,
    "autoround": autoround,
}

# The transforms that carry out foldings, by what absorbs the scales.
FOLDS_NORMS = ("smoothquant", "awq")
FOLDS_LINEARS = ("awq",)
# Those that turn the residual stream, so that a head cannot be the embedding, and hidden states are in another basis.
TURNS_STREAM = ("rotation",)
# Those that change the order of columns inside an MLP.
REORDERS = ("reorder",)

# What a method asks of the calibration pass, given whether the target weighs errors by importance.
NEEDS: dict[str, Callable[[bool], Needs]] = {
    "smoothquant": lambda importance: Needs(sums=True),
    "awq": lambda importance: Needs(sums=True, gram=True),
    # What a column's power becomes follows from the Gram matrix alone.
    "rotation": lambda importance: Needs(sums=importance, gram=importance),
    "reorder": lambda importance: Needs(sums=True),
    "rtn": lambda importance: Needs(sums=importance),
    "gptq": lambda importance: Needs(sums=True, gram=True, drift=True),
    "hqq": lambda importance: Needs(sums=importance),
    "autoround": lambda importance: Needs(sums=True, gram=True, drift=True, rows=True),
}


def folds(methods: Sequence[str], folding: Folding) -> bool:
    """Whether any of the methods may carry out this folding."""
    return bool({*methods} & {*(FOLDS_NORMS if folding.norm else FOLDS_LINEARS)})


def turns(methods: Sequence[str]) -> bool:
    """Whether any of the methods turns the residual stream."""
    return bool({*methods} & {*TURNS_STREAM})


def reorders(methods: Sequence[str]) -> bool:
    """Whether any of the methods changes the order of columns inside an MLP."""
    return bool({*methods} & {*REORDERS})
