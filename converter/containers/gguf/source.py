"""A GGUF model as a source: which files it is, what they hold, under the names that they give it.

A folder may hold an imatrix, a projector for images and other types of the same model beside it. What a file is stands
in its metadata, so the heads are read and no name is taken for a promise. Where several models are left, the one whose
weights are not quantized is the source of the others; two of that kind are a question only a person can answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf

from converter.containers.gguf.header import Head, parse_head, read_head
from converter.containers.gguf.mixing import Weight
from converter.containers.gguf.shards import Bundle, join, models_in
from converter.errors import SourceError
from converter.source import Header, Snapshot

__all__ = ["bundle_of", "config_of", "head_file", "headers_of", "parse_head", "read_head", "survey"]

# general.type of files that no model comes from by itself; older models have none.
OTHERS = ("adapter", "mmproj", "imatrix", "vocab")
UNQUANTIZED = ("F32", "F16", "BF16")
_KINDS = gguf.LlamaFileType
FLOAT_FILES = (int(_KINDS.ALL_F32), int(_KINDS.MOSTLY_F16), int(_KINDS.MOSTLY_BF16))


def survey(files: Mapping[str, int], read: Callable[[str], Head], where: str) -> Bundle:
    """The GGUF model among `files` (names and sizes), whose heads `read` gives.

    Raises SourceError when there is none, more than one to choose among, or one of its files is missing or damaged.
    """

    def head_of(name: str) -> Head:
        try:
            return read(name)
        except SourceError as error:
            raise SourceError(f"{where}: {error.where}", error.what, error.remedy) from error

    models = models_in([name for name in files if "/" not in name], where)
    heads = {first: head_of(first) for first in models}
    found = {first: head for first, head in heads.items() if head.get("general.type") not in OTHERS}
    if len(found) > 1:
        floating = {first: head for first, head in found.items() if head.get("general.file_type") in FLOAT_FILES}
        found = floating or found
    if len(found) != 1:
        what = f"the .gguf files are of {len(found)} models: {', '.join(found)}"
        if not found:
            what = f"no .gguf file is a model: {', '.join(models)}"
        raise SourceError(where, what, "Put the one to convert into a folder of its own")
    (first,) = found
    return join({name: heads[name] if name == first else head_of(name) for name in models[first]}, where)


def config_of(bundle: Bundle) -> dict[str, Any]:
    """What stands in place of config.json: no architecture of transformers, and the number of blocks by their names.

    Some families have tensors in blocks beyond those that their metadata count.
    """
    blocks = (Weight(name=name, columns=1).block for name in bundle.pieces)
    return {"architectures": [], "num_hidden_layers": 1 + max(blocks, default=-1)}


def headers_of(bundle: Bundle) -> dict[str, Header]:
    """The tensors of the model by name, as a snapshot has them."""
    headers = {
        name: Header(
            name=name,
            dtype=piece.stored.type,
            shape=piece.stored.shape,
            file=piece.file,
            start=piece.start,
            end=piece.start + piece.stored.size_bytes,
        )
        for name, piece in bundle.pieces.items()
    }
    return dict(sorted(headers.items()))


def head_file(folder: Path, name: str) -> Path:
    """Where the first bytes of a file are kept while its weights are still on a hub."""
    return folder / ".heads" / f"{name}.head"


def bundle_of(snapshot: Snapshot) -> Bundle:
    """The source's files as one model, metadata and all, be the weights here or still on a hub.

    Raises SourceError when neither they nor their heads are here.
    """
    heads: dict[str, Head] = {}
    for name in snapshot.gguf:
        path, head = snapshot.folder / name, head_file(snapshot.folder, name)
        if path.is_file():
            heads[name] = read_head(path)
        elif head.is_file():
            heads[name] = parse_head(head.read_bytes(), snapshot.files[name], name)
        else:
            raise SourceError(str(path), "the file is not here", "Fetch the model again, or put the file back")
    return join(heads, snapshot.repo)
