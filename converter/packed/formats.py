"""The table of formats."""

from __future__ import annotations

from collections.abc import Mapping

from converter.packed.awq import AWQ
from converter.packed.bitsandbytes import BITSANDBYTES
from converter.packed.fp4 import MXFP4, NVFP4
from converter.packed.gptq import GPTQ
from converter.packed.scaled import FP8_SCALED, INT8, VECTORWISE
from converter.packed.weight import Format
from converter.packed.words import WORDS

FORMATS: Mapping[str, Format] = {
    "fp8": FP8_SCALED,
    "int8": INT8,
    "llm.int8": VECTORWISE,
    "pack-quantized": WORDS,
    "gptq": GPTQ,
    "awq": AWQ,
    "bitsandbytes": BITSANDBYTES,
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
}
