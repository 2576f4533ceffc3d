"""Small files that strangers wrote, read with a bound on their size and on what they unfold to in memory.

A list of empty lists takes thirty times its bytes once it is parsed, and a file that is mostly a hole takes none on the
disk, so both are counted before anything is built. The alternative, parsing piece by piece, would need a parser of our
own; the price of counting is that a mark inside a text counts too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from converter.errors import SourceError
from converter.marks import quoted

SMALL_LIMIT_BYTES = 32 << 20  # a file up to this size that is not a weight travels with the model
# Commas and opening brackets: a tensor in a safetensors header takes 8 of them, an entry of a vocabulary 1 to 3, and
# one of each is an object of 240 bytes at worst. The tokenizer of Gemma 3 has 1.8 million.
MOST_MARKS = 4_000_000
REMEDY = "Mend the file, or fetch it again"


def read_small(path: Path, where: str) -> bytes:
    """The bytes of a file; raises SourceError, naming it, when they are more than 32 MiB, and OSError."""
    with path.open("rb") as file:
        data = file.read(SMALL_LIMIT_BYTES + 1)
    check_small(path.name, len(data), where)
    return data


def check_small(name: str, size_bytes: int, where: str) -> None:
    """Raise SourceError for a file that is too large to be one that is read whole."""
    if size_bytes > SMALL_LIMIT_BYTES:
        what = f"the file is larger than {SMALL_LIMIT_BYTES >> 20} MiB"
        raise SourceError(f"{where}: {name}", what, "Check that it is what its name says, or take it away")


def load_json(data: bytes, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The JSON value that `data` holds; `pairs` makes its objects. Raises SourceError when it is broken or too much."""
    marks = sum(map(data.count, (b",", b"[", b"{")))
    if marks > MOST_MARKS:
        raise SourceError(where, f"the JSON holds more than {MOST_MARKS:,} values", REMEDY)
    try:
        return json.loads(data, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise SourceError(where, f"broken JSON: {error}", REMEDY) from error


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object that `data` holds; raises SourceError as load_json does, for no object, and for a name twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice = next(name for name, count in counts.items() if count > 1)
            raise SourceError(where, f"the name {quoted(twice)} appears twice", "The file is damaged: fetch it again")
        return keys

    parsed = load_json(data, where, once)
    if not isinstance(parsed, dict):
        raise SourceError(where, "the JSON is not an object", REMEDY)
    return parsed
