"""Whether anything has changed since a run did all that its manifest asks for: told in a moment, without a plan.

A plan opens every model and takes its texts through its tokenizer, and a schedule that comes back every night mostly
finds what it left. So a run that finished everything notes what it depended on and what it wrote, and the next one
compares first. The price is a second list of what a run depends on. It is coarse on purpose: any byte of our code or of
the manifest, any version of a library makes the next run plan in full, and so does whatever cannot be compared.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from converter.errors import HubmillError
from converter.folder import digest_folder, file_sha256, list_folder
from converter.manifest import Manifest
from jobs.store import Store, write_json

CommitOf = Callable[[str], str]  # of "folder:path", "hub:owner/name@revision" or "hub:owner/dataset@revision#column"
CODE = (".py", ".yaml", ".txt", ".html")


def note(store: Store, depends: dict[str, Any]) -> None:
    """Remember a run that did everything: what it depended on, and every file that now lies in its folder."""
    paths = [path for path in store.run.rglob("*") if path.is_file() and store.work not in path.parents]
    wrote = {path.relative_to(store.run).as_posix(): _seen(path) for path in sorted(paths)}
    write_json(store.settled, {"depends": depends, "wrote": wrote})


def unchanged(store: Store, manifest: Manifest, device: str, tell: Callable[[str], None]) -> bool:
    """Whether such a run is noted, and all is as it was then. tell: hears of waits for hubs."""
    try:
        noted = json.loads(store.settled.read_text("utf-8"))
        same = all(_seen(store.run / name) == seen for name, seen in noted["wrote"].items())
        published = all(place.exists() for place in _places(manifest))
        return same and published and bool(noted["depends"] == depends(manifest, device, lambda s: _commit(s, tell)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, HubmillError, metadata.PackageNotFoundError):
        return False  # the plan will do, or say what is wrong


def depends(manifest: Manifest, device: str, commit_of: CommitOf) -> dict[str, Any]:
    """What the results of a manifest depend on, as it is now."""
    texts = (manifest.calibration.text, manifest.evaluation.text)
    files = {text.removeprefix("file:") for text in texts if text.startswith("file:")}
    files |= {str(job.target.imatrix_file) for job in manifest.jobs() if job.target.imatrix_file}
    sources = {job.model.source for job in manifest.jobs()} | {text for text in texts if text.startswith("hub:")}
    sign = manifest.publish.sign if manifest.publish else None
    return {
        "code": _code_sha256(),
        "versions": {name: metadata.version(name) for name in _requirements()} | {"python": platform.python_version()},
        "manifest": [str(manifest.path.absolute()), manifest.sha256],
        "device": device,
        "hub": os.environ.get("HF_ENDPOINT", ""),
        "files": {file: file_sha256(Path(file)) for file in sorted(files)},
        "key": _seen(Path(sign.key)) if sign else [],  # not its digest: nothing of a key is written down
        "commits": {source: commit_of(source) for source in sorted(sources)},
    }


def _seen(path: Path) -> list[int]:
    """Size and time of change; what was hashed when it was written and has these still is the same."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _places(manifest: Manifest) -> Iterator[Path]:
    """Where artifacts lie on a hub that is a folder."""
    publish = manifest.publish
    if publish and publish.hub.startswith("folder:"):
        for job in manifest.jobs():
            yield Path(publish.hub.removeprefix("folder:")) / publish.repo_of(manifest.name, job)


def _commit(source: str, tell: Callable[[str], None]) -> str:
    scheme, _, name = source.partition(":")
    if scheme == "folder":
        root = Path(name).resolve()
        return digest_folder(root, list_folder(root, source))[:40]
    from converter.hub_calls import Patience, head  # brings the hub's client, which takes a second

    place, column, _ = name.partition("#")
    repo, _, revision = place.partition("@")
    return head(repo, "dataset" if column else "model", revision or None, Patience(tell=tell))


def _requirements() -> list[str]:
    """The packages that hubmill asks for, without those of its extras."""
    wanted = [line for line in metadata.requires("hubmill") or () if "extra ==" not in line]
    return [found[0] for line in wanted if (found := re.match(r"[\w.-]+", line))]


def _code_sha256() -> str:
    """A digest over every file of ours that runs or is read; packages are found and not imported, for numba's sake."""
    whole = hashlib.sha256()
    for package in ("converter", "jobs", "quantkernels"):
        spec = importlib.util.find_spec(package)
        root = Path(spec.origin or "").parent if spec else Path()
        for path in sorted(path for path in root.rglob("*") if path.suffix in CODE):
            whole.update(json.dumps([package, path.relative_to(root).as_posix(), file_sha256(path)]).encode())
    return whole.hexdigest()
