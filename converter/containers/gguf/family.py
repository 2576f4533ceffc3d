"""The GGUF section of an architecture's YAML, and how config.json answers it.

A family's section is data: which modules a block has, what is done to their rows, which config values become which
metadata. Values are looked up along a list: config paths by preference ("rope_parameters.rope_theta"), quotients of two
paths ("hidden_size/num_attention_heads"), and a number as the default that transformers would take. llama.cpp's
converter says the same in a Python class per family; the price of data is that a new kind of oddity needs a new key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converter.architecture import Architecture
from converter.errors import SourceError, UnsupportedError

Lookup = Sequence[str | int | float]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family as GGUF stores it.

    architecture: GGUF's name of it. norms: the block's modules that are no linears. biases: modules that may have one.
    operations: by module, "rope_permute KEY" with the GGUF key that holds the number of heads, or "add 1".
    integers, floats: metadata by key without the architecture's prefix; optional: integers left out when config.json
    has none. rope: kinds of rope scaling that the reader knows. requires: config values that the reader takes for
    granted. derived: those that it works out from others, by the number of layers (0: all that are not named).
    full_attention_every: one layer in so many sees the whole context, the others a sliding window (0: all see it).
    ignored_windows: config paths of sliding windows that the reader does without. wide_norms: whether the norms of
    queries and keys span all heads, not one.
    """

    architecture: str
    norms: tuple[str, ...]
    biases: tuple[str, ...]
    operations: Mapping[str, str]
    integers: Mapping[str, Lookup]
    floats: Mapping[str, Lookup]
    optional: Mapping[str, Lookup]
    rope: tuple[str, ...]
    requires: Mapping[str, Sequence[Any]]
    derived: Mapping[str, Mapping[int, Lookup]]
    full_attention_every: int
    ignored_windows: tuple[str, ...]
    wide_norms: bool


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
        norms=tuple(section["norms"]),
        biases=tuple(section.get("biases", ())),
        operations=section.get("operations", {}),
        integers=section["integers"],
        floats=section["floats"],
        optional=section.get("optional", {}),
        rope=tuple(section.get("rope", ("default",))),
        requires=section.get("requires", {}),
        derived=section.get("derived", {}),
        full_attention_every=section.get("full_attention_every", 0),
        ignored_windows=tuple(section.get("ignored_windows", ())),
        wide_norms=section.get("wide_norms", False),
    )


def modules_of(family: Family, architecture: Architecture) -> tuple[str, ...]:
    """Every module of a block that has a weight of its own in the file, relative to the block; experts are stacked."""
    linears = tuple(linear for tap in architecture.taps for linear in tap.linears)
    experts = architecture.experts
    return family.norms + tuple(linear for linear in linears if not (experts and experts.expert_of(linear)))


def find(config: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path in config.json; None when a step is missing or null."""
    value: Any = config
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return None
        value = value[step]
    return value


def look_up(config: Mapping[str, Any], lookup: Lookup) -> int | float | None:
    """The first answer along `lookup`; None when there is none."""
    for step in lookup:
        if not isinstance(step, str):
            return step
        above, _, below = step.partition("/")
        value, divisor = find(config, above), find(config, below) if below else 1
        if _is_number(value) and _is_number(divisor) and divisor:
            return value // divisor if below else value  # type: ignore[no-any-return]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_requirements(family: Family, config: Mapping[str, Any], layers: int, where: str) -> None:
    """Raise UnsupportedError when config.json asks for a computation that the reader of this family does not do."""

    def refuse(path: str, value: object, taken: str) -> UnsupportedError:
        asked = repr(value) if len(repr(value)) <= 80 else "something else"
        what = f"config.json sets {path} to {asked}, and readers of GGUF compute {family.architecture} with {taken}"
        return UnsupportedError(where, what, "Choose another format for this model")

    for path, allowed in family.requires.items():
        value = find(config, path)
        if value is not None and value not in allowed:
            raise refuse(path, value, " or ".join(map(repr, allowed)))
    for path, rules in family.derived.items():
        value, derived = find(config, path), look_up(config, rules.get(layers, rules[0]))
        if value != derived:
            raise refuse(path, value, repr(derived))
    every = family.full_attention_every
    if every:
        kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
        taken = f"full attention in the last of every {every} layers, a sliding window in the others"
        for path, wanted in (("layer_types", kinds), ("sliding_window_pattern", every)):
            value = find(config, path)
            if value is not None and value != wanted:
                raise refuse(path, value, taken)


def unread(family: Family, config: Mapping[str, Any], context: int) -> tuple[str, ...]:
    """What config.json says and the reader does without, a sentence each; context is the declared context length."""
    windows = [look_up(config, [path]) for path in family.ignored_windows]
    return tuple(
        f"readers of GGUF let a token see all before it and not the last {window} only, so contexts longer than that "
        "give other results than in transformers"
        for window in windows
        if window is not None and window < context
    )


def hyper_parameters(family: Family, config: Mapping[str, Any], where: str) -> tuple[dict[str, int], dict[str, float]]:
    """Integers and floats by GGUF key, without the architecture's prefix.

    Raises SourceError when config.json lacks a value that has no default, or holds one that cannot be.
    """
    integers: dict[str, int] = {}
    for key, lookup in family.integers.items():
        value = look_up(config, lookup)
        if value is None or value != int(value) or not 0 < value < 1 << 32:
            raise _missing(where, key, lookup, value)
        integers[key] = int(value)
    for key, lookup in family.optional.items():
        value = look_up(config, lookup)
        if value is not None:
            integers[key] = int(value)
    floats: dict[str, float] = {}
    for key, lookup in family.floats.items():
        value = look_up(config, lookup)
        if value is None or value < 0:
            raise _missing(where, key, lookup, value)
        floats[key] = float(value)
    if integers["attention.head_count"] % integers["attention.head_count_kv"]:
        what = (
            f"config.json gives {integers['attention.head_count']} heads, which "
            f"{integers['attention.head_count_kv']} key-value heads do not divide"
        )
        raise SourceError(where, what, "Correct config.json")
    return integers, floats


def _missing(where: str, key: str, lookup: Lookup, value: object) -> SourceError:
    names = " or ".join(str(step) for step in lookup if isinstance(step, str))
    what = f"config.json has no {names}" if value is None else f"config.json gives {value} for {names}"
    return SourceError(where, f"{what} (GGUF's {key})", "Complete config.json from the model's original")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How positions are stretched: metadata by GGUF key, and one divisor per rotated frequency (empty: none)."""

    kind: str = ""
    factor: float = 0.0
    original_context: int = 0
    divisors: tuple[float, ...] = ()


def rope_scaling(
    family: Family, config: Mapping[str, Any], base: float, dimensions: int, context: int, where: str
) -> RopeScaling:
    """What config.json's rope scaling becomes; raises UnsupportedError for kinds that GGUF cannot say.

    base is the rope's base frequency, dimensions the rotated columns of a head, context the declared context length.
    Divisors: Llama 3.1's rule, as in transformers (modeling_rope_utils, "llama3").
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    settings = settings.get("full_attention", settings)  # Gemma 3; its layers with a window have none, see `requires`
    kind = settings.get("rope_type", settings.get("type")) or "default"
    partial = settings.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    unknown = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if settings.get(name) is not None]
    if kind not in family.rope or (partial is not None and partial != 1) or (kind != "default" and unknown):
        asked = (
            f"rope scaling '{kind}'"
            if kind not in family.rope
            else "a rope with " + ", ".join(unknown or ["partial_rotary_factor"])
        )
        what = f"config.json asks for {asked}; GGUF stores for {family.architecture}: {', '.join(family.rope)}"
        raise UnsupportedError(where, what, "Choose another format for this model")
    if kind == "default":
        return RopeScaling()
    try:
        factor = float(settings["factor"])
        if kind == "linear":
            return RopeScaling(kind=kind, factor=factor)
        original = int(settings.get("original_max_position_embeddings") or context)
        if kind == "yarn":
            return RopeScaling(kind=kind, factor=factor, original_context=original)
        low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"config.json's rope scaling '{kind}' is incomplete: {error}"
        raise SourceError(where, what, "Complete config.json from the model's original") from error
    divisors = tuple(
        _llama3_divisor(base ** (-2 * pair / dimensions), factor, low, high, original)
        for pair in range(dimensions // 2)
    )
    return RopeScaling(divisors=divisors)


def _llama3_divisor(frequency: float, factor: float, low: float, high: float, original: int) -> float:
    turns = original * frequency / (2 * math.pi)  # full rotations within the original context
    if turns > high:
        return 1.0
    if turns < low:
        return factor
    smooth = (turns - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)
