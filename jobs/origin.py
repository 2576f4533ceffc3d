"""What a finished job was made of, for its provenance.json: gathered while its tasks run, put together at the end.

Versions are recorded by every task and handed on to those that read it, so that an artifact whose blocks were rounded
before an upgrade and put together after it names both. Digests of a source's files are taken when it is fetched: a hub
states those of its large files, which are checked on arrival; everything else is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import PurePosixPath
from platform import python_version

from converter.folder import file_sha256
from converter.lock import effective_fields
from converter.manifest import Calibration, Evaluation
from converter.provenance import Conversion, Dependency, portable_source, source_dependencies
from converter.source import Snapshot, travels
from jobs.store import Store
from jobs.task import Task
from jobs.work import Work

PACKAGES = ("hubmill", "gguf", "numba", "numpy", "pyarrow", "safetensors", "tokenizers", "torch", "transformers")
Versions = Mapping[str, Sequence[str]]


@cache
def versions_here() -> Versions:
    """Of what takes part in a conversion, in this process."""
    return {"python": [python_version()]} | {name: [metadata.version(name)] for name in PACKAGES}


def versions_of(task: Task, store: Store) -> Versions:
    """Those of this process and of every task that led here."""
    found = {name: set(versions) for name, versions in versions_here().items()}
    for key in task.reads:
        for name, versions in store.record(key)["versions"].items():
            found.setdefault(name, set()).update(versions)
    return {name: sorted(versions) for name, versions in found.items()}


def file_digests(snapshot: Snapshot, threads: int, report: Callable[[float], None]) -> dict[str, str]:
    """The sha256 of every file that a conversion may read, by path, from the folder where they lie."""
    stated = {
        name: checksum.removeprefix("sha256:")
        for name, checksum in snapshot.checksums.items()
        if checksum.startswith("sha256:")
    }
    names = sorted(snapshot.weight_files | {name for name, size in snapshot.files.items() if travels(name, size)})
    unread = [name for name in names if name not in stated]
    total, done = max(1, sum(snapshot.files[name] for name in unread)), 0
    with ThreadPoolExecutor(threads) as pool:
        read = zip(unread, pool.map(lambda name: file_sha256(snapshot.folder / name), unread), strict=True)
        for name, sha256 in read:
            stated[name] = sha256
            done += snapshot.files[name]
            report(done / total)
    return {name: stated[name] for name in names}


def conversion(task: Task, store: Store) -> Conversion:
    """What the artifact of a finish task was made of and how; nothing in it is of one machine or one moment."""
    work = task.work
    assert isinstance(work, Work) and work.target is not None and work.artifact is not None
    snapshot, source = work.model.snapshot, portable_source(work.model.snapshot.source)
    recipes = task.spec["recipes"]
    assert isinstance(recipes, Mapping)
    texts = work.texts
    used: list[tuple[Calibration | Evaluation, str]] = [(texts.evaluation, texts.evaluation_sha256)]
    if "calibrate" in recipes:
        used.insert(0, (texts.calibration, texts.calibration_sha256))
    dependencies = [*source_dependencies(source, snapshot.commit, store.record(work.fetched)["sources"])]
    sections = {}
    for settings, sha256 in used if work.model.runs else ():
        section = type(settings).__name__.lower()
        sections[section] = settings.model_dump(mode="json", exclude={"keep"}) | {"text": _portable_text(settings.text)}
        # Of the token rows that were drawn, whatever the text around them.
        dependencies.append(Dependency(name=f"{section} rows", digest={"sha256": sha256}))
    imatrix = work.target.imatrix_file
    if imatrix:
        dependencies.append(Dependency(name=imatrix.name, digest={"sha256": work.artifact.imatrix_sha256}))
    return Conversion(
        source=source,
        parameters={
            "model": work.model.name,
            "target": {"name": work.target.name} | effective_fields(work.target, imatrix.name if imatrix else ""),
            **sections,
        },
        settings={"device": work.device, "recipes": dict(recipes)},
        dependencies=dependencies,
        versions=versions_of(task, store),
    )


def _portable_text(text: str) -> str:
    kind, _, rest = text.partition(":")
    return f"file:{PurePosixPath(rest).name}" if kind == "file" else text
