"""Several files of one GGUF model made into one, without touching a tensor.

The result appears under its name when it is whole and was read again, never before. llama.cpp's gguf-split writes the
final name first and fills it, and leaves the keys of the split in the file, set to nothing.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

from converter.containers.gguf.header import compose, padded, place
from converter.containers.gguf.shards import Shard, copied, open_bundle, siblings
from converter.containers.gguf.verify import verify
from converter.errors import SourceError

Report = Callable[[float], None]


def merge(first: Path, out: Path, report: Report = lambda fraction: None) -> int:
    """Write the model whose first file is `first` to `out`, and give its size in bytes; report is told the share done.

    Raises SourceError when `out` exists, when a file is missing or is not of this model, when one is damaged, and
    NumericsError when a block cannot be computed with.
    """
    if out.exists():
        raise SourceError(str(out), "there is a file of that name already", "Choose another name, or remove it")
    if not out.parent.is_dir():
        raise SourceError(str(out), f"there is no folder {out.parent}", "Make it, or choose another name")
    if not first.is_file():
        raise SourceError(str(first), "there is no such file", "Name the first of the files of a model")
    files = siblings(first)
    if len(files) == 1:
        what = "this is one file by its name, not the first of several"
        raise SourceError(str(first), what, "Name a file such as NAME-00001-of-00003.gguf")
    bundle = open_bundle(first.parent, files)
    fields = {key: entry for key, entry in bundle.fields.items() if key != "general.alignment"}  # ours is the default
    placed = place([(name, piece.stored.shape, piece.stored.type) for name, piece in bundle.pieces.items()])
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.part")
    shard = Shard(name=part.name, head=compose(fields, placed), placed=placed)
    try:
        with part.open("wb") as file:
            file.write(shard.head)
            for stored in placed:
                for chunk in copied(first.parent, bundle.pieces[stored.name]):
                    file.write(chunk.numpy().data)
                file.write(bytes(padded(stored.size_bytes) - stored.size_bytes))
                report(file.tell() / shard.size_bytes)
            file.flush()
            os.fsync(file.fileno())
        verify(out.parent, (shard,))
        _name(part, out)
    except FileExistsError as error:
        raise SourceError(str(out), "there is a file of that name already", "Choose another name") from error
    except OSError as error:
        what = f"it cannot be read or written: {error.strerror}"
        raise SourceError(str(error.filename or out), what, "Make room and rights there, then run it again") from error
    finally:
        part.unlink(missing_ok=True)
    _sync(out.parent)
    return shard.size_bytes


def _name(part: Path, out: Path) -> None:
    """Give a whole file its name; raises FileExistsError when somebody made `out` in the meantime."""
    try:
        os.link(part, out)  # which a rename would replace
    except FileExistsError:
        raise
    except OSError:  # a disk without links
        part.rename(out)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
