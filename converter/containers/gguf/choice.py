"""The type that each matrix of one file is stored as: what the manifest asks for, else the mixture, then what fits.

Rows that the blocks of a type do not fill are known from shapes, so they are said in the plan and can be refused there;
llama-quantize warns while it works. What types need importance, and whether it is there, is looked at in coverage.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converter.containers.gguf.mixing import Facts, Weight, Wishes, choose_types, fit
from converter.containers.gguf.mixture import MIXTURES
from converter.errors import UnsupportedError
from converter.manifest import Target
from quantkernels.ggml import TYPES

SHOWN = 4  # tensors that a refusal names


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The type a matrix is stored as, and why it is not the one asked for (empty when it is)."""

    type: str
    fallback: str = ""


def stored_types(
    target: Target, weights: Mapping[str, Weight], sources: Mapping[str, Sequence[str]], facts: Facts, where: str
) -> dict[str, Chosen]:
    """The type of every matrix that may be quantized, by its name in the file.

    sources are the names that rules may speak of besides that: the checkpoint's, one for each expert of a stack.
    Raises UnsupportedError when a rule names no type or divides a stack, and for a fallback where target.fallback is
    refuse.
    """
    _check_types(target, where)
    mixture = MIXTURES[target.type or ""]
    wishes = Wishes(
        output=target.output_type,
        embedding=target.embedding_type,
        pure=target.pure,
        types=_ruled(target, sources, where),
    )
    wanted = choose_types(mixture, weights.values(), facts, wishes)
    fitting = {name: fit(type, weights[name].columns) for name, type in wanted.items()}
    chosen = {name: Chosen(type=stored, fallback=why) for name, (stored, why) in fitting.items()}
    _check_fallbacks(target, chosen, where)
    return chosen


def _check_types(target: Target, where: str) -> None:
    """Raise UnsupportedError when a rule names a type that is none of ggml's."""
    for rule in target.rules:
        if rule.type not in TYPES:
            what = f"rule '{rule.pattern}' asks for the type '{rule.type}', which is not made here"
            raise UnsupportedError(where, what, f"Choose one of {', '.join(TYPES)}")


def _ruled(target: Target, sources: Mapping[str, Sequence[str]], where: str) -> dict[str, str]:
    """The types that rules ask for, by the tensor's name in the file."""
    types: dict[str, str] = {}
    for name, own in sources.items():
        rules = [target.rule_for(source, name) for source in own] or [target.rule_for(name)]
        asked = {rule.type if rule else "" for rule in rules}
        if len(asked) > 1:
            types_asked = ", ".join(sorted(type or "the mixture's" for type in asked))
            what = f"rules ask for several types within {name}, which stores all experts as one tensor: {types_asked}"
            raise UnsupportedError(where, what, "Write rules that take all experts of a block, or none")
        if asked != {""}:
            types[name] = asked.pop()
    return types


def _check_fallbacks(target: Target, chosen: Mapping[str, Chosen], where: str) -> None:
    fallen = {name: choice.fallback for name, choice in chosen.items() if choice.fallback}
    if target.fallback == "refuse" and fallen:
        what = f"fallback is refuse, and {len(fallen)} of {len(chosen)} matrices do not fit: {_listed(fallen)}"
        remedy = "Choose a type with blocks that fill these rows, name one for them in rules, or write fallback: allow"
        raise UnsupportedError(where, what, remedy)


def _listed(reasons: Mapping[str, str]) -> str:
    shown = [f"{name} ({reason})" for name, reason in list(reasons.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(reasons) - SHOWN} more" if len(reasons) > SHOWN else "")
