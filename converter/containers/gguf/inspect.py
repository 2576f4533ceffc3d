"""What GGUF can make of a model, asked all at once: every problem, every note, the sizes of many types.

A plan stops at the first problem, because it is of one job; here each question is asked by itself, so that whoever
looks at a model for the first time hears all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from converter.architecture import Architecture
from converter.containers import TensorPlan
from converter.containers.gguf.choice import stored_types
from converter.containers.gguf.family import Family, check_requirements, family_of, unread
from converter.containers.gguf.files import entries_of
from converter.containers.gguf.header import padded, size_of
from converter.containers.gguf.hyper import hyper_parameters
from converter.containers.gguf.mixing import Weight, may_quantize
from converter.containers.gguf.rope import rope_scaling
from converter.containers.gguf.tensors import facts_of, plan_tensors
from converter.containers.gguf.tokenizer import PRE_KEY, Described, describe_tokenizer
from converter.containers.gguf.write import Known, lay_out
from converter.errors import HubmillError
from converter.manifest import Target
from converter.source import Snapshot

Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """A tokenizer as GGUF has it: its kind there ("gpt2", "llama", ...), its pre-tokenizer's name, its tokens."""

    model: str
    pre: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What a model is as GGUF. sizes: bytes of the file by type, to within 64; empty where a problem forbids it.

    architecture: GGUF's name of the family, empty when there is none. tokenizer: None when it cannot be said.
    """

    architecture: str = ""
    tokenizer: TokenizerFacts | None = None
    sizes: Mapping[str, int]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()
    problems: tuple[HubmillError, ...] = ()


def inspect(snapshot: Snapshot, architecture: Architecture, targets: Sequence[Target]) -> Inspected:
    """The model as each of these targets, of which the first is one that quantizes; architecture is fitted."""
    problems: list[HubmillError] = []

    def ask(question: Callable[[], Answer]) -> Answer | None:
        try:
            return question()
        except HubmillError as error:
            problems.append(error)
            return None

    where, config = snapshot.repo, snapshot.config
    family = ask(lambda: family_of(architecture, where))
    if family is None:
        return Inspected(sizes={}, dropped={}, problems=tuple(problems))
    hyper = ask(lambda: hyper_parameters(family, config, architecture.blocks, where))
    ask(lambda: check_requirements(family, config, architecture.blocks, where))
    embedding = snapshot.tensors.get(f"{architecture.embedding}.weight")
    rows = hyper.integers.get("vocab_size") if hyper else None
    rows = rows or (embedding.shape[0] if embedding else 0)
    tokenizer = ask(lambda: describe_tokenizer(snapshot.folder, config, rows, where)) if rows else None
    facts = facts_of_tokenizer(tokenizer) if tokenizer else None
    sizes: dict[str, int] = {}
    dropped: Mapping[str, str] = {}
    notes: tuple[str, ...] = tokenizer.notes if tokenizer else ()
    if hyper is not None:
        scaling = ask(lambda: rope_scaling(family, config, hyper, where))
        planned = ask(lambda: plan_tensors(snapshot, architecture, family, targets[0], hyper.integers))
        if planned is not None:
            dropped = planned[1]
        if planned is not None and scaling is not None and tokenizer is not None:
            known = Known(family=family, hyper=hyper, scaling=scaling)
            layout = ask(lambda: lay_out(snapshot, known, targets[0], planned[0], None, tokenizer))
            if layout is not None:
                made = sum(padded(size_of((len(values),), "F32")) for values in scaling.divisors.values())
                fixed = made + sum(len(shard.head) for shard in layout.shards)
                sizes = {
                    target.type or "": fixed + tensor_bytes(planned[0], family, hyper.integers, target)
                    for target in targets
                }
                notes = unread(family, config, hyper.integers.get("context_length", 0))
                notes += scaling.notes + layout.notes
    return Inspected(
        architecture=family.architecture,
        tokenizer=facts,
        sizes={} if problems else sizes,
        dropped=dropped,
        notes=notes,
        problems=tuple(problems),
    )


def facts_of_tokenizer(described: Described) -> TokenizerFacts:
    """What its metadata say in short."""
    fields = described.fields
    return TokenizerFacts(
        model=str(fields["tokenizer.ggml.model"].value),
        pre=str(fields[PRE_KEY].value) if PRE_KEY in fields else "",
        tokens=len(fields["tokenizer.ggml.tokens"].value),
    )


def tensor_bytes(tensors: Sequence[TensorPlan], family: Family, integers: Mapping[str, int], target: Target) -> int:
    """The bytes that these tensors take in a file of the target's type, whatever type they were planned in."""
    entries = [(name, shape) for name, shape, _ in entries_of(tensors)]
    weights = {
        name: Weight(name=name, columns=shape[-1], matrices=math.prod(shape[:-2]))
        for name, shape in entries
        if len(shape) > 1 and may_quantize(name)
    }
    chosen = stored_types(target, weights, dict.fromkeys(weights, ()), facts_of(family, integers, target), target.name)
    types = {name: choice.type for name, choice in chosen.items()}
    return sum(padded(size_of(shape, types.get(name, "F32"))) for name, shape in entries)
