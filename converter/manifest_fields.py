"""The fields of a manifest: names, types, defaults and descriptions, for Python and for editors.

These classes describe the file and are what the rest of hubmill holds; fields that a person does not write (a target's
name, which is its key) are left out of the JSON Schema. A second set of plain dataclasses would keep pydantic out of
the planner, at the price of saying every field twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, WithJsonSchema
from pydantic.functional_validators import AfterValidator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import ErrorDetails

from converter import manifest_rules, scalars
from converter.manifest_target import Name, Rule, String, Switch, Target, passes
from converter.marks import Text, quoted
from converter.scalars import RefusedError

__all__ = [
    "Calibration",
    "Evaluation",
    "Exclude",
    "Job",
    "Manifest",
    "Model",
    "Publish",
    "Rule",
    "Selection",
    "Sign",
    "Target",
]

Part = TypeVar("Part", bound=BaseModel)
Sequences = Annotated[int, Field(ge=1, le=1_000_000), BeforeValidator(scalars.whole)]
Length = Annotated[int, Field(ge=16, le=131_072), BeforeValidator(scalars.whole)]


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
    keep: Annotated[
        String,
        AfterValidator(scalars.folder_only),
        Field(description="folder:path, relative to the manifest, where statistics are kept for later manifests."),
    ] = ""
    skip_bad_rows: Annotated[
        Switch, Field(description="Leave out rows that overflow instead of failing the model.")
    ] = False
    precision: Annotated[
        Literal["auto", "f32", "bf16"],
        BeforeValidator(scalars.one_of(("auto", "f32", "bf16"))),
        Field(description="What the blocks' linears multiply in while the rows run through them."),
    ] = "auto"


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """The held-out text that artifacts are measured on; the defaults fit the built-in text."""

    text: Annotated[
        String,
        AfterValidator(scalars.text_source),
        Field(description="builtin, file:path, or hub:org/dataset@revision#column."),
    ] = "builtin"
    sequences: Annotated[Sequences, Field(description="Rows of tokens.")] = 16
    length: Annotated[Length, Field(description="Tokens in a row.")] = 256


class Sign(BaseModel, frozen=True, extra="forbid"):
    """How artifacts are signed."""

    key: Annotated[String, Field(description="File of the private key, PEM, relative to the manifest.")]


class Publish(BaseModel, frozen=True, extra="forbid"):
    """Where finished artifacts go."""

    hub: Annotated[
        String,
        AfterValidator(scalars.hub_target),
        Field(description="folder:path, relative to the manifest, or hf for the Hugging Face hub."),
    ]
    repo: Annotated[
        String,
        passes(manifest_rules.check_template),
        Field(description="Name of each repository, with {name}, {model} and {target} filled in."),
    ] = "{model}-{target}"
    private: Annotated[Switch, Field(description="Whether new repositories are private.")] = False
    branch: Annotated[
        String,
        passes(manifest_rules.check_branch),
        Field(description="Branch to commit to, made when it is not there; {name}, {model}, {target} are filled in."),
    ] = ""
    pull_request: Annotated[Switch, Field(description="Open a pull request in place of committing.")] = False
    collection: Annotated[
        String,
        passes(manifest_rules.check_collection),
        Field(description="Collection to put repositories into: its title, or the slug of one that is there."),
    ] = ""
    replace: Annotated[
        Switch, Field(description="Replace what is in a repository even when it is not of the same source.")
    ] = False
    sign: Annotated[Sign | None, Field(description="Sign each artifact; needs the extra hubmill[sign].")] = None

    def repo_of(self, manifest_name: str, job: Job) -> str:
        """Give the name of the repository that a job's artifact goes to."""
        return self._filled(self.repo, manifest_name, job)

    def branch_of(self, manifest_name: str, job: Job) -> str:
        """Give the branch that a job's artifact goes to, empty for the main one."""
        return self._filled(self.branch, manifest_name, job)

    def _filled(self, template: str, manifest_name: str, job: Job) -> str:
        return template.format(name=manifest_name, model=job.model.name, target=job.target.name)


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
    places: SkipJsonSchema[dict[str, str]] = {}  # file:line of calibration and evaluation, where they stand there
    expanded: SkipJsonSchema[tuple[Job, ...]] = ()

    def jobs(self) -> tuple[Job, ...]:
        """Give what there is to do, model by model in the order of the file, without what is excluded."""
        return self.expanded


@cache
def keys_of(part: type[BaseModel]) -> tuple[str, ...]:
    """Give the keys that a person may write in this part of the manifest."""
    hidden: object = SkipJsonSchema()  # type: ignore[type-arg]  # a mark, and of no type
    shown = {name: field for name, field in part.model_fields.items() if hidden not in field.metadata}
    return tuple(str(field.validation_alias or name) for name, field in shown.items())


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
    at = tuple(step for step in detail["loc"] if step != "[key]")  # what pydantic adds for the key of a mapping
    field = " ".join(map(_word, at))
    refused = detail.get("ctx", {}).get("error")
    if isinstance(refused, RefusedError):
        return manifest_rules.Finding(at=at, what=f"{field} {refused.what}", remedy=refused.remedy)
    if detail["type"] == "missing":
        return manifest_rules.Finding(at=at[:-1], what=f"{field} is missing", remedy=f"Add {field}:")
    given = detail["input"].text if isinstance(detail["input"], Text) else str(detail["input"])
    what = f"{field} {quoted(given)} {detail['msg'].replace('Input should', 'should')}"
    return manifest_rules.Finding(at=at, what=what, remedy=f"Change {field}")


def _word(step: int | str) -> str:
    """A step on the way to a field, in one line: a list's place, counted from 1, or a key."""
    if isinstance(step, int):
        return str(step + 1)
    return step if step.isprintable() else quoted(step)


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
