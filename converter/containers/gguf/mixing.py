"""How a mixture is applied: from the names and shapes of a file's matrices to a ggml type for each.

A file type such as Q4_K_M is a base type and a list of exceptions, the rows of mixture.py. Which of them fit depends on
where a tensor stands: its category, its number among those of its kind, the model's heads and experts.

Everything here gives what llama-quantize gives, tensor by tensor, surprises included (docs/formats.md lists them).
Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type and the shape fallback behind it).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from converter.containers.gguf.header import BLOCKS

ANY = "any"  # the category of rows that speak of every matrix in a block
BLOCK = re.compile(r"blk\.(\d+)\.")


# Types that llama-quantize does not make without importance; ggml itself would make three of them.
DEMANDING = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a model's hyper-parameters say to its mixture: `heads` query heads for `kv_heads` key-value heads.

    imatrix: whether importance is at hand, for whichever tensor.
    """

    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    imatrix: bool = False
    architecture: str = "llama"

    @property
    def queries_per_key(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor stands among those of its category: number `layer` of `layers`, and `count` of them before it.

    In a mixture of experts `layer` is the block's number, for there a block may have several tensors of a category;
    elsewhere it is the count.
    """

    layer: int
    layers: int
    count: int
    matrices: int
    facts: Facts


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
    embedding with a head beside it. Types in `demanding` cannot be made without importance.
    """

    number: int
    base: str
    output: str
    embedding: str
    rows: tuple[Row, ...] = ()
    demanding: tuple[str, ...] = DEMANDING

    def demands_importance(self, name: str, type: str) -> bool:
        """Whether llama-quantize refuses to make the tensor `name` as `type` without importance for it."""
        return type in self.demanding and category_of(name) not in ("output", "token_embd")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix of the file: its GGUF name, the length of a row, and how many matrices are stacked for experts."""

    name: str
    columns: int
    matrices: int = 1

    @property
    def block(self) -> int:
        """The number in its name, -1 outside of the blocks."""
        match = BLOCK.match(self.name)
        return int(match[1]) if match else -1


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What somebody wants otherwise: types of the head and of the embedding, no mixture, types by GGUF tensor name."""

    output: str | None = None
    embedding: str | None = None
    pure: bool = False
    types: Mapping[str, str] = field(default_factory=dict)


# What a type becomes when its blocks do not fill a row; anything whose second try fails too is stored as F16.
FALLBACKS: Mapping[str, str] = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "NVFP4"), "IQ4_NL"),
    **dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

OUTPUT = "output.weight"
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# Parts of names and the category they mean, in the order in which a name is searched for them.
CATEGORIES = (
    *(("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v")),
    *(("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output")),
    *(("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down")),
)
# Parts of the names of matrices that are never quantized: small, or read in another way.
KEPT = (
    *("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d"),
    *("shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *("time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight"),
    *("time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight"),
    *("time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight"),
    *("time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
)
KEPT_WHOLE = ("position_embd.weight", "token_types.weight")


def is_quantized(type: str) -> bool:
    return BLOCKS[type][0] > 1


def may_quantize(name: str) -> bool:
    """Whether llama-quantize touches a matrix of this name."""
    return name.endswith("weight") and name not in KEPT_WHOLE and not any(part in name for part in KEPT)


def category_of(name: str) -> str:
    """The category of a GGUF tensor name; empty when no rule speaks of it."""
    if name == OUTPUT:
        return "output"
    if name in EMBEDDINGS:
        return "token_embd"
    return next((category for part, category in CATEGORIES if part in name), "")


def choose_types(mixture: Mixture, weights: Iterable[Weight], facts: Facts, wishes: Wishes) -> dict[str, str]:
    """The ggml type of every matrix by name, before any shape fallback; `weights` are all that may be quantized.

    Wishes come first, then the mixture. A tensor with a type of its own is not counted, so that in a file with such
    tensors those behind them stand at other places: llama-quantize does so.
    """
    listed = sorted(weights, key=lambda weight: (weight.block, weight.name))
    tied = all(weight.name != OUTPUT for weight in listed)
    of_values = sum(category_of(weight.name) == "attn_v" for weight in listed)
    counts: Counter[str] = Counter()
    types: dict[str, str] = {}
    for weight in listed:
        category = category_of(weight.name)
        wished = _wished(mixture, weight.name, category, wishes)
        if wished is not None:
            types[weight.name] = wished
            continue
        place = Place(
            layer=weight.block if facts.experts > 1 and category.startswith("ffn_") else counts[category],
            layers=of_values if category == "attn_v" else facts.layers,
            count=counts[category],
            matrices=weight.matrices,
            facts=facts,
        )
        types[weight.name] = _mixed(mixture, weight, place, tied, wishes.output)
        counts[category] += 1
    return types


def _wished(mixture: Mixture, name: str, category: str, wishes: Wishes) -> str | None:
    """The type that is asked for by itself, None when the mixture decides."""
    large_table = name != EMBEDDINGS[0] and name in wishes.types
    if category == "token_embd" and wishes.embedding and not large_table:
        return wishes.embedding
    if category == "output" and wishes.output:
        return wishes.output
    if name in wishes.types:
        return wishes.types[name]
    return mixture.base if wishes.pure or not is_quantized(mixture.base) else None


def _mixed(mixture: Mixture, weight: Weight, place: Place, tied: bool, output: str | None) -> str:
    """The type that the mixture gives to a matrix; `output` is what is wished for a head, be it the embedding."""
    category, type = category_of(weight.name), mixture.base
    if category == "output" or (category == "token_embd" and tied):
        careful = place.facts.architecture == "falcon" or weight.columns % BLOCKS[mixture.base][0]
        return output or ("Q8_0" if careful else mixture.output)
    if category == "token_embd":
        return mixture.embedding
    for row in mixture.rows:
        if row.category in (ANY, category) and (not row.only or type in row.only) and row.when(place):
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
