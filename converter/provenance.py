"""What an artifact was made of and how: provenance.json beside its files, in the field names of in-toto and SLSA.

The statement is about every other file of the artifact, by sha256. What SLSA 1.x offers and is left out: invocationId,
startedOn and finishedOn, because the same work must give the same bytes on every machine and day, and byproducts,
because the comparison holds them. A signature is a file of its own (see converter/signing.py), over this one too.
Source: https://slsa.dev/spec/v1.1/provenance, https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import quote

from converter.errors import SourceError
from converter.untrusted import load_json

FILE = "provenance.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:hubmill:convert:1"
BUILDER = "urn:hubmill"
LIMIT_BYTES = 64 << 20  # of a file that is read as provenance


@dataclass(frozen=True, kw_only=True)
class Dependency:
    """Something that the artifact was made of; digests by algorithm, as in-toto names them (sha256, gitCommit)."""

    name: str
    digest: Mapping[str, str]
    uri: str = ""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One job as it was done.

    source: hub:owner/name or folder:name. parameters: what the manifest asks for; settings: what hubmill itself
    decided. versions: of each package that took part, more than one where tasks ran under several.
    """

    source: str
    parameters: Mapping[str, object]
    settings: Mapping[str, object]
    dependencies: Sequence[Dependency]
    versions: Mapping[str, Sequence[str]]


def portable_source(source: str) -> str:
    """The source without the places of one machine: hub:owner/name as it is, of a folder its name."""
    kind, _, rest = source.partition(":")
    return f"folder:{PurePosixPath(rest).name}" if kind == "folder" else source


def source_dependencies(source: str, commit: str, digests: Mapping[str, str]) -> Iterator[Dependency]:
    """The model at its commit, then its files with their sha256 (hex), by path; source is portable."""
    kind, _, name = source.partition(":")
    whole = f"pkg:huggingface/{quote(name)}@{commit}" if kind == "hub" else f"folder:{quote(name)}"
    # What stands for the commit of a folder is hubmill's own digest (converter/folder.py).
    yield Dependency(name=source, uri=whole, digest={"gitCommit" if kind == "hub" else "hubmillFolder": commit})
    for path, sha256 in sorted(digests.items()):
        yield Dependency(name=path, uri=f"{whole}#{quote(path)}", digest={"sha256": sha256})


def statement(files: Mapping[str, str], made: Conversion) -> str:
    """The text of provenance.json: a statement about these files (path -> sha256, hex)."""
    dependencies = [
        {"name": one.name, "digest": dict(one.digest)} | ({"uri": one.uri} if one.uri else {})
        for one in made.dependencies
    ]
    content = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": path, "digest": {"sha256": sha256}} for path, sha256 in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {"source": made.source, **made.parameters},
                "internalParameters": dict(made.settings),
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {
                    "id": BUILDER,
                    "version": {name: ", ".join(sorted(found)) for name, found in made.versions.items()},
                },
            },
        },
    }
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a provenance.json says: the sha256 of each file, the source, and the target's format."""

    files: Mapping[str, str]
    source: str
    format: str


def read_statement(data: bytes) -> Read | None:
    """What was written by `statement`; None when it is anything else, or damaged."""
    try:
        content = load_json(data, FILE)
        predicate = content["predicate"]
        parameters = predicate["buildDefinition"]["externalParameters"]
        files = {one["name"]: one["digest"]["sha256"] for one in content["subject"]}
        read = Read(files=files, source=parameters["source"], format=parameters["target"]["format"])
        ours = predicate["runDetails"]["builder"]["id"] == BUILDER and content["predicateType"] == PREDICATE_TYPE
    except (SourceError, KeyError, TypeError):
        return None
    texts = [*files, *files.values(), read.source, read.format]
    return read if ours and all(isinstance(text, str) for text in texts) else None
