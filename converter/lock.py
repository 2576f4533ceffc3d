"""The lock file beside the results: which commits and which jobs, with every field as it was used.

A manifest says main and leaves fields out; the lock says which commit that was and what the defaults were, so that a
run can be repeated and a finished folder explained. It has no times in it: the same work gives the same bytes.
"""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from converter.errors import ManifestError
from converter.manifest import Calibration, Evaluation, Job, Manifest, Target
from converter.manifest_rules import GGUF_FIELDS, GRID_FIELDS, METHOD_OF_FIELD
from converter.marks import START, Fields, Items, Node, Problems, Text, parse, read_bytes, write_yaml
from converter.schemes import SCHEMES

VERSION = 1
MAX_BYTES = 64 << 20  # hubmill's own file: a line for each field of each job, so it outgrows what people write
MAX_VALUES = 4_000_000
REMEDY = "Remove the lock; the next run writes it anew"


@dataclass(frozen=True, kw_only=True)
class Lock:
    """What a lock file says; sources and commits go by the model's name, jobs are model/target."""

    manifest: str
    manifest_sha256: str
    sources: Mapping[str, str]
    commits: Mapping[str, str]
    jobs: tuple[str, ...]


def lock_text(
    manifest: Manifest, commits: Mapping[str, str], facts: Mapping[str, Mapping[str, object]] | None = None
) -> str:
    """Give the lock file's text.

    commits goes by the model's name; facts, by the job's key, are further values to put beside a job: keys, sizes.
    A model without a commit could not be opened, and is left out with its jobs.
    """
    jobs = [job for job in manifest.jobs() if job.model.name in commits]
    named = {job.model.name for job in jobs}
    models = [
        {"name": model.name, "source": portable(model.source, manifest), "commit": commits[model.name]}
        for model in manifest.models
        if model.name in named
    ]
    content: dict[str, object] = {
        "version": VERSION,
        "manifest": {"name": manifest.name, "sha256": manifest.sha256},
        "models": models,
        "calibration": _text_fields(manifest.calibration, manifest),
        "evaluation": _text_fields(manifest.evaluation, manifest),
        "jobs": [_job_fields(job, manifest) | dict((facts or {}).get(job.key, {})) for job in jobs],
    }
    return "# Written by hubmill: the commits and jobs of this folder.\n" + write_yaml(content)


def _job_fields(job: Job, manifest: Manifest) -> dict[str, object]:
    """Give the fields that have an effect on this job, defaults filled in."""
    imatrix = job.target.imatrix_file
    path = portable(f"file:{imatrix}", manifest) if imatrix else ""
    return {"model": job.model.name, "target": job.target.name} | effective_fields(job.target.with_defaults(), path)


def effective_fields(target: Target, imatrix: str) -> dict[str, object]:
    """Give the fields that have an effect on a target with defaults; imatrix: what to call its file, if it has one."""
    fields = target.model_dump(exclude={"name", "where", "methods", "rules"}, exclude_none=True)
    idle = {field for field, method in METHOD_OF_FIELD.items() if method not in target.methods}
    idle.update(GGUF_FIELDS if target.format in SCHEMES else GRID_FIELDS)
    if imatrix:
        fields["imatrix"] = imatrix
    rules = {"rules": {rule.pattern: rule.type for rule in target.rules}} if target.rules else {}
    effective = {key: value for key, value in fields.items() if key not in idle}
    return {"method": list(target.methods)} | effective | rules


def _text_fields(section: Calibration | Evaluation, manifest: Manifest) -> dict[str, object]:
    return section.model_dump(exclude={"keep"}) | {"text": portable(section.text, manifest)}


def portable(source: str, manifest: Manifest) -> str:
    """Give a source with its path relative to the manifest, so that two checkouts write the same lock."""
    kind, _, rest = source.partition(":")
    if kind not in ("folder", "file"):
        return source
    return f"{kind}:{Path(os.path.relpath(rest, os.path.abspath(manifest.path.parent))).as_posix()}"


def read_lock(path: Path) -> Lock | None:
    """Give what the lock file at `path` says, None when there is none; raises ManifestError when it is not a lock."""
    if not path.exists():
        return None
    problems = Problems(path)
    root = parse(read_bytes(path, problems, MAX_BYTES), problems, MAX_VALUES)
    problems.raise_if_any()
    try:
        version = _plain_text(root.entries["version"].value)
        if version != str(VERSION):
            problems.stop(START, f"the lock has version {version}, and this hubmill reads {VERSION}", REMEDY)
        return _lock(root)
    except (KeyError, TypeError) as error:
        raise ManifestError((f"{path}:1:1: the lock is damaged near {error}. {REMEDY}.",)) from error


def _lock(root: Fields) -> Lock:
    manifest = _fields(root.entries["manifest"].value)
    models = [_strings(item) for item in _items(root.entries["models"].value)]
    jobs = [_strings(item) for item in _items(root.entries["jobs"].value)]
    return Lock(
        manifest=_plain_text(manifest.entries["name"].value),
        manifest_sha256=_plain_text(manifest.entries["sha256"].value),
        sources={model["name"]: model["source"] for model in models},
        commits={model["name"]: model["commit"] for model in models},
        jobs=tuple(f"{job['model']}/{job['target']}" for job in jobs),
    )


def _plain_text(node: Node) -> str:
    if not isinstance(node, Text):
        raise TypeError(f"line {node.mark.line}")
    return node.text


def _fields(node: Node) -> Fields:
    if not isinstance(node, Fields):
        raise TypeError(f"line {node.mark.line}")
    return node


def _items(node: Node) -> tuple[Node, ...]:
    if not isinstance(node, Items):
        raise TypeError(f"line {node.mark.line}")
    return node.values


def _strings(node: Node) -> dict[str, str]:
    """Give the single values of a mapping; lists and mappings in it are left out."""
    return {key: entry.value.text for key, entry in _fields(node).entries.items() if isinstance(entry.value, Text)}
