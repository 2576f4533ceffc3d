"""Whether what lies somewhere is what was made: a run, one artifact anywhere, or one on a hub.

Every file is hashed against the list that travels with the artifact (provenance.json) and, in a run, against
comparison.json; then the artifact is opened by the reader of its format, as it was before it was measured. With a
public key the signature is checked, which tells a list that somebody wrote anew. A hub is asked for its own checksums
first, so that what is wrong there is told before gigabytes come.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converter import hub, provenance, signing
from converter.compare.tables import TABLES, read_comparison, read_table
from converter.containers.gguf.imatrix import open_imatrix
from converter.containers.tables import CONTAINERS
from converter.errors import HubmillError, SourceError
from converter.folder import check_path
from converter.lock import read_lock
from converter.untrusted import load_json, read_small
from jobs.store import Store

Progress = Callable[[str, float], None]  # told what is looked at, and how far all of it is, 0 to 1
AGAIN = "Remove it and run hubmill convert again"
CHUNK_BYTES = 4 << 20
FETCH = "Fetch it again from where it was published"


@dataclass(kw_only=True)
class Verified:
    """What was found: each problem a sentence with its remedy; notes are no problems."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    artifacts: int = 0
    files: int = 0
    size_bytes: int = 0


def verify(place: str, out: Path, key: Path | None = None, progress: Progress | None = None) -> Verified:
    """Look at a run's folder, an artifact's folder, or hub:owner/name[@revision], whose files are kept below `out`.

    key: the public key that signatures must be of. Raises SourceError when nothing there says what should be there.
    """
    look = _Look(key=key, progress=progress or (lambda what, fraction: None))
    folder = Path(place.removeprefix("folder:"))
    if place.startswith("hub:"):
        look.repo(place, out)
    elif (folder / "comparison.json").is_file():
        look.run(folder)
    elif (folder / provenance.FILE).is_file():
        look.artifact(folder, FETCH)
    else:
        what = f"there is neither comparison.json nor {provenance.FILE}, so nothing says what should be there"
        raise SourceError(
            place, what, "Name a run's folder such as out/quickstart, or an artifact's, or hub:owner/name"
        )
    return look.found


class _Look:
    """One verification."""

    def __init__(self, *, key: Path | None, progress: Progress) -> None:
        self.found = Verified()
        self._key = key
        self._progress = progress
        self._todo_bytes = 0
        self._sums: dict[Path, str] = {}

    def say(self, path: object, what: str, remedy: str) -> None:
        self.add(f"{path}: {what}. {remedy}.")

    def add(self, problem: str) -> None:
        if problem not in self.found.problems:  # a run's list and an artifact's own may both name a file
            self.found.problems.append(problem)

    def run(self, run: Path) -> None:
        """All artifacts of a run, and the files beside them."""
        comparison = read_comparison(run)
        assert comparison is not None, "the caller has looked"
        rows = [row for row in comparison["artifacts"] if row.get("files")]
        self._todo_bytes = max(1, sum(item["bytes"] for row in rows for item in row["files"]))
        for row in rows:
            folder = run / row["model"] / row["target"]
            listed = {item["path"]: item["sha256"] for item in row["files"]}
            whole = self.files(folder, listed, AGAIN)
            if provenance.FILE in listed and folder.is_dir():
                self.artifact(folder, AGAIN)
            elif whole:
                self.opened(folder, row["format"], AGAIN)
        for name in TABLES:
            self.readable(run / name, read_table)
        self.readable(run / "manifest.lock.yaml", read_lock)
        for model in {row["model"] for row in rows}:
            if (run / model / "imatrix.gguf").exists():
                self.readable(run / model / "imatrix.gguf", open_imatrix)

    def artifact(self, folder: Path, remedy: str) -> None:
        """One artifact by its own list."""
        self.found.artifacts += 1
        path = folder / provenance.FILE
        made = _statement(path)
        if made is None:
            self.say(path, "is no statement of hubmill, or was damaged", remedy)
            return
        if not self._todo_bytes:
            there = [folder / name for name in made.files if (folder / name).is_file()]
            self._todo_bytes = max(1, sum(one.stat().st_size for one in there))
        whole = self.files(folder, made.files, remedy)
        for name in _visible(folder) - set(made.files) - {provenance.FILE, signing.FILE}:
            self.say(folder / name, "is there but was not made with the rest", f"Remove it, or {_lowered(remedy)}")
        if whole:
            self.opened(folder, made.format, remedy)
        self.signature(folder)

    def files(self, folder: Path, listed: Mapping[str, str], remedy: str) -> bool:
        """Every listed file against its sha256; whether all are there and whole."""
        whole = True
        for name, sha256 in sorted(listed.items()):
            try:
                check_path(name, str(folder))
            except SourceError as error:
                self.add(str(error))
                whole = False
                continue
            path = folder / name
            if not path.is_file():
                self.say(path, "is missing", remedy if remedy == FETCH else "Run hubmill convert again")
            elif self.sha256(path) != sha256:
                self.say(path, "is not what was written", remedy)
            else:
                continue
            whole = False
        return whole

    def sha256(self, path: Path) -> str:
        """The file's sha256, which is taken once."""
        if path not in self._sums:

            def count(size_bytes: int) -> None:
                self.found.size_bytes += size_bytes
                self._progress(path.name, min(1.0, self.found.size_bytes / max(1, self._todo_bytes)))

            self._sums[path] = hash_file(path, count)
            self.found.files += 1
        return self._sums[path]

    def opened(self, folder: Path, format: str, remedy: str) -> None:
        """The artifact by the reader of its format, and its small files as what they are."""
        if format not in CONTAINERS:
            self.say(folder, f"is of the format '{format}', which this hubmill does not know", "Use a newer one")
            return
        try:
            if not CONTAINERS[format].open(folder, None).names:
                self.say(folder, "holds no tensors", remedy)
        except HubmillError as error:
            self.add(str(error))
        for name in sorted(name for name in _visible(folder) if name.endswith(".json")):
            self.readable(folder / name, lambda path: load_json(read_small(path, str(path)), str(path)), remedy)

    def readable(self, path: Path, read: Callable[[Path], object], remedy: str = AGAIN) -> None:
        """One file by its reader."""
        if not path.is_file():
            self.say(path, "is missing", "Run hubmill convert again")
            return
        try:
            read(path)
        except HubmillError as error:
            self.add(str(error))
        except (ValueError, OSError, RecursionError) as error:  # of json and of pyarrow
            self.say(path, f"cannot be read ({type(error).__name__})", remedy)

    def signature(self, folder: Path) -> None:
        signed = (folder / signing.FILE).is_file()
        if self._key is None:
            self.found.notes += [f"{folder} is signed; --key PUBLIC.pem checks by whom"] if signed else []
        elif not signed:
            self.say(folder, "is not signed", "Ask who published it, or leave out --key")
        elif wrong := signing.check_signature(folder, self._key):
            self.say(folder / signing.FILE, wrong, "Do not use it before its publisher explains that")

    def repo(self, source: str, out: Path) -> None:
        """One artifact on a hub: its checksums there, then the files themselves, which are kept below `out`."""
        name, _, revision = source.removeprefix("hub:").partition("@")
        remote = hub.find(name, revision or None, source)
        folder = remote.folder(Store(run=(out / name.rpartition("/")[2]).absolute()).downloads)
        self.found.notes.append(f"{remote.kind} {remote.repo} at commit {remote.commit}")
        if provenance.FILE not in remote.sizes:
            what = f"there is no {provenance.FILE}, so nothing says what should be there"
            raise SourceError(source, what, "Name a repository that hubmill published, or its branch after an @")
        hub.bring_files(remote, [provenance.FILE], folder, source)
        made = _statement(folder / provenance.FILE)
        if made is None:
            self.say(f"{source}: {provenance.FILE}", "is no statement of hubmill, or was damaged", "Publish it again")
            return
        for problem in _differences(remote, made):
            self.say(source, problem, "Look at the repository's history, or publish it again")
        if self.found.problems:
            self.found.notes.append("the files were not downloaded, because the hub's own checksums differ already")
            return
        total, arrived = max(1, sum(remote.sizes.values())), 0

        def count(size_bytes: int) -> None:
            nonlocal arrived
            arrived += size_bytes
            self._progress("download", min(1.0, arrived / total))

        hub.bring_files(remote, list(remote.sizes), folder, source, count)
        self.artifact(folder, FETCH)


def _statement(path: Path) -> provenance.Read | None:
    """What a provenance.json says; None when it is missing, or no statement of ours."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return provenance.read_statement(file.read(provenance.LIMIT_BYTES))


def hash_file(path: Path, report: Callable[[int], None]) -> str:
    """The sha256 (hex) of a file; `report` is told the bytes that were just read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            report(len(chunk))
    return digest.hexdigest()


def _differences(remote: hub.Remote, made: provenance.Read) -> Iterator[str]:
    """What a hub's own listing says against an artifact's list; it has the sha256 of large files only."""
    for name, sha256 in sorted(made.files.items()):
        checksum = remote.checksums.get(name, "")
        if name not in remote.sizes:
            yield f"{name} is missing"
        elif checksum.startswith("sha256:") and checksum != f"sha256:{sha256}":
            yield f"{name} is not what was written"
    for name in sorted(set(remote.sizes) - set(made.files) - {provenance.FILE, signing.FILE}):
        yield f"{name} is there but was not made with the rest"


def _visible(folder: Path) -> set[str]:
    """The files below a folder but those that are hidden, or in hidden folders, as hubs and caches leave them."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)}


def _lowered(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
