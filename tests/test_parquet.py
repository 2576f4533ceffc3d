"""Parquet artifacts: planned to the byte, read by duckdb and pyarrow, and the older schemas read too."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from converter.architecture import find
from converter.containers import ArtifactPlan, parquet, parquet_rows
from converter.containers.packing import pack_bytes, to_unsigned
from converter.containers.parquet import OpenedParquet, Parquet
from converter.containers.parquet_file import Column, ParquetWriter, Planned
from converter.errors import SourceError
from converter.grids.affine import AffineGrid
from converter.manifest import Rule, Target
from converter.schemes import PARQUET_SCHEMES
from converter.source import Snapshot, open_folder
from tiny_models import round_to_nearest, write_llama, write_state_dict


def make_target(scheme: str, *rules: tuple[str, str], **fields: Any) -> Target:
    listed = tuple(Rule(pattern=pattern, type=type) for pattern, type in rules)
    return Target(name="t", format="parquet", scheme=scheme, **fields).model_copy(update={"rules": listed})


def convert(model: Path, out: Path, target: Target) -> tuple[Snapshot, ArtifactPlan, OpenedParquet]:
    snapshot = open_folder(model, "test")
    architecture = find(snapshot.config, "test") if snapshot.config else None
    container = Parquet()
    plan = container.plan(snapshot, architecture, target)
    out.mkdir()
    container.write(plan, snapshot, architecture, target, round_to_nearest(plan, snapshot), out)
    return snapshot, plan, container.open(out, architecture)


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.parquet")}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scheme", [name for name, scheme in PARQUET_SCHEMES.items() if scheme.values == "int"])
def test_artifact_holds_what_the_plan_says_and_decodes_to_what_was_rounded(
    scheme: str, symmetric: bool, granularity: str, tmp_path: Path
) -> None:
    tensors = {
        "a.weight": torch.randn(17, 45).half(),
        "b": torch.randn(5).half(),
        "c": torch.randn(2, 3, 4),
        "d": torch.tensor(2.0),
    }
    write_state_dict(tmp_path / "model", tensors | {"steps": torch.arange(3)})
    group_size = 32 if granularity == "group" else None  # the last group of a row is short
    fields = {"symmetric": symmetric, "granularity": granularity, "group_size": group_size}
    snapshot, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme, **fields))
    assert plan.exact and plan.files == sizes(tmp_path / "out")
    assert list(plan.dropped) == ["steps"]
    assert set(opened.names) == set(tensors)
    parts = round_to_nearest(plan, snapshot)
    for tensor in plan.tensors:
        assert torch.equal(opened.read(tensor.name), tensor.grid.decode(parts(tensor.name)).reshape(tensor.shape))
        assert opened.stored(tensor.name) == (tensor.grid.name, tensor.size_bytes)
        assert tensor.quantized == (tensor.name == "a.weight")


def documented(block: int) -> dict[str, Any]:
    """The names that a Python block of the page on formats defines."""
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text("utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[block], names)
    return names


LEVELLED = [
    name
    for name, scheme in PARQUET_SCHEMES.items()
    if scheme.values.startswith(("seq", "ternary", "log", "k", "nf", "fp"))
]


@pytest.mark.parametrize("group_size", [None, 32])
@pytest.mark.parametrize("scheme", LEVELLED)
def test_duckdb_and_the_documented_numpy_decode_every_grid_of_levels(
    scheme: str, group_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "CHUNK_BYTES", 200)  # several rows of the table for a tensor
    tensors = {"a.weight": torch.randn(17, 93).bfloat16(), "b.weight": torch.zeros(3, 5).half(), "c": torch.ones(4)}
    write_state_dict(tmp_path / "model", tensors | {"d.weight": torch.full((4, 64), 0.3)})
    fields = {"group_size": group_size} if group_size and "group_size" in PARQUET_SCHEMES[scheme].fields else {}
    snapshot, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme, **fields))
    assert plan.exact and plan.files == sizes(tmp_path / "out")
    parts, decode = round_to_nearest(plan, snapshot), documented(1)["decode"]
    for tensor in plan.tensors:
        assert torch.equal(opened.read(tensor.name), tensor.grid.decode(parts(tensor.name)).reshape(tensor.shape))
        assert opened.stored(tensor.name) == (tensor.grid.name, tensor.size_bytes)
        assert tensor.quantized == (tensor.name != "c")
        if tensor.quantized:
            query = (
                f"SELECT * FROM '{tmp_path}/out/model.parquet' WHERE layer_name = '{tensor.name}' ORDER BY chunk_index"
            )
            rows = duckdb.sql(query).to_arrow_table().to_pylist()
            assert len(rows) > 1 or tensor.name != "a.weight"
            np.testing.assert_array_equal(
                np.concatenate([decode(row) for row in rows]), opened.read(tensor.name).numpy()
            )


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4", "MXFP8", "E4M3", "E5M2"])
def test_small_floats_are_read_back_and_unfit_rows_kept(scheme: str, tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model", {"a.weight": torch.randn(17, 96).bfloat16(), "b.weight": torch.randn(3, 40)})
    snapshot, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme))
    assert plan.exact and plan.files == sizes(tmp_path / "out")
    parts = round_to_nearest(plan, snapshot)
    for tensor in plan.tensors:
        assert torch.equal(opened.read(tensor.name), tensor.grid.decode(parts(tensor.name)).reshape(tensor.shape))
        assert opened.stored(tensor.name) == (tensor.grid.name, tensor.size_bytes)
        unfit = tensor.name == "b.weight" and scheme in ("NVFP4", "MXFP4", "MXFP8")
        assert tensor.quantized != unfit and ("do not fill groups" in tensor.fallback) == unfit


def test_tables_of_integers_have_no_columns_for_other_grids(llama: Path, tmp_path: Path) -> None:
    for scheme, more in (("INT4", False), ("KMEANS4", True)):
        convert(llama, tmp_path / scheme, make_target(scheme))
        names = pq.read_schema(tmp_path / scheme / "model.parquet").names
        assert names == [column.name for column in parquet_rows.COLUMNS + parquet_rows.MORE_COLUMNS * more]


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    bits=st.integers(2, 8),
    group_size=st.sampled_from([None, 1, 8, 32]),
    symmetric=st.booleans(),
    chunk_bytes=st.sampled_from([1, 16, 100]),
)
def test_a_tensor_in_any_number_of_chunks_decodes_to_the_same(
    rows: int, columns: int, bits: int, group_size: int | None, symmetric: bool, chunk_bytes: int
) -> None:
    granularity: Any = "group" if group_size else "channel"
    grid = AffineGrid(
        bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size, scale_dtype="BF16"
    )
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    parts = grid.encode(weight, None)
    tensor = parquet.TensorPlan(
        name="w", source="w", shape=(rows, columns), grid=grid, block=None, size_bytes=0, quantized=True
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_rows, "CHUNK_BYTES", chunk_bytes)
        encoded = [parquet_rows.encode_row(chunk, "BF16", parts) for chunk in parquet_rows.chunks(tensor, 0)]
    assert torch.equal(parquet_rows.decode_rows(encoded), grid.decode(parts))
    assert sum(row["num_params"] for row in encoded) == rows * columns


@pytest.mark.parametrize(("fields", "rules"), [({"observer": "minmax"}, ()), ({}, ((".", "BF16"),))])
def test_where_zstd_pays_the_plan_is_an_upper_bound(fields: Any, rules: Any, tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model", {"a.weight": torch.randn(1024, 4096).bfloat16()})
    target = make_target("INT4", *rules, **fields)
    snapshot, plan, opened = convert(tmp_path / "model", tmp_path / "out", target)
    [(name, bound)] = plan.files.items()
    assert not plan.exact and 0.7 * bound < sizes(tmp_path / "out")[name] < 0.9 * bound
    [tensor] = plan.tensors
    parts = round_to_nearest(plan, snapshot)
    assert torch.equal(opened.read("a.weight"), tensor.grid.decode(parts("a.weight")))


def test_large_tensors_are_split_and_files_stay_below_their_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_rows, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 1500)
    monkeypatch.setattr(parquet, "FILE_BYTES", 4000)
    weight = torch.randn(100, 80).bfloat16()
    write_state_dict(tmp_path / "model", {"a.weight": weight, "b.weight": weight * 2, "c": torch.ones(9)})
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target("INT8"))
    assert plan.files == sizes(tmp_path / "out") and len(plan.files) > 3
    assert next(iter(plan.files)) == f"model-00001-of-{len(plan.files):05}.parquet"
    glob = f"{tmp_path}/out/*.parquet"
    assert duckdb.sql(f"SELECT max(octet_length(data)), sum(num_params) FROM '{glob}'").fetchall() == [(960, 16009)]
    for name, factor in (("a.weight", 1), ("b.weight", 2)):
        assert (opened.read(name) - weight.float() * factor).abs().max() < 0.04 * factor
    (tmp_path / "out" / list(plan.files)[1]).unlink()
    with pytest.raises(SourceError, match="rows instead of"):
        Parquet().open(tmp_path / "out", None)


def test_duckdb_reads_names_shapes_and_bytes(llama: Path, tmp_path: Path) -> None:
    snapshot, plan, _ = convert(llama, tmp_path / "out", make_target("INT4", group_size=32))
    table = f"'{tmp_path}/out/model.parquet'"
    rows = duckdb.sql(
        f"SELECT layer_name, shape, num_params, dtype, sha256(data) = data_sha256 FROM {table}"
    ).fetchall()
    assert {name: tuple(shape) for name, shape, *_ in rows} == {t.name: t.shape for t in snapshot.tensors.values()}
    assert all(count == np.prod(shape) for _, shape, count, *_ in rows)
    assert all(dtype == "bfloat16" and same for *_, dtype, same in rows)
    total = "sum(octet_length(data) + octet_length(scales) + octet_length(zero_points))"
    assert duckdb.sql(f"SELECT {total} FROM {table}").fetchall() == [(sum(t.size_bytes for t in plan.tensors),)]
    pairs = dict(duckdb.sql(f"SELECT decode(key), decode(value) FROM parquet_kv_metadata({table})").fetchall())
    assert pairs["schema_version"] == "3" and pairs["commit"] == snapshot.commit


def test_duckdb_and_numpy_decode_an_int8_layer(llama: Path, tmp_path: Path) -> None:
    _, _, opened = convert(llama, tmp_path / "out", make_target("INT8"))
    name = "model.layers.1.mlp.down_proj.weight"
    query = f"SELECT shape, data, scales FROM '{tmp_path}/out/model.parquet' WHERE layer_name = '{name}'"
    [(shape, data, scales)] = duckdb.sql(query).fetchall()
    scale = (np.frombuffer(scales, dtype="<u2").astype(np.uint32) << 16).view(np.float32)  # bfloat16
    weight = np.frombuffer(data, dtype=np.int8).reshape(shape) * scale[:, None]
    np.testing.assert_array_equal(weight, opened.read(name).numpy())


def test_duckdb_decodes_int4_codes_in_sql(tmp_path: Path) -> None:
    weight = torch.randn(3, 6)
    write_state_dict(tmp_path / "model", {"a.weight": weight.half()})
    convert(tmp_path / "model", tmp_path / "out", make_target("INT4"))
    # A BIT as text holds the low nibble of byte k in its characters 8k+5 to 8k+8.
    nibble = "('0b' || substr(data::BIT::VARCHAR, (i // 2 * 8 + CASE WHEN i % 2 = 0 THEN 5 ELSE 1 END)::INT, 4))::INT"
    query = f"SELECT {nibble} - 8 FROM '{tmp_path}/out/model.parquet', range(18) AS r(i) ORDER BY i"
    codes = AffineGrid(bits=4, scale_dtype="F16").encode(weight.half().float(), None)["codes"]
    assert [code for (code,) in duckdb.sql(query).fetchall()] == codes.flatten().tolist()


def test_the_examples_of_the_documentation_run(llama: Path, tmp_path: Path) -> None:
    _, _, opened = convert(llama, tmp_path / "out", make_target("INT8"))
    text = (Path(__file__).parents[1] / "docs" / "formats.md").read_text("utf-8")
    text = text.replace("out/quickstart/model/int8", f"{tmp_path}/out")
    [queries] = re.findall(r"```sql\n(.*?)```", text[text.index("## Parquet") :], re.DOTALL)
    sizes, damaged, codes = (duckdb.sql(query).fetchall() for query in queries.split(";") if query.strip())
    weight = opened.read("model.layers.0.mlp.up_proj.weight")
    assert {kind for kind, *_ in sizes} == {"int8", "bf16"} and damaged == []
    program, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    np.testing.assert_array_equal(names["weight"], weight.numpy())
    assert [code for *_, code in codes] == (weight[0, :8] / float(names["scale"][0])).tolist()


def write_v2(path: Path, rows: list[dict[str, Any]], **options: Any) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)


def test_schema_v2_is_read(tmp_path: Path) -> None:
    codes = torch.randint(-2, 2, (6, 10), dtype=torch.int8)
    scales, zeros = torch.rand(6), torch.randint(-1, 1, (6,)).float()
    columns, grouped = torch.rand(10), torch.rand(6, 3)
    half = torch.randn(4).half()

    def row(name: str, value: Tensor, kind: str, data: Tensor, **quant: Any) -> dict[str, Any]:
        shape = list(value.shape)
        facts = {
            "layer_name": name,
            "shape": shape,
            "dtype": "float16",
            "num_params": value.numel(),
            "quant_type": kind,
        }
        blank = {"scales": None, "zero_points": None, "quant_axis": -1, "group_size": -1}
        return {**facts, "data": data.numpy().tobytes(), **blank, **quant}

    packed = pack_bytes(to_unsigned(codes, 2).reshape(1, -1), 2)
    by_row = {"scales": scales.numpy().tobytes(), "zero_points": zeros.numpy().tobytes(), "quant_axis": 0}
    write_v2(
        tmp_path / "old.parquet",
        [
            row("int8", codes, "int8", codes, **by_row),
            row("int2", codes, "int2", packed, **by_row),
            row("columns", codes, "int8", codes, scales=columns.numpy().tobytes(), quant_axis=1),
            row("groups", codes, "int8", codes, scales=grouped.numpy().tobytes(), quant_axis=0, group_size=4),
            row("tensor", codes, "int8", codes, scales=scales[:1].numpy().tobytes()),
            row("half", half, "fp16", half),
        ],
        compression="snappy",
    )
    opened = Parquet().open(tmp_path, None)
    expected = (codes.float() - zeros[:, None]) * scales[:, None]
    assert torch.equal(opened.read("int8"), expected) and torch.equal(opened.read("int2"), expected)
    assert torch.equal(opened.read("columns"), codes * columns)
    assert torch.equal(opened.read("groups"), codes * grouped.repeat_interleave(4, 1)[:, :10])
    assert torch.equal(opened.read("tensor"), codes * scales[0])
    assert torch.equal(opened.read("half"), half.float())
    assert opened.stored("int2")[0] == "int2 channel"


def test_schema_v1_is_read(tmp_path: Path) -> None:
    value = torch.randn(3, 4)
    row = {
        "layer_name": "a",
        "shape": "[3, 4]",
        "dtype": "torch.float32",
        "data": value.numpy().tobytes(),
        "num_params": 12,
    }
    write_v2(tmp_path / "old.parquet", [row])
    assert torch.equal(Parquet().open(tmp_path, None).read("a"), value)


@pytest.mark.parametrize("keep", [0, 3, 2000, -9])
def test_a_truncated_table_is_a_source_error(keep: int, llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", make_target("INT8"))
    path = tmp_path / "out" / "model.parquet"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="cannot be read"):
        Parquet().open(tmp_path / "out", None)


def test_a_changed_byte_is_a_source_error(tmp_path: Path) -> None:
    write_state_dict(tmp_path / "model", {"a.weight": torch.randn(64, 64)})
    convert(tmp_path / "model", tmp_path / "out", make_target("INT8"))
    path = tmp_path / "out" / "model.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="checksum"):
        Parquet().open(tmp_path / "out", None).read("a.weight")


def test_a_table_of_something_else_is_a_source_error(tmp_path: Path) -> None:
    write_v2(tmp_path / "other.parquet", [{"x": 1}])
    with pytest.raises(SourceError, match="no column data, dtype, layer_name, shape"):
        Parquet().open(tmp_path, None)


def test_v2_values_of_the_wrong_length_are_a_source_error(tmp_path: Path) -> None:
    facts = {"layer_name": "a", "shape": [3, 4], "dtype": "float16", "quant_type": "int2", "num_params": 12}
    blobs = {"data": b"12", "scales": bytes(12), "zero_points": None, "quant_axis": 0, "group_size": 0}
    write_v2(tmp_path / "old.parquet", [facts | blobs])
    with pytest.raises(SourceError, match="do not take 2 bytes"):
        Parquet().open(tmp_path, None).read("a")


@pytest.mark.parametrize("scheme", ["INT2", "INT2_DOUBLE", "TERNARY", "KMEANS2"])
def test_a_second_conversion_gives_the_same_bytes_on_other_threads(scheme: str, llama: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    for name, count in (("one", 1), ("two", 3)):
        torch.set_num_threads(count)
        try:
            convert(llama, tmp_path / name, make_target(scheme, group_size=32))
        finally:
            torch.set_num_threads(threads)
    first = (tmp_path / "one" / "model.parquet").read_bytes()
    assert first == (tmp_path / "two" / "model.parquet").read_bytes()


def test_rules_keep_tensors_or_give_them_another_scheme(llama: Path, tmp_path: Path) -> None:
    target = make_target("INT2", ("embed_tokens", "BF16"), ("lm_head", "INT8"), group_size=32)
    _, _, opened = convert(llama, tmp_path / "out", target)
    stored = {name: opened.stored(name)[0] for name in opened.names}
    assert stored["model.embed_tokens.weight"] == "BF16"
    assert stored["lm_head.weight"] == "int8 channel"
    assert stored["model.layers.0.self_attn.q_proj.weight"] == "int2 g32"
    assert stored["model.norm.weight"] == "BF16"


VALUES = st.fixed_dictionaries(
    {
        "name": st.text(max_size=40),
        "i": st.integers(-(2**31), 2**31 - 1),
        "n": st.integers(-(2**63), 2**63 - 1),
        "shape": st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5).map(tuple),
        "data": st.binary(max_size=300),
    }
)


@settings(max_examples=50, deadline=None)
@given(groups=st.lists(st.lists(VALUES, min_size=1, max_size=20), max_size=18), compressed=st.booleans())
def test_pyarrow_reads_whatever_the_writer_writes_and_the_count_is_exact(
    groups: list[list[dict[str, Any]]], compressed: bool
) -> None:
    kinds: tuple[Any, ...] = ("string", "int32", "int64", "int64[]", "binary")
    columns = [
        Column(name=name, kind=kind, bounds=name == "name", compressed=name == "data")
        for name, kind in zip(("name", "i", "n", "shape", "data"), kinds, strict=True)
    ]
    file = io.BytesIO()
    writer = ParquetWriter(file, columns, {"key": "värde"}, parquet._compress)
    counter = ParquetWriter(None, columns, {"key": "värde"})
    for group in groups:
        writer.write_row_group(group, compressed=compressed)
        counter.write_row_group([row | {"data": Planned(len(row["data"]))} for row in group])
    size = writer.close()
    assert size == len(file.getvalue()) <= counter.close()
    assert compressed or size == counter._position
    table = pq.read_table(file)
    assert table.schema.metadata == {b"key": "värde".encode()}
    assert [row | {"shape": tuple(row["shape"])} for row in table.to_pylist()] == [
        row for group in groups for row in group
    ]


def test_the_bytes_of_a_small_table_do_not_change() -> None:
    file = io.BytesIO()
    writer = ParquetWriter(file, parquet_rows.COLUMNS, {"schema_version": "3"})
    grid = AffineGrid(bits=2, scale_dtype="F16")
    tensor = parquet.TensorPlan(name="w", source="w", shape=(2, 3), grid=grid, block=None, size_bytes=0, quantized=True)
    codes = torch.tensor([[-2, -1, 0], [1, 0, -1]], dtype=torch.int8)
    parts = {"codes": codes, "scale": torch.tensor([[0.5], [2.0]]).half()}
    writer.write_row_group([parquet_rows.encode_row(chunk, "F16", parts) for chunk in parquet_rows.chunks(tensor, 0)])
    assert writer.close() == 1751
    assert (
        hashlib.sha256(file.getvalue()).hexdigest()
        == "c800531c8ffcf096dfe40540749bcd2c6a324152b5f4a99bdc0d8313a844dfc2"
    )
