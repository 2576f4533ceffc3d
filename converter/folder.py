"""The files of a model's folder: which there are, whether their names are safe, and one digest over them.

Names come from strangers, in a folder, an index or the listing of a hub, so each is checked before it is joined to a
path. The digest stands for a commit where there is none; hashing every byte instead would be exact, and would make the
plan of a 140 GB model wait for minutes of disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from converter.errors import SourceError

WHOLE_LIMIT_BYTES = 64 << 20  # a file up to this size enters the digest whole
SAMPLES, SAMPLE_BYTES = 64, 64 << 10
READ_BYTES = 1 << 20
HEADER_LIMIT_BYTES = 100_000_000  # of a safetensors header; the limit of its own library


def list_folder(root: Path, where: str) -> dict[str, int]:
    """Sizes in bytes of all files of a folder by relative path, sorted; hidden files and folders are not seen.

    Raises SourceError for a name that means another place on another system, and for a link that leads out of the
    folder, except into the blobs of a Hugging Face cache.
    """
    allowed = [root]
    if root.parent.name == "snapshots":  # models--org--name/snapshots/<commit>; blobs are per model, or shared above
        allowed += [parent / "blobs" for parent in root.parents[1:3]]
    sizes: dict[str, int] = {}
    for directory, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names + [name for name in folders if (Path(directory) / name).is_symlink()]):
            if name.startswith("."):
                continue
            path = Path(directory) / name
            relative = path.relative_to(root).as_posix()
            # Path.resolve raises RuntimeError for a link round about (Python 3.11)
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in allowed):
                what = f"'{relative}' is a link to a place outside the model's folder"
                raise SourceError(where, what, "Replace the link by the file itself")
            if path.is_symlink() and not target.exists():
                raise SourceError(where, f"'{relative}' is a link to nothing", "Fetch it again, or remove the link")
            if target.is_file():
                check_path(relative, where)
                sizes[relative] = target.stat().st_size
    return dict(sorted(sizes.items()))


def digest_folder(root: Path, files: Mapping[str, int]) -> str:
    """SHA-256 (hex) over path, size and content of all files, in order of their paths.

    A file above 64 MiB enters by its safetensors header (or its first 64 KiB), 64 evenly spaced samples of 64 KiB, its
    size and its time of change: 140 GB take seconds. The price: an edit that keeps size, time and all samples goes
    unseen, and a copy with new times counts as another commit.
    """
    whole = hashlib.sha256()
    for name, size in sorted(files.items()):
        with (root / name).open("rb") as file:
            if size <= WHOLE_LIMIT_BYTES:
                content = hashlib.file_digest(file, "sha256")
            else:
                content = hashlib.sha256()
                first = file.read(8)
                length = int.from_bytes(first, "little") if name.endswith(".safetensors") else 0
                content.update(first + file.read(max(SAMPLE_BYTES, min(length, HEADER_LIMIT_BYTES))))
                for sample in range(SAMPLES):
                    file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    content.update(file.read(SAMPLE_BYTES))
                content.update(str((root / name).stat().st_mtime_ns).encode())
        whole.update(json.dumps([name, size, content.hexdigest()]).encode())
    return whole.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_path(path: str, where: str) -> None:
    """Raise SourceError for a file name that would leave its folder or mean another place on another system."""
    parts = PurePosixPath(path).parts
    drive = re.match(r"[A-Za-z]:", path)
    unsafe = not parts or path != "/".join(parts) or path.startswith("/") or ".." in parts or "\\" in path or drive
    if unsafe or re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", path):
        what = f"the file name {path!r} could lead out of the model's folder"
        raise SourceError(where, what, "Do not use this model before its owner explains that name")


def matches(path: Path, checksum: str) -> bool:
    """Whether a file has a checksum: "sha256:..." or "git:...", the SHA-1 that git gives a small file."""
    algorithm, _, expected = checksum.partition(":")
    digest = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == expected
