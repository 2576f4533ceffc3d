"""The GGUF section of an architecture's YAML, and how config.json answers it.

A family's section is data: which modules a block has, what is done to their rows, which config values become which
metadata. A value is looked up along a list of formulas (converter/expression.py) by preference, with a number as the
default that transformers would take; null at the end leaves the value out. llama.cpp's converter says the same in a
Python class per family; the price of data is that a new kind of oddity needs a new key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.architecture import Architecture
from converter.errors import UnsupportedError
from converter.expression import evaluate

Lookup = Sequence[str | int | float | bool | None]


@dataclass(frozen=True, kw_only=True)
class Divided:
    """A checkpoint tensor that the file has as others: `by`, a preparation with GGUF keys for numbers, gives `into`.

    into: their names in the file, relative to the block; the number of the part is the preparation's last. What moves
    the rows of one of them stands among the operations by that name.
    """

    by: str
    into: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number that the checkpoint keeps as a tensor of each block: its name relative to the block, and its shape."""

    tensor: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Stacked:
    """Vectors of a block, MODULE.0.weight and so on, that the file has as one tensor.

    count: the GGUF key that says how many; name: the tensor's, relative to the block.
    """

    count: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family as GGUF stores it. Modules and tensors of a block are named relative to it.

    architecture: GGUF's name of it. modules: those of a block that have a weight and are no linears, always stored as
    F32 unless they are a matrix that readers quantize. absent: linears of the taps that this model lacks. biases:
    modules, also outside the blocks, that may have one. outside: modules outside the blocks beyond embedding, final
    norm and head. names: by tensor of the checkpoint, its ending included, the name in the file where gguf-py's own map
    has none. operations: by module or tensor, see operations.py, with GGUF keys for numbers. divided: see Divided.
    stacked: see Stacked, by module. dropped: reasons by pattern of checkpoint names, for what readers have no use for.

    integers, floats, booleans, texts: metadata by key without the architecture's prefix. by_layer: arrays with a value
    for each block, by kind and key; formulas may use `layer`. from_tensors: arrays of F32 with a value for each block
    that lies in the checkpoint; a plan holds zeros in their place. rope: kinds of rope scaling that the reader knows.
    requires: config values that the reader takes for granted, in each `layer` where the formula names it. derived:
    those that it works out from others, by the number of layers (0: all that are not named). full_attention_every: one
    layer in so many sees the whole context, the others a sliding window (0: all see it). ignored_windows: config paths
    of sliding windows that the reader does without. otherwise: what the reader computes a little otherwise, a sentence
    by the formula that is true of config.json then.
    """

    architecture: str
    modules: tuple[str, ...]
    absent: tuple[str, ...]
    biases: tuple[str, ...]
    outside: tuple[str, ...]
    names: Mapping[str, str]
    operations: Mapping[str, str]
    divided: Mapping[str, Divided]
    stacked: Mapping[str, Stacked]
    dropped: Mapping[str, str]
    integers: Mapping[str, Lookup]
    floats: Mapping[str, Lookup]
    booleans: Mapping[str, Lookup]
    texts: Mapping[str, Lookup]
    by_layer: Mapping[str, Mapping[str, Lookup]]
    from_tensors: Mapping[str, Number]
    rope: tuple[str, ...]
    requires: Mapping[str, Sequence[Any]]
    derived: Mapping[str, Mapping[int, Lookup]]
    full_attention_every: int
    ignored_windows: tuple[str, ...]
    otherwise: Mapping[str, str]


def family_of(architecture: Architecture | None, where: str) -> Family:
    """The GGUF section of `architecture`; raises UnsupportedError when there is none."""
    if architecture is None or architecture.gguf is None:
        what = "GGUF needs a model family that it knows"
        if architecture is not None:
            what = f"the family {architecture.name} has no GGUF section in converter/architectures"
        raise UnsupportedError(where, what, "Choose format: compressed-tensors or parquet for this model")
    section = architecture.gguf
    return Family(
        architecture=section["architecture"],
        modules=tuple(section.get("modules", ())),
        absent=tuple(section.get("absent", ())),
        biases=tuple(section.get("biases", ())),
        outside=tuple(section.get("outside", ())),
        names=section.get("names", {}),
        operations=section.get("operations", {}),
        divided={
            name: Divided(by=entry["by"], into=tuple(entry["into"]))
            for name, entry in section.get("divided", {}).items()
        },
        stacked={module: Stacked(**entry) for module, entry in section.get("stacked", {}).items()},
        dropped=section.get("dropped", {}),
        integers=section["integers"],
        floats=section["floats"],
        booleans=section.get("booleans", {}),
        texts=section.get("texts", {}),
        by_layer=section.get("by_layer", {}),
        from_tensors={
            key: Number(tensor=entry["tensor"], shape=tuple(entry["shape"]))
            for key, entry in section.get("from_tensors", {}).items()
        },
        rope=tuple(section.get("rope", ("default",))),
        requires=section.get("requires", {}),
        derived=section.get("derived", {}),
        full_attention_every=section.get("full_attention_every", 0),
        ignored_windows=tuple(section.get("ignored_windows", ())),
        otherwise=section.get("otherwise", {}),
    )


def modules_of(family: Family, architecture: Architecture) -> tuple[str, ...]:
    """Every module of a block that has a weight of its own in the file, relative to the block; experts are stacked."""
    linears = tuple(linear for tap in architecture.taps for linear in tap.linears)
    experts = architecture.experts
    whole = (one for one in linears if f"{one}.weight" not in family.divided and one not in family.absent)
    return family.modules + tuple(linear for linear in whole if not (experts and experts.expert_of(linear)))


def look_up(config: Mapping[str, Any], lookup: Lookup, layer: int | None = None) -> Any:
    """The first answer along `lookup`; None when there is none. layer: what formulas may use by that name."""
    for step in lookup:
        value = evaluate(step, config, layer) if isinstance(step, str) else step
        if value is not None and not (isinstance(value, float) and not math.isfinite(value)):
            return value
    return None


def check_requirements(family: Family, config: Mapping[str, Any], layers: int, where: str) -> None:
    """Raise UnsupportedError when config.json asks for a computation that the reader of this family does not do."""

    def refuse(path: str, value: object, taken: str) -> UnsupportedError:
        asked = repr(value) if len(repr(value)) <= 80 else "something else"
        what = f"config.json sets {path} to {asked}, and readers of GGUF compute {family.architecture} with {taken}"
        return UnsupportedError(where, what, "Choose another format for this model")

    for path, allowed in family.requires.items():
        for layer in range(layers):
            value = evaluate(path, config, layer)
            if value is not None and value not in allowed:
                raise refuse(path, value, " or ".join(map(repr, allowed)))
    for path, rules in family.derived.items():
        value, derived = evaluate(path, config), look_up(config, rules.get(layers, rules[0]))
        if value != derived:
            raise refuse(path, value, repr(derived))
    every = family.full_attention_every
    if every:
        kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
        taken = f"full attention in the last of every {every} layers, a sliding window in the others"
        for path, wanted in (("layer_types", kinds), ("sliding_window_pattern", every)):
            value = evaluate(path, config)
            if value is not None and value != wanted:
                raise refuse(path, value, taken)


def unread(family: Family, config: Mapping[str, Any], context: int) -> tuple[str, ...]:
    """What config.json says and the reader does without, a sentence each; context is the declared context length."""
    windows = [look_up(config, [path]) for path in family.ignored_windows]
    without = tuple(
        f"readers of GGUF let a token see all before it and not the last {window} only, so contexts longer than that "
        "give other results than in transformers"
        for window in windows
        if window is not None and window < context
    )
    return without + tuple(
        dict.fromkeys(said for formula, said in family.otherwise.items() if evaluate(formula, config))
    )
