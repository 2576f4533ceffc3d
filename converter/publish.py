"""Where artifacts go: what a hub is to us, and the hub that is a folder.

A reader of a folder hub sees the old artifact or the new one, never a mixture: each version lies in a folder of its own
under `.commits`, named by its content, and `<root>/<repo>` is a link that one rename moves from version to version.
Real folders in place of the link would need two renames to replace one, with nothing there in between. The price of the
link: the previous version stays on the disk until the next publish, for those who still read it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol
from urllib.parse import quote

from converter.errors import PublishError, SourceError
from converter.folder import check_path
from converter.provenance import FILE, LIMIT_BYTES, Read, read_statement

Kind = Literal["model", "dataset"]
COPY_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Destination:
    """Where one artifact goes.

    branch: "" is the main one. collection: the title of one, or its slug; "" is none. replace: whether what is there
    may be somebody else's, or of another source. origin: what the artifact is made of, as provenance names it.
    """

    hub: str  # folder:/path or hf
    repo: str
    kind: Kind
    private: bool = False
    branch: str = ""
    pull_request: bool = False
    collection: str = ""
    replace: bool = False
    origin: str = ""

    @property
    def address(self) -> str:
        """The name to load it by: owner/name, with @branch where it lies on one."""
        return f"{self.repo}@{self.branch}" if self.branch else self.repo

    @property
    def folder(self) -> Path | None:
        """The folder that is the hub; None for a hub on the network."""
        kind, _, rest = self.hub.partition(":")
        return Path(rest) if kind == "folder" else None


@dataclass(frozen=True, kw_only=True)
class Published:
    """What a publish did; `changed` is False when the hub already held exactly this."""

    repo: str
    commit: str  # 40 hex digits
    changed: bool
    url: str
    note: str = ""


class Hub(Protocol):
    """A place that takes artifacts."""

    def problems(self, places: Sequence[Destination]) -> list[PublishError]:
        """Why publishing to these places could not succeed, all of it, found before any work."""

    def publish(self, place: Destination, folder: Path, files: Mapping[str, str], message: str) -> Published:
        """Make the place hold exactly `files` (path in `folder` -> sha256, hex), in one step; twice is once.

        Raises PublishError.
        """


@dataclass(frozen=True, kw_only=True)
class FolderHub:
    """A hub in a folder: `<root>/<repo>` is the artifact, also when `repo` is "owner/name"."""

    root: Path

    def problems(self, places: Sequence[Destination]) -> list[PublishError]:
        found = []
        for place in places:
            try:
                self._check(place)
            except PublishError as error:
                found.append(error)
        return found

    def _check(self, place: Destination) -> None:
        artifact = self._place(place.repo)
        nearest = next(path for path in (self.root, *self.root.absolute().parents) if path.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            what = f"the folder {self.root} cannot be written at {nearest}"
            raise PublishError(f"folder hub, repo {place.repo}", what, "Change its permissions, or publish elsewhere")
        if artifact.is_dir() and not place.replace:
            check_origin(place, _provenance(artifact), f"folder hub, repo {place.repo}")

    def publish(self, place: Destination, folder: Path, files: Mapping[str, str], message: str) -> Published:
        repo = place.repo
        artifact = self._place(repo)
        commit = hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()[:40]
        versions = self.root / ".commits" / quote(repo, safe="")
        version = versions / commit
        link = os.path.relpath(version, artifact.parent)
        self._check(place)
        try:
            (self.root / ".incoming").mkdir(parents=True, exist_ok=True)
            with self._alone(repo):
                before = os.readlink(artifact) if artifact.is_symlink() else None
                if before != link or not self._holds(version, folder, files):
                    self._bring(repo, folder, files, version)
                    swap_link(artifact, link)
                    for old in versions.iterdir():
                        if old.name not in (commit, Path(before or "").name):
                            shutil.rmtree(old)
                    return Published(repo=repo, commit=commit, changed=True, url=str(artifact))
        except OSError as error:
            what = f"copying into {self.root} failed at {error.filename}: {error.strerror}"
            raise PublishError(
                f"folder hub, repo {repo}", what, "Make room or mend the disk, then run it again"
            ) from error
        return Published(repo=repo, commit=commit, changed=False, url=str(artifact))

    def _place(self, repo: str) -> Path:
        where = f"folder hub, repo {repo}"
        try:
            check_path(repo, where)
        except SourceError as error:
            raise PublishError(where, "the name could lead out of the hub's folder", "Mend publish.repo") from error
        place = self.root / repo
        if any(part.startswith(".") for part in Path(repo).parts):
            raise PublishError(where, "a part of the name begins with a dot", "Mend publish.repo")
        owners = place.parents[: len(Path(repo).parts) - 1]
        for path in [place, *owners]:
            ours = path.is_symlink() if path == place else path.is_dir() and not path.is_symlink()
            if path.exists() and not ours:
                raise PublishError(where, f"{path} is there and is no artifact", "Move it away, or change publish.repo")
        return place

    @contextmanager
    def _alone(self, repo: str) -> Iterator[None]:
        """Hold the lock of one repo; the system releases it when its holder dies."""
        with (self.root / ".incoming" / (quote(repo, safe="") + ".lock")).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _holds(self, version: Path, folder: Path, files: Mapping[str, str]) -> bool:
        """Whether a version is all there, by names and sizes; its content was checked when it was brought."""
        if not version.is_dir():
            return False
        paths = [path for path in version.rglob("*") if path.is_file()]
        there = {path.relative_to(version).as_posix(): path.stat().st_size for path in paths}
        return there == {name: (folder / name).stat().st_size for name in files}

    def _bring(self, repo: str, folder: Path, files: Mapping[str, str], version: Path) -> None:
        """Copy the files into a new version, each checked on its way; a leftover of a killed run goes first."""
        incoming = self.root / ".incoming" / quote(repo, safe="")
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        for name, sha256 in sorted(files.items()):
            target = incoming / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if copy_hashed(folder / name, target) != sha256:
                shutil.rmtree(incoming)
                raise changed_since(repo, folder / name)
        shutil.rmtree(version, ignore_errors=True)
        version.parent.mkdir(parents=True, exist_ok=True)
        incoming.rename(version)


def copy_hashed(source: Path, target: Path) -> str:
    """Copy a file onto the disk for good and return its SHA-256 (hex)."""
    digest = hashlib.sha256()
    with source.open("rb") as reading, target.open("wb") as writing:
        while chunk := reading.read(COPY_BYTES):
            digest.update(chunk)
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    return digest.hexdigest()


def swap_link(place: Path, link: str) -> None:
    """Make `place` a link with this text in one step, whether or not it is one already."""
    place.parent.mkdir(parents=True, exist_ok=True)
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(link)
    fresh.replace(place)


def changed_since(repo: str, path: Path) -> PublishError:
    """The error for a file that is not what its checksum says; nothing was published."""
    what = f"{path.name} is not the file that was measured: its sha256 differs"
    return PublishError(f"publish {repo}", what, "Convert again; nothing was published")


def check_origin(place: Destination, there: Read | None, where: str) -> None:
    """Raise PublishError when the place holds an artifact of another source, by what its provenance says (None: none).

    Repositories are named after the last part of a source, so two models may well meet in one.
    """
    if there is not None and place.origin and there.source != place.origin:
        what = f"it holds an artifact of {there.source}, and this one is of {place.origin}"
        raise PublishError(where, what, "Choose another publish.repo, or write replace: true to replace it")


def _provenance(artifact: Path) -> Read | None:
    try:
        with (artifact / FILE).open("rb") as file:
            return read_statement(file.read(LIMIT_BYTES))
    except OSError:
        return None
