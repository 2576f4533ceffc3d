"""Small files that claim to be large: each is refused, or read, in bounded memory and time, and in a short sentence."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bounded import Bounded, bounded
from fuzz.targets import configs, write_around

__all__ = ["bounded"]  # a fixture

Make = Callable[[Path], object]
U8, U32, F32, STRING, ARRAY = 0, 4, 6, 8, 9
HUGE = 1 << 62


def safetensors(header: bytes | Mapping[str, object], data: bytes = b"") -> Make:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: list[int], end: int = 0, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def sparse(name: str, head: bytes, size_bytes: int = 8 << 30) -> Make:
    """A file that takes no room on the disk and reads as zeros behind its head."""

    def make(folder: Path) -> None:
        (folder / name).write_bytes(head)
        os.truncate(folder / name, size_bytes)

    return make


def check(said: str, what: str) -> None:
    assert re.search(what, said), said[:500]
    assert len(said) < 1000 and said.isprintable()


def both(first: Make, second: Make) -> Make:
    return lambda folder: (first(folder), second(folder))


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def gguf(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def array(item: int, count: int) -> bytes:
    return text(b"a") + struct.pack("<IIQ", ARRAY, item, count)


def tensor(name: bytes, shape: tuple[int, ...] = (32,), offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", 0, offset)


BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}
SMALL = safetensors({"a": entry([0])})
MODELS: Mapping[str, tuple[Make, str]] = {
    "lists in a header": (safetensors(b'{"a":[' + b"[]," * 8_000_000 + b"[]]}"), "more than .* values"),
    "a shape of a million numbers": (safetensors({"a": entry([1 << 40] * 1_000_000)}), "dimensions"),
    "numbers of 4000 digits": (safetensors({"a": entry([10**4000, 10**4000])}), "a shape, an offset or a name that is"),
    "a name twice among many": (
        safetensors(b"{" + b"".join(b'"%d":0,' % n for n in range(400_000)) + b'"x":0,"x":0}'),
        "'x' appears twice",
    ),
    "a name of ten megabytes": (safetensors({"a" * 10_000_000: entry([1], 9)}), "needs 1 bytes, its offsets span 9"),
    "a type of ten megabytes": (safetensors({"a": entry([1], 1, "F" * 10_000_000)}), "unknown type"),
    "a config of gigabytes": (both(SMALL, sparse("config.json", b"{")), r"config\.json: .*larger than 32 MiB"),
    "an index of gigabytes": (
        sparse("model.safetensors.index.json", b"{"),
        r"model\.safetensors\.index\.json: .*larger than 32 MiB",
    ),
    "an adapter's config of gigabytes": (sparse("adapter_config.json", b"{"), r"adapter_config\.json: .*larger than"),
    "lists in a config": (
        both(SMALL, lambda folder: (folder / "config.json").write_bytes(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}")),
        "more than .* values",
    ),
    "a bitsandbytes state that nests": (
        both(
            safetensors({"w.quant_state.bitsandbytes__nf4": entry([200_000], 200_000)}, b"[" * 200_000),
            lambda folder: (folder / "config.json").write_text(json.dumps({"quantization_config": BITSANDBYTES})),
        ),
        "broken JSON: maximum recursion",
    ),
    "a header of nothing": (sparse("model.safetensors", struct.pack("<Q", 99_999_999)), "broken JSON"),
}
HEADS: Mapping[str, tuple[bytes, str]] = {
    "tensors without end": (gguf(HUGE, 0), "claims .* tensors"),
    "fields without end": (gguf(0, HUGE), "claims .* keys"),
    "a long text": (gguf(0, 1, struct.pack("<Q", HUGE)), "inside its own header"),
    "a text of gigabytes": (gguf(0, 1, struct.pack("<Q", 6 << 30)), "does not end within"),
    "many texts": (gguf(0, 1, array(STRING, HUGE)), "claims .* values"),
    "many numbers": (gguf(0, 1, array(F32, 1 << 31)), "claims .* values"),
    "many small numbers": (gguf(0, 1, array(U8, 4 << 30)), "claims .* values"),
    "many empty texts": (gguf(0, 1, array(STRING, 500_000_000)), "claims .* values"),
    "arrays in arrays": (gguf(0, 1, array(ARRAY, 1 << 20)), "unknown kind 9"),
    "arrays of nothing known": (gguf(0, 1, array(77, 1)), "unknown kind 77"),
    "an alignment of nothing": (
        gguf(0, 1, text(b"general.alignment") + struct.pack("<II", U32, 0)),
        "alignment of 0 bytes",
    ),
    "a tensor far out": (gguf(1, 0, tensor(b"a", (32,), HUGE)), "behind the end of the file"),
    "a tensor that is too large": (gguf(1, 0, tensor(b"a", (1 << 60, 1 << 60, 1 << 60, 32))), "claims the shape"),
    "a tensor of many dimensions": (gguf(1, 0, text(b"a") + struct.pack("<I", 1 << 31)), "dimensions"),
    "a name of megabytes": (gguf(1, 0, tensor(b"a" * 5_000_000, (32,), HUGE)), "behind the end"),
}


@pytest.mark.parametrize("bomb", MODELS)
def test_a_model_that_claims_more_than_it_is_is_refused(bomb: str, bounded: Bounded, tmp_path: Path) -> None:
    make, what = MODELS[bomb]
    make(tmp_path)
    end = bounded("model", tmp_path)
    assert end.how == "refused"
    check(end.said, what)


@pytest.mark.parametrize("bomb", HEADS)
@pytest.mark.parametrize("reader", ["model", "gguf", "imatrix"])
def test_a_gguf_head_that_claims_more_than_it_is_is_refused(
    reader: str, bomb: str, bounded: Bounded, tmp_path: Path
) -> None:
    head, what = HEADS[bomb]
    sparse("a.gguf", head)(tmp_path)
    end = bounded(reader, tmp_path / "a.gguf" if reader == "imatrix" else tmp_path)
    assert end.how == "refused"
    check(end.said, what)


def table(columns: Mapping[str, object], groups: int = 1, **options: object) -> Make:
    """A table of weights whose rows are all the same but for `columns`."""

    def make(folder: Path) -> None:
        (size,) = {len(values) for values in columns.values()}  # type: ignore[arg-type]
        row = {"layer_name": "a", "shape": "[1]", "dtype": "float32", "data": b"1234"}
        constant = {
            name: pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, np.int32)), pa.array([value]))
            for name, value in row.items()
            if name not in columns
        }
        built = pa.table({**constant, **columns})
        with pq.ParquetWriter(folder / "model.parquet", built.schema, store_schema=False, **options) as writer:
            for _ in range(groups):
                writer.write_table(built, row_group_size=1 << 30)

    return make


def constant(value: object, size: int, type: pa.DataType | None = None) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, np.int32)), pa.array([value], type))


def ending(footer: bytes, length: int | None = None) -> Make:
    """A Parquet file that is nothing but its footer."""
    length = len(footer) if length is None else length
    data = b"PAR1" + footer + struct.pack("<I", length) + b"PAR1"
    return lambda folder: (folder / "model.parquet").write_bytes(data)


def footer(schema: bytes) -> bytes:
    """Thrift: version 2, then what stands in place of the schema."""
    return b"\x15\x04" + schema


VARINT = b"\xff\xff\xff\xff\x07"  # 2**31 - 1
TABLES: Mapping[str, tuple[Make, str]] = {
    "a footer longer than the file": (ending(b"\0" * 20, 1 << 30), "cannot be read"),
    "a footer of gigabytes": (sparse("model.parquet", b"PAR1"), "cannot be read"),
    "a schema of billions": (ending(footer(b"\x19\xfc" + VARINT)), "cannot be read"),
    "a name of gigabytes": (ending(footer(b"\x19\x1c\x48" + VARINT)), "cannot be read"),
    "structs without end": (ending(footer(b"\x1c" * 5_000_000)), "cannot be read"),
    "rows without end": (
        table({"layer_index": constant(1, 5_000_000)}),
        "claims '5000000' where at most 1,048,576",
    ),
    "many groups of rows": (table({"layer_index": constant(1, 100_000)}, groups=20), "claims 2,000,000 rows"),
    "a name that is repeated": (
        table({"layer_name": constant("n" * 10_000_000, 1000)}, compression="zstd"),
        "4096 bytes",
    ),
    "a name of megabytes": (
        table({"layer_name": pa.array(["n" * 70_000_000])}, compression="zstd", use_dictionary=False),
        "bytes of facts",
    ),
    "a shape without end": (
        table({"shape": pa.ListArray.from_arrays([0, 30_000_000], constant(1, 30_000_000).dictionary_decode())}),
        "claims '30000000' where at most 16,777,216",
    ),
    "a shape beyond counting": (table({"shape": pa.array([[1 << 62, 1 << 62]])}), "does not describe one"),
    "rows of one weight": (table({"shape": pa.array([[1 << 39, 1]])}), "do not fit shape"),
    "names that are numbers": (table({"layer_name": pa.array([1])}), "column layer_name holds 'int64'"),
    "names that are mappings": (table({"layer_name": pa.array([{"a": 1}])}), "column layer_name holds 'struct"),
    "no name": (table({"layer_name": pa.array([None], pa.string())}), "does not describe one"),
    "chunks that are none": (table({"chunk_index": pa.array([None], pa.int32())}), "does not describe one"),
    "bits that are none": (table({"quant_type": pa.array(["int"])}), "does not describe one"),
    "data that is text": (table({"data": pa.array(["text"])}), "column data holds 'string'"),
}


@pytest.mark.parametrize("bomb", TABLES)
def test_a_table_that_claims_more_than_it_is_is_refused(bomb: str, bounded: Bounded, tmp_path: Path) -> None:
    make, what = TABLES[bomb]
    make(tmp_path)
    end = bounded("parquet", tmp_path)
    assert end.how == "refused"
    check(end.said, what)


CONFIGS: Mapping[str, tuple[Mapping[str, object], str]] = {
    "a table of gigabytes": ({"head_dim": 10**9}, "makes 4,000,000,000 bytes of tables"),
    "a number that no file holds": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e308}},
        "which its kind of number cannot hold",
    ),
}


@pytest.mark.parametrize("bomb", CONFIGS)
def test_a_config_that_asks_for_more_than_the_weights_bear_out_is_refused(
    bomb: str, bounded: Bounded, tmp_path: Path
) -> None:
    changes, what = CONFIGS[bomb]
    write_around(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads(configs()[0]) | changes))
    end = bounded("plan", tmp_path)
    assert end.how == "refused"
    check(end.said, what)
