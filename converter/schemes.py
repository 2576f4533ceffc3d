"""What each format can store, in one table.

A scheme is a name people know (W4A16, INT8, Q4_K_M) and what it means. The manifest checks names against these tables,
so that a wrong name is refused with its line number; the containers read the meaning from them. The alternative, each
container checking names for itself, would find the same mistake only after every model was opened.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Integer weights, and what happens to the activations that meet them.

    group_size is the default number of input columns that share a scale; None is one scale per output row.
    activation_bits is None when activations keep their precision; otherwise each token is quantized at run time.
    """

    bits: int
    symmetric: bool = True
    group_size: int | None = None
    activation_bits: int | None = None


# The types of whole GGUF files, mixtures most of them; MXFP4 and NVFP4 are ours, the others llama-quantize's.
GGUF_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"),
    *("IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE", "MXFP4", "NVFP4"),
)
# Other names for them, as people write them for llama-quantize.
GGUF_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# The types of single tensors, which a mixture picks among: all of ggml's that a model file can hold and we can make.
GGUF_TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
# How the scales and codes of a GGUF block are found, and what to do with rows that its blocks do not fill.
SEARCHES = ("ggml", "thorough")
FALLBACK_ANSWERS = ("allow", "refuse")
COMPRESSED_TENSORS_SCHEMES = {
    "W4A16": Scheme(bits=4, group_size=128),
    "W4A16_ASYM": Scheme(bits=4, group_size=128, symmetric=False),
    "W8A16": Scheme(bits=8),
    "W8A8": Scheme(bits=8, activation_bits=8),
}
PARQUET_SCHEMES = {
    "INT8": Scheme(bits=8),
    "INT4": Scheme(bits=4),
    "INT2": Scheme(bits=2),
}
SCHEMES: dict[str, dict[str, Scheme]] = {
    "compressed-tensors": COMPRESSED_TENSORS_SCHEMES,
    "parquet": PARQUET_SCHEMES,
}
# What the values of `type:` (gguf) or `scheme:` (the others) may be.
STORES: dict[str, tuple[str, ...]] = {
    "gguf": (*GGUF_TYPES, *GGUF_ALIASES),
    "compressed-tensors": tuple(COMPRESSED_TENSORS_SCHEMES),
    "parquet": tuple(PARQUET_SCHEMES),
}
TRANSFORMS = ("smoothquant",)
ROUNDERS = ("rtn", "gptq")
# In a GGUF file, rtn is the search of its type. Transforms would need places in its graph that readers do not have.
METHODS: dict[str, tuple[str, ...]] = {
    "gguf": ROUNDERS,
    "compressed-tensors": TRANSFORMS + ROUNDERS,
    "parquet": TRANSFORMS + ROUNDERS,
}
Observer = Literal["minmax", "percentile", "kl", "mse"]
Granularity = Literal["tensor", "channel", "group"]
