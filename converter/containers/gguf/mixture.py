"""Which ggml type each tensor of a GGUF file gets: the mixtures of llama-quantize, as a table.

A file type such as Q4_K_M is a base type and a list of exceptions. Each exception is a row here: for tensors of a
category, when a condition on the place holds, another type. Rows apply in order and the last one that fits wins, which
is how the rules were written down over the years. The alternative, one function with a branch per file type, is what
llama.cpp has; a table can be read against its documentation and grows by rows.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type and the shape fallback behind it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from converter.containers.gguf.header import BLOCKS


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor stands: block `layer` of `layers`; `heads` query heads for `kv_heads` key-value heads."""

    layer: int
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    imatrix: bool = False
    architecture: str = "llama"


Condition = Callable[[Place], bool]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row: tensors of `category` get `type` when `when` holds, if `only` is empty or holds their type so far."""

    category: str
    type: str
    when: Condition
    only: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A file type: its number in `general.file_type`, its base type, and what differs.

    output is the type of the output head (and of the embedding when that serves as head), embedding that of an
    embedding with a head beside it.
    """

    number: int
    base: str
    output: str
    embedding: str
    rows: tuple[Row, ...] = ()

    @property
    def quantized(self) -> bool:
        return is_quantized(self.base)


def always(place: Place) -> bool:
    return True


def spread(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def early_with_imatrix(place: Place) -> bool:
    return place.imatrix and place.layer < place.layers // 8


def seventy_billion(place: Place) -> bool:
    """Llama 2 and 3 with 70 billion weights, whose shared value projection is small and sensitive."""
    return place.architecture == "llama" and place.layers == 80 and place.heads != place.kv_heads


def eight_experts(place: Place) -> bool:
    return place.experts == 8


# What holds for every quantized file type, after its own rows.
COMMON = (
    Row(category="attn_v", type="Q5_K", when=seventy_billion, only=("Q3_K", "Q4_K")),
    Row(category="attn_v", type="Q8_0", when=eight_experts),
    Row(category="attn_k", type="Q8_0", when=eight_experts),
)
MIXTURES: Mapping[str, Mixture] = {
    "F32": Mixture(number=0, base="F32", output="F32", embedding="F32"),
    "F16": Mixture(number=1, base="F16", output="F16", embedding="F16"),
    "BF16": Mixture(number=32, base="BF16", output="BF16", embedding="BF16"),
    "Q8_0": Mixture(number=7, base="Q8_0", output="Q8_0", embedding="Q8_0"),
    "Q4_0": Mixture(
        number=2,
        base="Q4_0",
        output="Q6_K",
        embedding="Q4_0",
        rows=(Row(category="ffn_down", type="Q4_1", when=early_with_imatrix),),
    ),
    "Q4_K_M": Mixture(
        number=15,
        base="Q4_K",
        output="Q6_K",
        embedding="Q4_K",
        rows=(
            Row(category="attn_v", type="Q6_K", when=spread),
            Row(category="attn_output", type="Q5_K", when=eight_experts),
            Row(category="ffn_down", type="Q6_K", when=spread),
        ),
    ),
}
# What a type becomes when its blocks do not fill a row; anything whose second try fails too is stored as F16.
FALLBACKS: Mapping[str, str] = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# In the order in which a name is searched for them.
CATEGORIES = ("attn_v", "attn_k", "attn_q", "attn_output", "ffn_up", "ffn_gate", "ffn_down")


def is_quantized(type: str) -> bool:
    return BLOCKS[type][0] > 1


def category_of(name: str) -> str:
    """The category of a GGUF tensor name in a block; empty when no rule speaks of it."""
    stem = name.split(".")[2] if name.startswith("blk.") else name
    return next((category for category in CATEGORIES if stem.startswith(category)), "")


def type_in_block(mixture: Mixture, name: str, place: Place) -> str:
    """The ggml type of the weight `name` ("blk.3.attn_v.weight") in this mixture, before any shape fallback."""
    category, type = category_of(name), mixture.base
    if not category or not mixture.quantized:
        return type
    for row in mixture.rows + COMMON:
        if row.category == category and (not row.only or type in row.only) and row.when(place):
            type = row.type
    return type


def fit(type: str, columns: int) -> tuple[str, str]:
    """The type that rows of `columns` weights can be stored as, and why it is not `type` (empty when it is)."""
    if columns % BLOCKS[type][0] == 0:
        return type, ""
    second = FALLBACKS.get(type, "F16")
    stored = second if columns % BLOCKS[second][0] == 0 else "F16"
    why = f"rows of {columns} weights hold no whole blocks of {BLOCKS[type][0]}: {stored} instead of {type}"
    return stored, why
