"""Every method by the name a manifest gives it. A new one is a file and a line here; the conformance tests follow."""

from __future__ import annotations

from collections.abc import Callable

from converter.methods import Needs, Rounder, Transform
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.methods.smoothquant import smoothquant

TRANSFORMS: dict[str, Transform] = {
    "smoothquant": smoothquant,
}

ROUNDERS: dict[str, Rounder] = {
    "rtn": round_to_nearest,
    "gptq": gptq,
}

# What a method asks of the calibration pass, given whether the target weighs errors by importance.
NEEDS: dict[str, Callable[[bool], Needs]] = {
    "smoothquant": lambda importance: Needs(sums=True),
    "rtn": lambda importance: Needs(sums=importance),
    "gptq": lambda importance: Needs(sums=True, gram=True),
}
