"""Metadata that a manifest gives other values: which kind a value is stored as, and what may not be changed.

A key that is there keeps its kind, since readers refuse another. A new number becomes what llama.cpp's tools write
where that can hold it: u32 for a whole number, f32 for another; a negative or larger one becomes the wider kind that
can, where llama.cpp drops the sign. What tensors and tokenizer are built from is not a matter of taste and is refused,
and so is what tells where the file comes from.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping

import gguf

from converter.containers.gguf.header import ARRAY, CODES, STRING, Field, boolean, f32, string
from converter.errors import UnsupportedError

Value = str | int | float | bool
KINDS = gguf.GGUFValueType
BOOL, FLOATS = int(KINDS.BOOL), (int(KINDS.FLOAT32), int(KINDS.FLOAT64))
# What decides the shapes, the types or the number of tensors and tokens, or how the file's bytes are to be read.
BUILT_IN = re.compile(
    r"general\.(architecture|type|alignment|file_type|quantization_version)"
    r"|split\..*"
    r"|tokenizer\.ggml\.(model|tokens|scores|merges|token_type)"
    r"|.+\.(block_count|embedding_length(_out)?|feed_forward_length|vocab_size|expert_count|expert_used_count"
    r"|expert_(shared_)?feed_forward_length|leading_dense_block_count"
    r"|attention\.(head_count|head_count_kv|key_length|value_length)(_mla)?|rope\.dimension_count)"
)
TOLD = re.compile(r"(hubmill|quantize\.imatrix)\..*")


def overridden(fields: Mapping[str, Field], given: Mapping[str, Value], where: str) -> dict[str, Field]:
    """`fields` with the manifest's values in place of theirs, new keys last.

    Raises UnsupportedError for a value that the key's kind cannot hold, for one that contradicts the file's tensors,
    and for a key that tells where the file comes from.
    """
    changed = dict(fields)
    for key, value in sorted(given.items()):  # whatever the order in the manifest, the same bytes
        old = fields.get(key)
        if old is not None and old.kind != ARRAY and old.value == value and type(old.value) is type(value):
            continue
        if BUILT_IN.fullmatch(key) or TOLD.fullmatch(key):
            has = "nothing there" if old is None else "a list there" if old.kind == ARRAY else repr(old.value)
            why = "would contradict the file's tensors" if BUILT_IN.fullmatch(key) else "tells where the file is from"
            what = f"metadata {key} {why}: it is {value!r} in the manifest, and the file has {has}"
            raise UnsupportedError(where, what, f"Remove {key} from metadata")
        changed[key] = _new(value, key, where) if old is None else _of_kind(old, value, key, where)
    return changed


def _of_kind(old: Field, value: Value, key: str, where: str) -> Field:
    """`value` in the kind of the field that it replaces."""
    fits = {
        STRING: isinstance(value, str),
        BOOL: isinstance(value, bool),
        ARRAY: False,
    }.get(old.kind, isinstance(value, int | float) and not isinstance(value, bool))
    if fits and old.kind in CODES and old.kind != BOOL:
        fits = old.kind in FLOATS or isinstance(value, int)
        value = float(value) if old.kind in FLOATS else value
        fits = fits and _packs(old.kind, value)
    if not fits:
        kind = KINDS(old.kind).name.lower()
        what = f"metadata {key} is stored as {kind}, which {value!r} is not"
        raise UnsupportedError(where, what, "Write a value of that kind" if old.kind != ARRAY else f"Remove {key}")
    return Field(kind=old.kind, value=value)


def _new(value: Value, key: str, where: str) -> Field:
    """A field for a key that the file does not have."""
    if isinstance(value, str):
        return string(value)
    if isinstance(value, bool):
        return boolean(value)
    if isinstance(value, float):
        return f32(value) if _packs(int(KINDS.FLOAT32), value) else Field(kind=int(KINDS.FLOAT64), value=value)
    for kind in (KINDS.UINT32, KINDS.INT32, KINDS.UINT64, KINDS.INT64):
        if _packs(int(kind), value):
            return Field(kind=int(kind), value=value)
    raise UnsupportedError(where, f"metadata {key} is {value}, which has more than 64 bits", f"Remove {key}")


def _packs(kind: int, value: Value) -> bool:
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        struct.pack("<" + CODES[kind], value)
    except (struct.error, OverflowError):
        return False
    return True
