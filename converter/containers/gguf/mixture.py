"""The mixtures of llama-quantize, as a table: for each type of file its base type and what differs from it.

An exception is a row: for tensors of a category, when a condition on the place holds, another type. Rows apply in order
and the last one that fits wins, which is how the rules were written down over the years. The alternative, one function
with a branch per file type, is what llama.cpp has; a table can be read against its documentation and grows by rows.

Source: llama.cpp, src/llama-quant.cpp (llama_tensor_get_type); checked against llama-quantize itself, see
tests/quantize_peer.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from converter.containers.gguf.mixing import ANY, DEMANDING, Condition, Mixture, Place, Row
from converter.schemes import GGUF_ALIASES

# --- conditions ----------------------------------------------------------------------------------------------------


def always(place: Place) -> bool:
    return True


def eight_experts(place: Place) -> bool:
    return place.facts.experts == 8


def falcon(place: Place) -> bool:
    return place.facts.architecture == "falcon"


def shared_values(place: Place) -> bool:
    """Four and more query heads read a value head, so that the value projection is small and sensitive."""
    return place.facts.queries_per_key >= 4


def seventy_billion(place: Place) -> bool:
    """What llama.cpp takes for a model of 70 billion weights, by the number of its layers."""
    facts = place.facts
    if facts.architecture == "llama":
        return facts.layers == 80 and facts.heads != facts.kv_heads and facts.experts != 8
    return SEVENTY_BILLION.get(facts.architecture) == facts.layers


SEVENTY_BILLION: Mapping[str, int] = {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


def imatrix(place: Place) -> bool:
    return place.facts.imatrix


def early(place: Place) -> bool:
    """The first eighth of the layers."""
    return place.layer < place.layers // 8


def earliest(place: Place) -> bool:
    """The first sixteenth of the layers."""
    return place.layer < place.layers // 16


def first(count: int) -> Condition:
    """The first `count` tensors of the category, however many layers there are."""
    return lambda place: place.layer < count


def four_experts(place: Place) -> bool:
    return place.facts.experts >= 4


def counted_early(place: Place) -> bool:
    """The first eighth by the count of tensors, which in a mixture of experts is not the layer."""
    return place.count < place.layers // 8


def middle(place: Place) -> bool:
    """The layers between the first and the last eighth."""
    return place.layers // 8 <= place.layer < 7 * place.layers // 8


def spread(place: Place) -> bool:
    """The first and the last eighth of the layers, and every third one between."""
    eighth = place.layers // 8
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or (place.layer - eighth) % 3 == 2


def flat(place: Place) -> bool:
    """Not a stack of experts."""
    return place.matrices == 1


def both(*conditions: Condition) -> Condition:
    return lambda place: all(condition(place) for condition in conditions)


def either(*conditions: Condition) -> Condition:
    return lambda place: any(condition(place) for condition in conditions)


def without(condition: Condition) -> Condition:
    return lambda place: not condition(place)


usual = without(either(falcon, eight_experts))
mixtral = both(eight_experts, without(falcon))


# --- rows ----------------------------------------------------------------------------------------------------------


def values(type: str, when: Condition = always) -> Row:
    """A row for what makes attention values, be it fused with queries and keys."""
    return Row(category="attn_v", type=type, when=when)


def keys(type: str, when: Condition = always) -> Row:
    return Row(category="attn_k", type=type, when=when)


def queries(type: str) -> Row:
    return Row(category="attn_q", type=type, when=always)


def mixed(type: str, when: Condition = usual) -> Row:
    """A row for the projection that mixes the outputs of the heads."""
    return Row(category="attn_output", type=type, when=when)


def downs(type: str, when: Condition = always) -> Row:
    return Row(category="ffn_down", type=type, when=when)


def gates(type: str, when: Condition) -> Row:
    return Row(category="ffn_gate", type=type, when=when)


def ups(type: str, when: Condition) -> Row:
    return Row(category="ffn_up", type=type, when=when)


# What holds after a file type's own rows.
COMMON = (
    Row(category="attn_v", type="Q5_K", when=seventy_billion, only=("Q3_K", "Q4_K")),
    values("Q8_0", eight_experts),
    keys("Q8_0", eight_experts),
)
FIVE_BITS_FOR_EIGHT = mixed("Q5_K", mixtral)


def bits(number: int, base: str, *rows: Row, output: str = "Q6_K", embedding: str = "") -> Mixture:
    """A file type with its own rows and the common ones."""
    return Mixture(number=number, base=base, output=output, embedding=embedding or base, rows=rows + COMMON)


def low(number: int, base: str, better: str, embedding: str, *rows: Row) -> Mixture:
    """A file type of one or two bits: `better` is the type of what suffers most. Common rows do not hold."""
    always_there = (
        values(better),
        values("Q4_K", either(shared_values, four_experts)),
        keys("Q4_K", eight_experts),
        downs(better, counted_early),
        *rows,
        mixed("Q5_K", eight_experts),
    )
    return Mixture(number=number, base=base, output="Q5_K", embedding=embedding, rows=always_there)


def only(number: int, base: str, others: str = "") -> Mixture:
    """A file type of one type; `others` is that of embedding and head when they differ."""
    return Mixture(number=number, base=base, output=others or base, embedding=others or base)


# fmt: off
_MIXTURES: dict[str, Mixture] = {
    "F32": only(0, "F32"),
    "F16": only(1, "F16"),
    "BF16": only(32, "BF16"),
    "Q8_0": bits(7, "Q8_0", output="Q8_0"),
    "Q4_0": bits(2, "Q4_0", downs("Q4_1", both(imatrix, early))),
    "Q4_1": bits(3, "Q4_1"),
    "Q5_0": bits(8, "Q5_0", downs("Q5_1", both(imatrix, early))),
    "Q5_1": bits(9, "Q5_1"),
    "Q2_K": bits(10, "Q2_K", values("Q3_K"), values("Q4_K", shared_values), downs("Q3_K"), mixed("Q3_K"),
                 FIVE_BITS_FOR_EIGHT),
    "Q2_K_S": replace(bits(21, "Q2_K", values("Q4_K", shared_values), downs("Q4_K", early)),
                      demanding=(*DEMANDING, "Q2_K")),
    "Q3_K_S": bits(11, "Q3_K", FIVE_BITS_FOR_EIGHT),
    "Q3_K_M": bits(12, "Q3_K", values("Q4_K"), values("Q5_K", first(2)), mixed("Q4_K"), FIVE_BITS_FOR_EIGHT,
                   downs("Q4_K", either(without(falcon), spread)), downs("Q5_K", earliest)),
    "Q3_K_L": bits(13, "Q3_K", values("Q5_K"), mixed("Q5_K"), mixed("Q4_K", falcon), downs("Q5_K"),
                   downs("Q4_K", falcon)),
    "Q4_K_S": bits(14, "Q4_K", values("Q5_K", first(4)), downs("Q5_K", both(early, without(falcon))),
                   FIVE_BITS_FOR_EIGHT),
    "Q4_K_M": bits(15, "Q4_K", values("Q6_K", spread), downs("Q6_K", both(spread, without(falcon))),
                   downs("Q5_K", both(spread, falcon)), downs("Q6_K", both(earliest, falcon)), FIVE_BITS_FOR_EIGHT),
    "Q5_K_S": bits(16, "Q5_K"),
    "Q5_K_M": bits(17, "Q5_K", values("Q6_K", spread), downs("Q6_K", spread)),
    "Q6_K": bits(18, "Q6_K"),
    "IQ1_S": low(24, "IQ1_S", "Q2_K", "Q2_K", mixed("IQ2_XXS", without(eight_experts))),
    "IQ1_M": low(31, "IQ1_M", "Q2_K", "Q2_K", mixed("IQ2_XXS", without(eight_experts))),
    "IQ2_XXS": low(19, "IQ2_XXS", "Q2_K", "Q2_K"),
    "IQ2_XS": low(20, "IQ2_XS", "Q2_K", "Q2_K"),
    "IQ2_S": low(28, "IQ2_XS", "IQ3_S", "IQ3_S", mixed("IQ3_S", without(eight_experts))),
    "IQ2_M": low(29, "IQ2_S", "IQ3_S", "IQ3_S", mixed("IQ3_S", without(eight_experts))),
    "IQ3_XXS": bits(23, "IQ3_XXS", values("IQ3_S", without(imatrix)), values("Q4_K", shared_values), keys("IQ2_S"),
                    queries("IQ2_S"), mixed("IQ3_S"), FIVE_BITS_FOR_EIGHT, downs("Q3_K", without(imatrix)),
                    downs("Q4_K", both(early, without(imatrix))), output="Q5_K", embedding="IQ3_S"),
    "IQ3_XS": bits(22, "IQ3_S", values("Q4_K", shared_values), keys("IQ3_XXS"), queries("IQ3_XXS"),
                   FIVE_BITS_FOR_EIGHT, gates("IQ3_XXS", middle), ups("IQ3_XXS", middle)),
    "IQ3_S": bits(26, "IQ3_S", values("Q4_K", shared_values), FIVE_BITS_FOR_EIGHT),
    "IQ3_M": bits(27, "IQ3_S", values("Q4_K"), mixed("Q4_K"), FIVE_BITS_FOR_EIGHT,
                  downs("Q4_K", either(early, both(eight_experts, spread)))),
    "IQ4_NL": bits(25, "IQ4_NL", values("Q5_K", shared_values), downs("Q5_K", both(early, without(imatrix))),
                   FIVE_BITS_FOR_EIGHT),
    "IQ4_XS": bits(30, "IQ4_XS", values("Q5_K", shared_values), downs("Q5_K", both(early, without(imatrix))),
                   FIVE_BITS_FOR_EIGHT),
    "TQ1_0": bits(36, "TQ1_0", embedding="Q4_K"),
    "TQ2_0": bits(37, "TQ2_0", embedding="Q4_K"),
    "MXFP4_MOE": replace(only(38, "MXFP4", "Q8_0"), rows=(Row(category=ANY, type="Q8_0", when=flat),)),
    # llama-quantize makes neither: 38 is the number of its files with MXFP4 in them, 39 that of converted NVFP4 models.
    "MXFP4": only(38, "MXFP4", "Q8_0"),
    "NVFP4": only(39, "NVFP4", "Q8_0"),
}
# fmt: on
MIXTURES: Mapping[str, Mixture] = _MIXTURES | {other: _MIXTURES[name] for other, name in GGUF_ALIASES.items()}
