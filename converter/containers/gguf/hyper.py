"""Hyper-parameters: what config.json says, in GGUF's keys, from the lists of a family's section."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from converter.architecture import Architecture
from converter.containers.gguf.family import Family, Lookup, look_up
from converter.containers.gguf.header import Field, boolean, booleans, f32, f32s, i32s, string, u32
from converter.errors import SourceError
from converter.source import Snapshot

WHOLE = ("tokenizer.", "xielu.")  # what keys without the architecture's prefix begin with


@dataclass(frozen=True, kw_only=True)
class Hyper:
    """Values by GGUF key, without the architecture's prefix where it has one; by_layer: arrays as they are stored."""

    integers: Mapping[str, int]
    floats: Mapping[str, float]
    booleans: Mapping[str, bool]
    texts: Mapping[str, str]
    by_layer: Mapping[str, Field]

    def fields(self, prefix: str) -> dict[str, Field]:
        """All of it as metadata under the architecture's prefix, but for keys that have none."""
        found = {key: u32(value) for key, value in self.integers.items()}
        found |= {key: f32(value) for key, value in self.floats.items()}
        found |= {key: boolean(value) for key, value in self.booleans.items()}
        found |= {key: string(value) for key, value in self.texts.items()} | dict(self.by_layer)
        return {key if key.startswith(WHOLE) else prefix + key: field for key, field in found.items()}


def hyper_parameters(family: Family, config: Mapping[str, Any], layers: int, where: str) -> Hyper:
    """What the reader's graph is built from; layers is the number of blocks.

    Raises SourceError when config.json lacks a value that has no default, or holds one that cannot be.
    """
    integers: dict[str, int] = {}
    for key, lookup in family.integers.items():
        value = _number(key, lookup, config, where)
        if value is not None and (value != int(value) or not 0 <= value < 1 << 32):
            raise _missing(where, key, lookup, value)
        if value is not None:
            integers[key] = int(value)
    for key in ("block_count", "embedding_length", "vocab_size"):
        if integers.get(key) == 0:
            raise _missing(where, key, family.integers[key], 0)
    floats = {key: _number(key, lookup, config, where) for key, lookup in family.floats.items()}
    booleans_ = {key: look_up(config, lookup) for key, lookup in family.booleans.items()}
    texts = {key: look_up(config, lookup) for key, lookup in family.texts.items()}
    heads, kv_heads = integers.get("attention.head_count", 0), integers.get("attention.head_count_kv", 1)
    if not kv_heads or heads % kv_heads:
        what = f"config.json gives {heads} heads, which {kv_heads} key-value heads do not divide"
        raise SourceError(where, what, "Correct config.json")
    return Hyper(
        integers=integers,
        floats={key: float(value) for key, value in floats.items() if value is not None},
        booleans={key: bool(value) for key, value in booleans_.items() if value is not None},
        texts={key: str(value) for key, value in texts.items() if value is not None},
        by_layer=dict(_arrays(family, config, layers, where))
        | {key: f32s([0.0] * layers) for key in family.from_tensors},
    )


def filled(hyper: Hyper, family: Family, architecture: Architecture, snapshot: Snapshot) -> Hyper:
    """`hyper` with what lies in the checkpoint's tensors; its bytes stay as many as planned."""
    prefixes = [architecture.prefix(b) for b in range(architecture.blocks)]
    arrays = {
        key: f32s([float(snapshot.read(prefix + number.tensor)) for prefix in prefixes])
        for key, number in family.from_tensors.items()
    }
    return replace(hyper, by_layer={**hyper.by_layer, **arrays})


ARRAYS = {"integers": (int, i32s), "floats": (float, f32s), "booleans": (bool, booleans)}


def _arrays(family: Family, config: Mapping[str, Any], layers: int, where: str) -> list[tuple[str, Field]]:
    found: list[tuple[str, Field]] = []
    for kind, lookups in family.by_layer.items():
        cast, field = ARRAYS[kind]
        for key, lookup in lookups.items():
            values = [look_up(config, lookup, layer=layer) for layer in range(layers)]
            if all(value is not None for value in values):
                found.append((key, field([cast(value) for value in values])))
            elif None not in lookup:
                raise _missing(where, key, lookup, None)
    return found


def _number(key: str, lookup: Lookup, config: Mapping[str, Any], where: str) -> int | float | None:
    """The number that `lookup` finds, None when it may be left out and is."""
    value = look_up(config, lookup)
    if value is None and None in lookup:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise _missing(where, key, lookup, value)
    return value


def _missing(where: str, key: str, lookup: Lookup, value: object) -> SourceError:
    names = " or ".join(str(step) for step in lookup if isinstance(step, str))
    what = f"config.json has no {names}" if value is None else f"config.json gives {value} for {names}"
    return SourceError(where, f"{what} (GGUF's {key})", "Complete config.json from the model's original")
