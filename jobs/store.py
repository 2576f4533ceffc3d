"""Where a run keeps its state: files under out/<name>/.work, renamed into place when whole.

    tasks/<key>/        the output of a finished task, with done.json, which holds the sha256 of every file and its own
    attempts/<key>.N/   the output of a task that is running, or was killed
    progress/<key>      how far a running task is, a number between 0 and 1
    events.jsonl        everything that happened, a line each
    manifest            the path of the manifest that all of this belongs to
    lease               held by the run that is working here, see lease.py
    settled.json        after a run that did everything: what it depended on and what it wrote
    locks/              held while an artifact is put under its final name

A finished task is one rename, so a reader never sees half of one, and a task that runs twice is harmless: the second
rename finds the first's result and steps back. Bytes on a disk can change, so who reads a finished task's file has it
hashed first: a damaged one is never used, and the task that made it runs again (see drive.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from converter.errors import SourceError
from converter.folder import file_sha256

Report = Callable[[float], None]


class DamagedError(SourceError):
    """What a finished task left is not what it wrote; `key` is the task's."""

    def __init__(self, key: str, path: Path) -> None:
        super().__init__(str(path), "it is gone, or not what was written", "Check the disk, and run the same command")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Store:
    """The files of one run; `run` is out/<name>. Holds no state, so it travels to workers as it is."""

    run: Path

    @property
    def work(self) -> Path:
        return self.run / ".work"

    @property
    def events(self) -> Path:
        return self.work / "events.jsonl"

    @property
    def owner(self) -> Path:
        """Holds the path of the manifest that this folder belongs to."""
        return self.work / "manifest"

    @property
    def lease(self) -> Path:
        """Held by the run that works here."""
        return self.work / "lease"

    @property
    def settled(self) -> Path:
        """Notes of a run that did everything its manifest asks for."""
        return self.work / "settled.json"

    @property
    def downloads(self) -> Path:
        """Where models from hubs are kept."""
        return self.work / "hub"

    def output(self, key: str) -> Path:
        """The folder of a finished task's files."""
        return self.work / "tasks" / key

    def record(self, key: str) -> dict[str, Any]:
        """What a finished task left in its done.json. Raises DamagedError."""
        path = self.output(key) / "done.json"
        try:
            data = json.loads(path.read_bytes())
            record: dict[str, Any] = data["record"]
            if data["sha256"] == _digest(record):
                return record
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise DamagedError(key, path)

    def file(self, key: str, name: str) -> Path:
        """A file of a finished task, hashed and found to be what the task wrote. Raises DamagedError."""
        path, done = self.output(key) / name, self.output(key) / "done.json"
        try:
            whole = file_sha256(path) == _listed(self, key, done.stat().st_mtime_ns)[name]
        except (OSError, KeyError):
            whole = False
        if not whole:
            raise DamagedError(key, path)
        return path

    def whole(self, key: str) -> Path:
        """The folder of a finished task's files, all hashed and found to be as written. Raises DamagedError."""
        for item in self.record(key)["files"]:
            self.file(key, item["path"])
        return self.output(key)

    def done(self) -> set[str]:
        """The keys of every finished task."""
        folder = self.work / "tasks"
        return {item.name for item in folder.iterdir() if (item / "done.json").is_file()} if folder.is_dir() else set()

    def is_whole(self, key: str) -> bool:
        """Whether everything that a finished task left is what it wrote."""
        try:
            self.whole(key)
        except DamagedError:
            return False
        return True

    @contextmanager
    def attempt(self, key: str, durable: bool = True) -> Iterator[tuple[Path, dict[str, Any]]]:
        """A fresh folder for a task's files and a record for its done.json; both become the output when the body ends.

        The record is given the list of the files, with sizes and sha256. When the body raises, the folder is removed
        and nothing else changes. durable: the output is on the disk before it has its name. Otherwise it gets there
        when the system sees fit; what a loss of power takes then is found damaged and made again.
        """
        folder = self.work / "attempts" / f"{key}.{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        record: dict[str, Any] = {}
        try:
            yield folder, record
            record["files"] = list_files(folder)
            write_json(folder / "done.json", {"record": record, "sha256": _digest(record)}, durable)
            if durable:
                sync_tree(folder)
            self._commit(folder, self.output(key))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.progress_file(key).unlink(missing_ok=True)

    def _commit(self, folder: Path, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.rename(final)
        except OSError:
            if not (final / "done.json").is_file():
                raise
            shutil.rmtree(folder)  # the same task finished elsewhere in the meantime, with the same bytes
        sync_folder(final.parent)

    def forget(self, key: str) -> None:
        """Remove a finished task's output, first its name, then its files, so that half of one is never seen."""
        doomed = self.work / "attempts" / f"{key}.{uuid.uuid4().hex[:8]}"
        doomed.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.output(key).rename(doomed)
        except FileNotFoundError:
            return
        shutil.rmtree(doomed, ignore_errors=True)

    def forget_downloads(self, used: Collection[str]) -> None:
        """Remove what came from hubs at other commits than those that are used."""
        for folder in self.downloads.glob("*/*"):
            if re.fullmatch("[0-9a-f]{40}", folder.name) and folder.name not in used:
                shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, check: Callable[[], None]) -> None:
        """Remove what killed attempts left behind. check: raises when the folder is another run's by now.

        It is asked between looking and removing, so that what goes was there while the folder was ours, however long
        this process stands still in between: the attempts of whoever took over are not touched.
        """
        folders = self.work / "attempts", self.work / "progress"
        doomed = [path for folder in folders if folder.is_dir() for path in folder.iterdir()]
        check()
        for path in doomed:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def progress_file(self, key: str) -> Path:
        return self.work / "progress" / key

    def reporter(self, key: str) -> Reporter:
        """Where a step says how far it is, and what it waits for."""
        path = self.progress_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return Reporter(path)

    def progress(self, key: str) -> tuple[float, str]:
        """How far a running task is, between 0 and 1, and what it waits for, in words; mostly for nothing."""
        try:
            fraction, _, note = self.progress_file(key).read_text("utf-8").partition(" ")
            return float(fraction), note
        except (FileNotFoundError, ValueError):
            return 0.0, ""


class Reporter:
    """A step's progress in a file that others read: a number between 0 and 1, and a note when it waits.

    Called from several threads; a note is written at once, a number at most twice a second.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._last = 0.0
        self._fraction = 0.0

    def report(self, fraction: float) -> None:
        self._fraction = fraction
        if time.monotonic() - self._last > 0.5:
            self._write(f"{fraction:.4f}")

    def tell(self, note: str) -> None:
        self._write(f"{self._fraction:.4f} {note}")

    def _write(self, text: str) -> None:
        self._last = time.monotonic()
        temporary = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}")
        temporary.write_text(text, "utf-8")
        temporary.rename(self._path)


def write_json(path: Path, data: object, durable: bool = True) -> None:
    """Write JSON with stable key order, whole or not at all."""
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n", durable)


def write_text(path: Path, text: str, durable: bool = True) -> None:
    """Write a text file, whole or not at all; durable: also where the power fails."""
    temporary = path.with_name(f".{path.name}.new")  # one name, so that what a killed run left is written over
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(path)


def _digest(record: Mapping[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(256)
def _listed(store: Store, key: str, changed_ns: int) -> Mapping[str, str]:
    """The sha256 of a finished task's files; one task's are asked for one by one, and a block may have thousands."""
    return {item["path"]: item["sha256"] for item in store.record(key)["files"]}


def list_files(folder: Path) -> list[dict[str, Any]]:
    """Every file below `folder` with its size and sha256, by relative path."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in files
    ]


def try_folder(probe: Path) -> str:
    """Why tasks could not work here in the folder of a file that holds its own name; empty when they could."""
    try:
        if probe.read_text("utf-8") != probe.name:
            return f"{probe.parent} is another folder there"
        beside = probe.with_name(f"{probe.name}.{uuid.uuid4().hex}")
        beside.touch()
        beside.unlink()
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def sync_tree(folder: Path) -> None:
    """Bring every file below `folder` to the disk, then the folders that name them."""
    for path in sorted(folder.rglob("*"), reverse=True):
        sync_folder(path)
    sync_folder(folder)


def sync_folder(path: Path) -> None:
    """Bring a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def place_file(source: Path, final: Path) -> None:
    """Make `final` the same file as `source`, by a hard link where the disk allows, in one step."""
    final.parent.mkdir(parents=True, exist_ok=True)
    fresh = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    _link(source, fresh)
    fresh.rename(final)
    sync_folder(final.parent)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def place(
    files: Mapping[str, Path],
    texts: Mapping[str, str],
    final: Path,
    staging: Path,
    complete: Callable[[Path], None] | None = None,
) -> None:
    """Make `final` a folder with exactly these files (hard links where the disk allows) and texts.

    complete: adds what can only be made when they lie together, or raises, and then nothing has changed. A folder that
    is already there is moved aside into `staging` first, so what stands under the final name is always whole: the old
    one, for an instant none, then the new one.
    """
    around = staging / f"place.{uuid.uuid4().hex[:8]}"
    fresh = around / final.name
    for name, source in files.items():
        target = fresh / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(source, target)
    for name, text in texts.items():
        (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        write_text(fresh / name, text)
    if complete is not None:
        try:
            complete(fresh)
        except BaseException:
            shutil.rmtree(around, ignore_errors=True)
            raise
    sync_tree(fresh)
    final.parent.mkdir(parents=True, exist_ok=True)
    old = staging / f"old.{uuid.uuid4().hex[:8]}"
    locks = staging.parent / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / f"{final.parent.name}.{final.name}").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # against a second run of the same task, on this machine or another
        if final.exists():
            final.rename(old)
        fresh.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)
    around.rmdir()
