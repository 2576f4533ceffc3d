"""The fields of a manifest: names, types, defaults and descriptions, for Python and for editors.

These classes describe the file and are what the rest of hubmill holds; fields that a person does not write (a target's
name, which is its key) are left out of the JSON Schema. A second set of plain dataclasses would keep pydantic out of
the planner, at the price of saying every field twice.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic.functional_validators import AfterValidator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails

from converter import manifest_rules, scalars
from converter.marks import Text, quoted
from converter.scalars import RefusedError
from converter.schemes import ROUNDERS, SCHEMES, STORES, TRANSFORMS, Granularity, Observer

Part = TypeVar("Part", bound=BaseModel)


def _passes(check: Callable[[str], tuple[str, str] | None]) -> AfterValidator:
    """Turn a check that gives (what, remedy) or None into a validator."""

    def validate(value: str) -> str:
        if problem := check(value):
            raise RefusedError(*problem)
        return value

    return AfterValidator(validate)


def _ordered(methods: tuple[str, ...]) -> tuple[str, ...]:
    if problem := manifest_rules.check_order(methods):
        raise RefusedError(*problem)
    return methods


def _rule_list(value: object) -> object:
    if isinstance(value, dict):
        return [{"pattern": pattern, "type": type} for pattern, type in value.items()]
    if isinstance(value, tuple):
        return value
    raise RefusedError("is not a mapping", "Write pattern: type pairs, such as {lm_head: BF16}")


def _propagate(value: object) -> object:
    if scalars.text(value) == "quantized":
        raise RefusedError("'quantized' does not work yet", "Write original, or remove propagate")
    return scalars.one_of(("original",))(value)


# Limits stand before their reader: pydantic puts a limit into the JSON Schema only when nothing comes between.
String = Annotated[str, BeforeValidator(scalars.text)]
Name = Annotated[str, BeforeValidator(scalars.text), _passes(manifest_rules.check_name)]
Switch = Annotated[bool, BeforeValidator(scalars.switch)]
Sequences = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(scalars.whole)]
Length = Annotated[int, Field(ge=16, le=131_072), BeforeValidator(scalars.whole)]
METHOD_NAMES = TRANSFORMS + ROUNDERS
METHOD_SCHEMA = {"enum": list(METHOD_NAMES)}
GRID_STORES = tuple(name for schemes in SCHEMES.values() for name in schemes)
TYPE_STORES = tuple(name for format, names in STORES.items() if format not in SCHEMES for name in names)
RULE_TYPES = sorted({name for format in STORES for name in manifest_rules.rule_types(format)})


class Rule(BaseModel, frozen=True, extra="forbid"):
    """Another type for the tensors in whose checkpoint name the regular expression `pattern` is found."""

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
        Literal["gguf", "compressed-tensors", "parquet"],
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
        Field(validation_alias="method", description="A rounder, or a list: transforms first, one rounder last."),
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
    imatrix: Annotated[
        Switch, Field(description="Weigh errors by the importance of each input column, from calibration.")
    ] = False
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
    propagate: Annotated[
        Literal["original"],
        BeforeValidator(_propagate),
        Field(description="Which outputs the next block is calibrated on."),
    ] = "original"
    rules: Annotated[
        tuple[Rule, ...],
        BeforeValidator(_rule_list),
        WithJsonSchema({"type": "object", "additionalProperties": {"enum": RULE_TYPES}}),
        Field(description="Regular expression, searched in the checkpoint's tensor name: type. The first match wins."),
    ] = ()

    def rule_for(self, tensor: str) -> Rule | None:
        """Give the first rule whose pattern is found in the checkpoint's name of the tensor."""
        return next((rule for rule in self.rules if re.search(rule.pattern, tensor)), None)

    def with_defaults(self) -> Target:
        """Give the target with group_size, symmetric and granularity filled from its scheme; gguf has none of them."""
        scheme = SCHEMES.get(self.format, {}).get(self.scheme or "")
        if scheme is None:
            return self
        group_size = self.group_size or scheme.group_size
        granularity = self.granularity or ("group" if group_size else "channel")
        filled = {
            "granularity": granularity,
            "group_size": group_size if granularity == "group" else None,
            "symmetric": scheme.symmetric if self.symmetric is None else self.symmetric,
        }
        return self.model_copy(update=filled)


class Selection(BaseModel, frozen=True, extra="forbid"):
    """A change to the list of all targets, for one model."""

    add: Annotated[
        dict[str, Target], Field(description="Targets for this model only: name, then fields as in targets.")
    ] = {}
    remove: Annotated[tuple[Name, ...], Field(description="Targets that this model does not get.")] = ()


class Model(BaseModel, frozen=True, extra="forbid"):
    """A model to convert.

    After load(), source is folder:/absolute/path or hub:org/name@revision, and name is unique in the manifest.
    """

    source: Annotated[
        String,
        AfterValidator(scalars.folder_or_hub),
        Field(description="folder:path, relative to the manifest, or hub:org/name@revision."),
    ]
    name: Annotated[
        Name, Field(description="Name of its output folder; the last part of the source when left out.")
    ] = ""
    targets: Annotated[
        tuple[Name, ...] | Selection | None,
        Field(description="Names of its targets, or {add, remove}; all targets when left out."),
    ] = None
    overrides: Annotated[
        dict[str, Any],
        WithJsonSchema({"type": "object", "additionalProperties": {"type": "object"}}),
        Field(description="Fields of targets that differ for this model: target, then fields. null: back to default."),
    ] = {}

    @property
    def folder(self) -> Path | None:
        """The folder it is read from, None when it comes from a hub."""
        kind, _, rest = self.source.partition(":")
        return Path(rest) if kind == "folder" else None

    @property
    def owner(self) -> str:
        """The organisation on the hub, or the name of the folder around a folder."""
        return self.folder.parent.name if self.folder else self.source.removeprefix("hub:").partition("/")[0]


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """The text that statistics are collected on; the defaults fit the built-in text, whatever the tokenizer."""

    text: Annotated[
        String,
        AfterValidator(scalars.text_source),
        Field(description="builtin, file:path, or hub:org/dataset@revision#column."),
    ] = "builtin"
    sequences: Annotated[Sequences, Field(description="Rows of tokens.")] = 32
    length: Annotated[Length, Field(description="Tokens in a row.")] = 256
    seed: Annotated[
        int,
        Field(ge=0),
        BeforeValidator(scalars.whole),
        Field(description="Which rows are drawn from a longer text."),
    ] = 0
    skip_bad_rows: Annotated[
        Switch, Field(description="Leave out rows that overflow instead of failing the model.")
    ] = False


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """The held-out text that artifacts are measured on; the defaults fit the built-in text."""

    text: Annotated[
        String,
        AfterValidator(scalars.text_source),
        Field(description="builtin, file:path, or hub:org/dataset@revision#column."),
    ] = "builtin"
    sequences: Annotated[Sequences, Field(description="Rows of tokens.")] = 16
    length: Annotated[Length, Field(description="Tokens in a row.")] = 256


class Publish(BaseModel, frozen=True, extra="forbid"):
    """Where finished artifacts go."""

    hub: Annotated[
        String,
        AfterValidator(scalars.hub_target),
        Field(description="folder:path, relative to the manifest, or hf for the Hugging Face hub."),
    ]
    repo: Annotated[
        String,
        _passes(manifest_rules.check_template),
        Field(description="Name of each repository, with {name}, {model} and {target} filled in."),
    ] = "{model}-{target}"
    private: Annotated[Switch, Field(description="Whether new repositories are private.")] = False

    def repo_of(self, manifest_name: str, job: Job) -> str:
        """Give the name of the repository that a job's artifact goes to."""
        return self.repo.format(name=manifest_name, model=job.model.name, target=job.target.name)


class Exclude(BaseModel, frozen=True, extra="forbid"):
    """Jobs to leave out: those of a model, of a target, or of the two together."""

    model: Annotated[String | None, BeforeValidator(scalars.optional(scalars.text))] = None
    target: Annotated[String | None, BeforeValidator(scalars.optional(scalars.text))] = None

    def covers(self, job: Job) -> bool:
        """Say whether the job is left out; an Exclude that names nothing covers nothing."""
        fits = self.model in (None, job.model.name) and self.target in (None, job.target.name)
        return fits and (self.model, self.target) != (None, None)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model in one target, the model's overrides applied."""

    model: Model
    target: Target

    @property
    def key(self) -> str:
        return f"{self.model.name}/{self.target.name}"


class Manifest(BaseModel, frozen=True, extra="forbid"):
    """Models and the targets that each of them is converted to."""

    name: Annotated[Name, Field(description="Name of the run and of its folder under out/.")]
    models: Annotated[tuple[Model, ...], Field(json_schema_extra={"minItems": 1}, description="What to convert.")]
    targets: Annotated[
        dict[str, Target],
        Field(
            json_schema_extra={"minProperties": 1},
            description="What to convert every model to: name, then fields.",
        ),
    ]
    calibration: Calibration = Calibration()
    evaluation: Evaluation = Evaluation()
    publish: Annotated[Publish | None, Field(description="Where to; nothing is published when left out.")] = None
    exclude: Annotated[tuple[Exclude, ...], Field(description="Jobs to leave out.")] = ()
    path: SkipJsonSchema[Path]
    sha256: SkipJsonSchema[str]  # of the manifest's bytes
    expanded: SkipJsonSchema[tuple[Job, ...]] = ()

    def jobs(self) -> tuple[Job, ...]:
        """Give what there is to do, model by model in the order of the file, without what is excluded."""
        return self.expanded


@cache
def keys_of(part: type[BaseModel]) -> tuple[str, ...]:
    """Give the keys that a person may write in this part of the manifest."""
    return tuple(part.model_json_schema()["properties"])


def read_part(part: type[Part], values: Mapping[str, object]) -> tuple[Part | None, list[manifest_rules.Finding]]:
    """Give the part and what is wrong with its fields; wrong fields are left at their defaults.

    The part is None when a required field is missing or wrong.
    """
    try:
        return part.model_validate(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    findings = [_finding(detail) for detail in details]
    wrong = {detail["loc"][0] for detail in details}
    try:
        return part.model_validate({key: value for key, value in values.items() if key not in wrong}), findings
    except ValidationError:
        return None, findings


def _finding(detail: ErrorDetails) -> manifest_rules.Finding:
    at = tuple(detail["loc"])
    field = " ".join(str(step + 1) if isinstance(step, int) else step for step in at)
    refused = detail.get("ctx", {}).get("error")
    if isinstance(refused, RefusedError):
        return manifest_rules.Finding(at=at, what=f"{field} {refused.what}", remedy=refused.remedy)
    if detail["type"] == "missing":
        return manifest_rules.Finding(at=at[:-1], what=f"{field} is missing", remedy=f"Add {field}:")
    given = detail["input"].text if isinstance(detail["input"], Text) else str(detail["input"])
    what = f"{field} {quoted(given)} {detail['msg'].replace('Input should', 'should')}"
    return manifest_rules.Finding(at=at, what=what, remedy=f"Change {field}")


def json_schema() -> str:
    """Give the JSON Schema of the manifest, the text of manifests/schema.json."""
    schema = Manifest.model_json_schema()
    target = schema["$defs"]["Target"]
    override = {key: value for key, value in target.items() if key not in ("required", "allOf")}
    override["properties"] = {
        key: {"anyOf": [value, {"type": "null"}], "description": value["description"]}
        for key, value in target["properties"].items()
        if key != "format"
    }
    schema["$defs"]["Override"] = override | {"title": "Override", "description": "Fields of a target that differ."}
    schema["$defs"]["Model"]["properties"]["overrides"]["additionalProperties"] = {"$ref": "#/$defs/Override"}
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
