"""What each format can store, in one table.

A scheme is a name people know (W4A16, INT8, Q4_K_M) and what it means. The manifest checks names against these tables,
so that a wrong name is refused with its line number; the containers read the meaning from them. The alternative, each
container checking names for itself, would find the same mistake only after every model was opened.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Observer = Literal["minmax", "percentile", "kl", "mse"]
Granularity = Literal["tensor", "channel", "group", "block"]
# What codes mean: integers; floats of 8 bits; floats of 4 or 8 bits in small groups with coded scales; fixed levels
# (seq: even ones around zero, log: powers); levels of a row's or a group's own.
Values = (
    Literal["int", "e4m3", "e5m2", "nvfp4", "mxfp4", "mxfp8", "nf4", "fp4"]
    | Literal["ternary", "seq2", "seq3", "seq4", "log3", "log4", "kmeans"]
)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """How a server quantizes what a linear reads: codes, and a scale for so many columns of a token (None: for all).

    scale: as it is, rounded to fp8 or to a power of two. static: calibration fixes the range, `lowest` to `largest`,
    that the codes cover (of NVFP4: the unit of the scales, by `largest`); otherwise each token has its own. Where it is
    symmetric, `lowest` is -`largest`; otherwise there is a zero point, which static integers alone have.
    """

    values: Literal["int", "e4m3", "e2m1"]
    bits: int
    group_size: int | None = None
    scale: Literal["float", "fp8", "power of two"] = "float"
    static: bool = False
    symmetric: bool = True
    lowest: float = 0.0
    largest: float = 0.0

    @property
    def name(self) -> str:
        """In words that a plan or a report can show, such as "int8 per token"."""
        what = f"int{self.bits}" if self.values == "int" else self.values
        what += "" if self.symmetric else " asym"
        each = "tensor" if self.static and not self.group_size else "token"
        return f"{what} per {self.group_size} columns" if self.group_size else f"{what} per {each}"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What weights become, and what happens to the activations that meet them.

    group_size is the default number of input columns that share a scale; None is one scale per output row, unless
    block says how many rows and columns share one, or tensor is set. offset: one stands beside each scale. scale_bits:
    scales (and offsets) are codes of so many bits, in units of the row; 0: they are as the values have them.
    activations is None where they keep their precision.
    """

    bits: int
    values: Values = "int"
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None
    tensor: bool = False
    offset: bool = False
    scale_bits: int = 0
    activations: Activations | None = None

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a target that describe its grid and are not fixed by the scheme."""
        if self.values == "int":
            return "group_size", "symmetric", "granularity", "observer"
        if self.values in ("e4m3", "e5m2"):
            return ("granularity",)
        return ("group_size", "granularity") if self.values.startswith(("ternary", "seq", "log", "kmeans")) else ()

    @property
    def granularity(self) -> Granularity:
        """What shares a scale where a target does not say."""
        if self.block:
            return "block"
        return "group" if self.group_size else "tensor" if self.tensor else "channel"


TOKEN_INT8 = Activations(values="int", bits=8)
TOKEN_FP8 = Activations(values="e4m3", bits=8)
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
INTEGERS = {f"W{bits}A16": Scheme(bits=bits, group_size=None if bits == 8 else 128) for bits in range(2, 9)}
ASYMMETRIC = {f"{name}_ASYM": replace(scheme, symmetric=False) for name, scheme in INTEGERS.items()}
# The names are those of compressed-tensors' presets where it has one.
COMPRESSED_TENSORS_SCHEMES = {
    **INTEGERS,
    **ASYMMETRIC,
    "W8A8": Scheme(bits=8, activations=TOKEN_INT8),
    "W8A8_STATIC": Scheme(bits=8, activations=replace(TOKEN_INT8, static=True)),
    "W8A8_STATIC_ASYM": Scheme(bits=8, activations=replace(TOKEN_INT8, static=True, symmetric=False)),
    "W8A8_GROUP": Scheme(bits=8, group_size=128, activations=replace(TOKEN_INT8, group_size=128)),
    "W4A8": Scheme(bits=4, group_size=128, activations=TOKEN_INT8),
    "FP8": Scheme(bits=8, values="e4m3", tensor=True, activations=replace(TOKEN_FP8, static=True)),
    "FP8_DYNAMIC": Scheme(bits=8, values="e4m3", activations=TOKEN_FP8),
    "FP8_BLOCK": Scheme(bits=8, values="e4m3", block=(128, 128), activations=replace(TOKEN_FP8, group_size=128)),
    "FP8A16": Scheme(bits=8, values="e4m3"),
    "NVFP4A16": Scheme(bits=4, values="nvfp4", group_size=16),
    "NVFP4": Scheme(
        bits=4,
        values="nvfp4",
        group_size=16,
        activations=Activations(values="e2m1", bits=4, group_size=16, scale="fp8", static=True),
    ),
    "MXFP4A16": Scheme(bits=4, values="mxfp4", group_size=32),
    "MXFP4": Scheme(
        bits=4,
        values="mxfp4",
        group_size=32,
        activations=Activations(values="e2m1", bits=4, group_size=32, scale="power of two"),
    ),
    "MXFP8A16": Scheme(bits=8, values="mxfp8", group_size=32),
    "MXFP8": Scheme(
        bits=8,
        values="mxfp8",
        group_size=32,
        activations=Activations(values="e4m3", bits=8, group_size=32, scale="power of two"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class CacheScheme:
    """How the keys and values that attention keeps are stored; by_head: with a scale for each head, not one for all."""

    how: Activations
    by_head: bool = False


STATIC_FP8, STATIC_INT8 = replace(TOKEN_FP8, static=True), replace(TOKEN_INT8, static=True)
CACHES = {
    "FP8": CacheScheme(how=STATIC_FP8),
    "FP8_HEAD": CacheScheme(how=STATIC_FP8, by_head=True),
    "INT8": CacheScheme(how=STATIC_INT8),
    "INT8_HEAD": CacheScheme(how=STATIC_INT8, by_head=True),
}
# The formats that have a place for the scales of keys and values.
CACHING = ("compressed-tensors",)
GPTQ_SCHEMES = {name: INTEGERS[name] for name in ("W2A16", "W3A16", "W4A16", "W8A16")}
# The first layout of GPTQ keeps zero points less one, and readers disagree about what is then stored for 0.
GPTQ_V2_SCHEMES = GPTQ_SCHEMES | {f"{name}_ASYM": ASYMMETRIC[f"{name}_ASYM"] for name in GPTQ_SCHEMES}
EVEN: dict[int, Values] = {2: "seq2", 3: "seq3", 4: "seq4"}


def _even(bits: int, group_size: int, scale_bits: int = 0) -> Scheme:
    return Scheme(bits=bits, values=EVEN[bits], group_size=group_size, offset=True, scale_bits=scale_bits)


PARQUET_SCHEMES = {
    **{f"INT{bits}": Scheme(bits=bits) for bits in (8, 7, 6, 5, 4, 3, 2)},
    **{f"INT{bits}_OFFSET": _even(bits, group_size=64) for bits in (4, 3, 2)},
    **{f"INT{bits}_DOUBLE": _even(bits, group_size=32, scale_bits=4) for bits in (4, 3, 2)},
    "SEQ2": Scheme(bits=2, values="seq2"),
    "TERNARY": Scheme(bits=2, values="ternary"),
    "LOG4": Scheme(bits=4, values="log4"),
    "LOG3": Scheme(bits=3, values="log3"),
    **{f"KMEANS{bits}": Scheme(bits=bits, values="kmeans") for bits in (4, 3, 2)},
    "NF4": Scheme(bits=4, values="nf4", group_size=64, scale_bits=8),
    "FP4": Scheme(bits=4, values="fp4", group_size=64, scale_bits=8),
    "NVFP4": Scheme(bits=4, values="nvfp4", group_size=16),
    "MXFP4": Scheme(bits=4, values="mxfp4", group_size=32),
    "MXFP8": Scheme(bits=8, values="mxfp8", group_size=32),
    "E4M3": Scheme(bits=8, values="e4m3"),
    "E5M2": Scheme(bits=8, values="e5m2"),
}
SCHEMES: dict[str, dict[str, Scheme]] = {
    "compressed-tensors": COMPRESSED_TENSORS_SCHEMES,
    "gptq": GPTQ_SCHEMES,
    "gptq_v2": GPTQ_V2_SCHEMES,
    "auto-round": GPTQ_SCHEMES,
    "awq": {"W4A16_ASYM": ASYMMETRIC["W4A16_ASYM"]},
    "bitsandbytes": {
        "NF4": Scheme(bits=4, values="nf4", group_size=64),
        "FP4": Scheme(bits=4, values="fp4", group_size=64),
    },
    "fp8": {"FP8_BLOCK": COMPRESSED_TENSORS_SCHEMES["FP8_BLOCK"]},
    "torchao": {name: COMPRESSED_TENSORS_SCHEMES[name] for name in ("W8A16", "W8A8")},
    "parquet": PARQUET_SCHEMES,
}
# What the values of `type:` (gguf) or `scheme:` (the others) may be.
STORES: dict[str, tuple[str, ...]] = {
    "gguf": (*GGUF_TYPES, *GGUF_ALIASES),
    **{format: tuple(schemes) for format, schemes in SCHEMES.items()},
}
TRANSFORMS = ("smoothquant", "awq", "rotation", "reorder")
ROUNDERS = ("rtn", "gptq", "hqq", "autoround")
EVERYWHERE = tuple(name for name in ROUNDERS if name != "hqq")  # that moves offsets, which few schemes have
# In a GGUF file, rtn is the search of its type. Scales moved into norms were not tried there; the others are merged.
METHODS: dict[str, tuple[str, ...]] = {
    "gguf": ("rotation", "reorder", *EVERYWHERE),
    **{
        format: TRANSFORMS + (ROUNDERS if any(scheme.offset for scheme in schemes.values()) else EVERYWHERE)
        for format, schemes in SCHEMES.items()
    },
}
