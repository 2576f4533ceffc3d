"""The fields of a target, for Python and for editors: a format, what to store in it, and how to get there.

Every format's keys stand in one class, and manifest_rules.py says which of them a format takes, so that a key in the
wrong place is named and placed. A class for each format would let the type checker see who has what, at the price of
messages that speak of unions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic.functional_validators import AfterValidator
from pydantic.json_schema import SkipJsonSchema

from converter import manifest_rules, scalars
from converter.scalars import RefusedError
from converter.schemes import (
    CACHES,
    FALLBACK_ANSWERS,
    GGUF_TENSOR_TYPES,
    ROUNDERS,
    SCHEMES,
    SEARCHES,
    STORES,
    TRANSFORMS,
    Activations,
    Granularity,
    Observer,
)


def passes(check: Callable[[str], tuple[str, str] | None]) -> AfterValidator:
    """Turn a check that gives (what, remedy) or None into a validator."""

    def validate(value: str) -> str:
        if problem := check(value):
            raise RefusedError(*problem)
        return value

    return AfterValidator(validate)


def _ordered(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods in an order that works; transforms alone, as people write them, are followed by rtn."""
    if methods and not {*methods} & {*ROUNDERS}:
        methods += ("rtn",)
    if problem := manifest_rules.check_order(methods):
        raise RefusedError(*problem)
    return methods


def _rule_list(value: object) -> object:
    if isinstance(value, dict):
        return [{"pattern": pattern, "type": type} for pattern, type in value.items()]
    if isinstance(value, tuple):
        return value
    raise RefusedError("is not a mapping", "Write pattern: type pairs, such as {lm_head: BF16}")


# Limits stand before their reader: pydantic puts a limit into the JSON Schema only when nothing comes between.
String = Annotated[str, BeforeValidator(scalars.text)]
Name = Annotated[str, BeforeValidator(scalars.text), passes(manifest_rules.check_name)]
Switch = Annotated[bool, BeforeValidator(scalars.switch)]
METHOD_NAMES = TRANSFORMS + ROUNDERS
METHOD_SCHEMA = {"enum": list(METHOD_NAMES)}
GRID_STORES = tuple(name for schemes in SCHEMES.values() for name in schemes)
TYPE_STORES = tuple(name for format, names in STORES.items() if format not in SCHEMES for name in names)
TensorType = Annotated[
    str | None,
    BeforeValidator(scalars.optional(scalars.one_of(GGUF_TENSOR_TYPES))),
    WithJsonSchema({"enum": list(GGUF_TENSOR_TYPES)}),
]
MetadataKey = Annotated[str, passes(manifest_rules.check_metadata_key)]
MetadataValue = Annotated[
    str | int | float | bool,
    BeforeValidator(scalars.value),
    WithJsonSchema({"type": ["string", "integer", "number", "boolean"]}),
]
RULE_TYPES = sorted({name for format in STORES for name in manifest_rules.rule_types(format)})


class Rule(BaseModel, frozen=True, extra="forbid"):
    """Another type for the tensors in whose name the regular expression `pattern` is found."""

    pattern: String
    type: String


def _target_schema(schema: dict[str, Any]) -> None:
    """Say in the schema which key, type or scheme, each format takes, and with which values."""
    cases = []
    for format, stores in STORES.items():
        key = manifest_rules.scheme_key(format)
        then = {"required": [key], "properties": {key: {"enum": list(stores)}}}
        cases.append({"if": {"properties": {"format": {"const": format}}, "required": ["format"]}, "then": then})
    schema["allOf"] = cases


class Target(
    BaseModel,
    frozen=True,
    extra="forbid",
    validate_by_name=True,
    validate_by_alias=True,
    json_schema_extra=_target_schema,
):
    """A format, what to store in it, and how to get there."""

    name: SkipJsonSchema[str]
    where: SkipJsonSchema[str] = ""  # file:line of the target's key
    format: Annotated[
        Literal[
            "gguf",
            "compressed-tensors",
            "gptq",
            "gptq_v2",
            "auto-round",
            "awq",
            "bitsandbytes",
            "fp8",
            "torchao",
            "parquet",
        ],
        BeforeValidator(scalars.one_of(tuple(STORES))),
        Field(description="The container to write."),
    ]
    type: Annotated[
        str | None,
        BeforeValidator(scalars.optional(scalars.text)),
        WithJsonSchema({"enum": list(TYPE_STORES)}),
        Field(description="gguf: the type of the file."),
    ] = None
    scheme: Annotated[
        str | None,
        BeforeValidator(scalars.optional(scalars.text)),
        WithJsonSchema({"enum": list(GRID_STORES)}),
        Field(description="compressed-tensors and parquet: bits of weights and activations."),
    ] = None
    methods: Annotated[
        tuple[Annotated[str, BeforeValidator(scalars.one_of(METHOD_NAMES))], ...],
        BeforeValidator(scalars.one_or_many),
        AfterValidator(_ordered),
        WithJsonSchema({"anyOf": [METHOD_SCHEMA, {"type": "array", "items": METHOD_SCHEMA}]}),
        Field(
            validation_alias="method",
            description="A rounder, or a list: transforms first, one rounder last; rtn where none is named.",
        ),
    ] = ("rtn",)
    group_size: Annotated[
        Annotated[int, Field(ge=1, le=65_536)] | None,
        BeforeValidator(scalars.optional(scalars.whole)),
        Field(description="Input columns that share a scale; the scheme's own when left out."),
    ] = None
    symmetric: Annotated[
        bool | None,
        BeforeValidator(scalars.optional(scalars.switch)),
        Field(description="Whether zero is in the middle of the codes; the scheme's own when left out."),
    ] = None
    granularity: Annotated[
        Granularity | None,
        BeforeValidator(scalars.optional(scalars.one_of(get_args(Granularity)))),
        Field(description="What shares a scale; group where there is a group size, otherwise channel."),
    ] = None
    observer: Annotated[
        Observer,
        BeforeValidator(scalars.one_of(get_args(Observer))),
        Field(description="How the range of a grid is found."),
    ] = "mse"
    activation_observer: Annotated[
        Observer | None,
        BeforeValidator(scalars.optional(scalars.one_of(get_args(Observer)))),
        Field(
            description="How the range of inputs is found that a scheme fixes beforehand; mse for integers and minmax "
            "for floats when left out."
        ),
    ] = None
    kv_cache: Annotated[
        str | None,
        BeforeValidator(scalars.optional(scalars.one_of(tuple(CACHES)))),
        WithJsonSchema({"enum": list(CACHES)}),
        Field(description="How keys and values are kept: with one scale a layer, or one for each head of it."),
    ] = None
    imatrix: Annotated[
        bool | str,
        BeforeValidator(scalars.switch_or_path),
        WithJsonSchema({"type": ["boolean", "string"]}),
        Field(
            description="Weigh errors by the importance of each input column: true, from calibration; "
            "gguf: or an imatrix file, its path relative to the manifest."
        ),
    ] = False  # after load() an absolute path
    smoothing_strength: Annotated[
        float,
        Field(ge=0, le=1),
        BeforeValidator(scalars.real),
        Field(description="smoothquant: the share of the activations' range moved into the weights."),
    ] = 0.8
    damping: Annotated[
        float,
        Field(gt=0, le=1),
        BeforeValidator(scalars.real),
        Field(description="gptq: added to the Hessian's diagonal, as a share of its mean."),
    ] = 0.01
    iterations: Annotated[
        Annotated[int, Field(ge=1, le=100_000)],
        BeforeValidator(scalars.whole),
        Field(description="autoround: steps for each block."),
    ] = 200
    batch_size: Annotated[
        Annotated[int, Field(ge=1, le=65_536)],
        BeforeValidator(scalars.whole),
        Field(description="autoround: calibration sequences that a step sees."),
    ] = 8
    learning_rate: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None,
        BeforeValidator(scalars.optional(scalars.real)),
        Field(description="autoround: how far the first step goes, in codes; 1 / iterations when left out."),
    ] = None
    propagate: Annotated[
        Literal["original", "quantized"],
        BeforeValidator(scalars.one_of(("original", "quantized"))),
        Field(description="Which outputs the next block is calibrated on: the original's, or the target's own."),
    ] = "original"
    rules: Annotated[
        tuple[Rule, ...],
        BeforeValidator(_rule_list),
        WithJsonSchema({"type": "object", "additionalProperties": {"enum": RULE_TYPES}}),
        Field(
            description="Regular expression, searched in the checkpoint's tensor name (gguf: in the file's name too): "
            "type. The first match wins."
        ),
    ] = ()
    search: Annotated[
        Literal["ggml", "thorough"],
        BeforeValidator(scalars.one_of(SEARCHES)),
        Field(description="gguf: how scales and codes are found: as ggml does, byte for byte, or at a lower error."),
    ] = "ggml"
    output_type: Annotated[
        TensorType, Field(description="gguf: the type of the output head; of the embedding where that is the head.")
    ] = None
    embedding_type: Annotated[TensorType, Field(description="gguf: the type of the token embedding.")] = None
    pure: Annotated[
        Switch, Field(description="gguf: every tensor in the base type of the file's type, without its mixture.")
    ] = False
    fallback: Annotated[
        Literal["allow", "refuse"],
        BeforeValidator(scalars.one_of(FALLBACK_ANSWERS)),
        Field(description="gguf: what to do where a tensor's rows do not fill the blocks of its type."),
    ] = "allow"
    requantize: Annotated[
        Switch, Field(description="gguf: whether a source whose weights are quantized already may be quantized again.")
    ] = False
    split_tensors: Annotated[
        Annotated[int, Field(ge=1, le=65_535)] | None,
        BeforeValidator(scalars.optional(scalars.whole)),
        Field(description="gguf: the most tensors that one file of several holds."),
    ] = None
    split_size: Annotated[
        str | None,
        BeforeValidator(scalars.optional(scalars.size)),
        WithJsonSchema({"type": "string", "pattern": scalars.SIZE}),
        Field(description="gguf: the most bytes of tensors that one file of several holds: 500M, 2G."),
    ] = None
    metadata: Annotated[
        dict[MetadataKey, MetadataValue],
        Field(description="gguf: keys of the file's metadata that get another value, or are added."),
    ] = {}

    def rule_for(self, *names: str) -> Rule | None:
        """Give the first rule whose pattern is found in any of the tensor's names: the checkpoint's, the file's."""
        return next((rule for rule in self.rules if any(re.search(rule.pattern, name) for name in names)), None)

    @property
    def weighs_columns(self) -> bool:
        """Whether errors are weighed by importance, wherever that comes from."""
        return self.imatrix is not False

    @property
    def collects_imatrix(self) -> bool:
        """Whether importance comes from the calibration pass."""
        return self.imatrix is True

    @property
    def fixes_inputs(self) -> bool:
        """Whether calibration fixes how inputs are quantized."""
        return bool(self.static_inputs)

    @property
    def fixes_ranges(self) -> bool:
        """Whether calibration fixes how inputs, or keys and values, are quantized."""
        return self.fixes_inputs or self.kv_cache is not None

    @property
    def static_inputs(self) -> list[Activations]:
        """How inputs are quantized by those of its schemes that fix their range beforehand."""
        schemes = SCHEMES.get(self.format, {})
        asked = [schemes[name] for name in (self.scheme, *(rule.type for rule in self.rules)) if name in schemes]
        return [scheme.activations for scheme in asked if scheme.activations and scheme.activations.static]

    @property
    def input_observer(self) -> Observer:
        """How the range of inputs is found; minmax doubles the divergence of integers (measured)."""
        integers = all(one.values == "int" for one in self.static_inputs)
        return self.activation_observer or ("mse" if integers else "minmax")

    @property
    def counts_inputs(self) -> bool:
        """Whether that takes more of calibration than the smallest and the largest input."""
        return self.fixes_inputs and self.input_observer != "minmax"

    @property
    def has_chain(self) -> bool:
        """Whether its blocks are calibrated on the hidden states that its own quantized blocks give."""
        return self.propagate == "quantized"

    @property
    def imatrix_file(self) -> Path | None:
        """The file that importance comes from, None when there is none."""
        return Path(self.imatrix) if isinstance(self.imatrix, str) else None

    @property
    def split_bytes(self) -> int | None:
        """split_size in bytes; K, M and G are decimal, as for llama.cpp."""
        return scalars.size_bytes(self.split_size) if self.split_size else None

    def with_defaults(self) -> Target:
        """Give the target with group_size, symmetric and granularity filled from its scheme; gguf has none of them.

        There gptq and autoround bring their statistics, and so importance: the search for scales always weighs with it.
        awq does so everywhere: 4 bits on statistics without it err by up to a quarter more (outputs of linears,
        measured).
        """
        scheme = SCHEMES.get(self.format, {}).get(self.scheme or "")
        if scheme is None:
            weighs = self.weighs_columns or bool({*self.methods} & {"gptq", "autoround"})
            return self.model_copy(update={"imatrix": True}) if weighs and not self.imatrix else self
        group_size = self.group_size or scheme.group_size
        granularity = self.granularity or ("group" if group_size and not scheme.block else scheme.granularity)
        filled = {
            "granularity": granularity,
            "group_size": group_size if granularity == "group" else None,
            "symmetric": scheme.symmetric if self.symmetric is None else self.symmetric,
            "imatrix": self.imatrix or "awq" in self.methods,
            "activation_observer": self.input_observer if self.fixes_inputs else None,
        }
        changed = {name: value for name, value in filled.items() if getattr(self, name) != value}
        return self.model_copy(update=changed) if changed else self
