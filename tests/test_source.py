"""Snapshots of folders: what is read, and each way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from converter.errors import NumericsError, SourceError, UnsupportedError
from converter.source import (
    INDEX,
    Snapshot,
    header_length,
    open_folder,
    parse_header,
    tied,
    travels,
)
from converter.values import DTYPES
from patience import PATIENCE_SECONDS

WEIGHTS = {"b.weight": torch.arange(12.0).reshape(3, 4).bfloat16(), "a.bias": torch.tensor([1.0, 2.0])}


def write_raw(path: Path, header: object, data: bytes = b"") -> None:
    """A safetensors file with whatever header one likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_sharded(folder: Path, weights: Mapping[str, torch.Tensor], **changes: str) -> None:
    """Two shards and their index; `changes` are entries of the index that lie."""
    names = sorted(weights)
    shards = {name: f"model-{1 + (i > 0):05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(shards.values()):
        save_file({name: weights[name] for name in names if shards[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards | changes}))


def test_every_type_is_read_as_safetensors_reads_it(tmp_path: Path) -> None:
    weights = {}
    for name, dtype in DTYPES.items():
        raw = torch.arange(24, dtype=torch.uint8).reshape(3, 8) % (2 if name == "BOOL" else 24)
        weights[f"t.{name}"] = raw.view(dtype)
    weights |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 5)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    snapshot = open_folder(tmp_path, "test")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert list(snapshot.tensors) == sorted(file.keys())
        for name in weights:
            theirs, ours = file.get_tensor(name), snapshot.read(name)
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
            assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8))


def test_sharded_and_single_checkpoints_give_the_same_tensors(tmp_path: Path) -> None:
    weights = {f"layer.{n}.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(n)) for n in range(5)}
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    save_file(weights, tmp_path / "one" / "model.safetensors")
    write_sharded(tmp_path / "two", weights)
    one, two = open_folder(tmp_path / "one", "test"), open_folder(tmp_path / "two", "test")
    assert list(one.tensors) == list(two.tensors) == sorted(weights)
    assert len({header.file for header in two.tensors.values()}) == 2
    for name, weight in weights.items():
        assert torch.equal(one.read(name), weight) and torch.equal(two.read(name), weight)


def test_state_dict_without_config_is_a_model(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    snapshot = open_folder(tmp_path, "test")
    assert snapshot.config == {} and set(snapshot.tensors) == set(WEIGHTS)


def test_snapshot_crosses_processes_and_reads_there(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    snapshot: Snapshot = pickle.loads(pickle.dumps(open_folder(tmp_path, "test")))
    assert torch.equal(snapshot.read("b.weight"), WEIGHTS["b.weight"])
    assert snapshot.config["model_type"] == "llama" and snapshot.source == f"folder:{tmp_path}"
    assert snapshot.files == {name: (tmp_path / name).stat().st_size for name in ("config.json", "model.safetensors")}


# fp8


@pytest.mark.parametrize(
    ("scale", "shape"),
    [
        ("weight_scale", ()),
        ("weight_scale", (1,)),
        ("weight_scale", (200,)),
        ("weight_scale", (200, 1)),
        ("weight_scale_inv", (2, 3)),
        ("weight_scale_inv", (200, 300)),
    ],
)
def test_fp8_weight_comes_multiplied_out_and_its_scale_is_hidden(
    tmp_path: Path, scale: str, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 300, generator=generator).to(torch.float8_e4m3fn)
    factor = torch.rand(shape, generator=generator) + 0.5
    weights = {"q.weight": weight, f"q.{scale}": factor, "q.input_scale": torch.tensor(1.0), "n.weight": torch.ones(3)}
    save_file(weights, tmp_path / "model.safetensors")
    snapshot = open_folder(tmp_path, "test")
    assert list(snapshot.tensors) == ["n.weight", "q.weight"]
    expected = weight.float().clone()
    for row in range(200):
        for block in range(3):
            columns = slice(128 * block, 128 * block + 128)
            if shape == (2, 3):
                expected[row, columns] *= factor[row // 128, block]
            elif shape == (200, 300):
                expected[row, columns] *= factor[row, columns]
            else:
                expected[row, columns] *= factor.flatten()[row if factor.numel() > 1 else 0]
    assert torch.equal(snapshot.read("q.weight"), expected)


def test_fp8_experts_are_scaled_block_by_block(tmp_path: Path) -> None:
    weight = torch.ones(2, 8, 6).to(torch.float8_e4m3fn)
    scale = torch.arange(2.0 * 2 * 2).reshape(2, 2, 2) + 1
    weights = {"experts.up_proj": weight, "experts.up_proj_scale_inv": scale}
    save_file(weights, tmp_path / "model.safetensors")
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = open_folder(tmp_path, "test").read("experts.up_proj")
    assert read[1, 5, 4] == scale[1, 1, 1] and read[0, 3, 3] == scale[0, 0, 1] and read[1, 4, 2] == scale[1, 1, 0]


def test_fp8_without_scale_keeps_its_type_and_a_scale_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    weight = torch.ones(4, 4).to(torch.float8_e5m2)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    assert open_folder(tmp_path, "test").read("w").dtype == torch.float8_e5m2
    for shape in [(3, 1), (1, 4, 1), (5,), (2, 2)]:
        save_file({"w": weight, "w_scale": torch.ones(shape)}, tmp_path / "model.safetensors")
        with pytest.raises(SourceError, match="do not fit a weight of shape"):
            open_folder(tmp_path, "test")


def test_ordinary_tensor_named_like_a_scale_stays(tmp_path: Path) -> None:
    save_file(
        {"w": torch.ones(2), "w_scale": torch.ones(2), "x.weight_scale": torch.ones(1)}, tmp_path / "a.safetensors"
    )
    assert len(open_folder(tmp_path, "test").tensors) == 3


# Values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_value_that_is_not_finite_is_named_counted_and_located(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.ones(6, 7)
    weight[2, 3] = weight[5, 6] = float("nan")
    save_file({"layer.3.weight": weight.to(dtype)}, tmp_path / "model.safetensors")
    snapshot = open_folder(tmp_path, "test")
    with pytest.raises(NumericsError, match=r"layer\.3\.weight: 2 of 42 values are not finite, the first at \[2, 3\]"):
        snapshot.read("layer.3.weight")


def test_infinity_is_found_beyond_the_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.values.CHUNK", 10)
    weight = torch.ones(6, 7)
    weight[4, 0] = -float("inf")
    save_file({"w": weight}, tmp_path / "model.safetensors")
    with pytest.raises(NumericsError, match=r"1 of 42 .* \[4, 0\]"):
        open_folder(tmp_path, "test").read("w")


# Damaged files

BAD_HEADERS: dict[str, tuple[object, bytes, str]] = {
    "no json": (b"{", b"", "broken JSON"),
    "no utf-8": (b'{"\xff": 1}', b"", "broken JSON"),
    "deep": (b"[" * 100_000, b"", "broken JSON"),
    "list": ([1], b"", "not an object"),
    "twice": (b'{"a": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "a": {}}', b"", "'a' appears twice"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8), "declared without"),
    "entry is text": ({"a": "F32"}, bytes(8), "declared without"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, bytes(8), "declared without"),
    "type unknown": ({"a": entry("F4")}, bytes(8), "unknown type 'F4'"),
    "type is a list": ({"a": entry(["F32"])}, bytes(8), "unknown type"),
    "shape is text": ({"a": entry(shape="22")}, bytes(8), "that is none"),
    "negative shape": ({"a": entry(shape=(-1, -2))}, bytes(8), "that is none"),
    "true shape": ({"a": entry(shape=(True, 2))}, bytes(8), "that is none"),
    "float offset": ({"a": entry(offsets=(0, 8.0))}, bytes(8), "that is none"),
    "negative offset": ({"a": entry(offsets=(-8, 0))}, bytes(8), "that is none"),
    "name with control": ({"a\n": entry()}, bytes(8), "that is none"),
    "length lies": ({"a": entry(shape=(3,))}, bytes(8), "needs 12 bytes, its offsets span 8"),
    "shape overflows": ({"a": entry(shape=(1 << 40, 1 << 40))}, bytes(8), "that is none"),
    "rows without columns": ({"a": entry(shape=(1 << 40, 1 << 40, 0), offsets=(0, 0))}, b"", "that is none"),
    "end before start": ({"a": entry(offsets=(8, 0))}, bytes(8), "its offsets span -8"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), "'b' leaves a gap"),
    "gap at first": ({"a": entry(offsets=(4, 12))}, bytes(12), "'a' leaves a gap"),
    "truncated": ({"a": entry()}, bytes(5), "truncated: 3 of"),
    "too long": ({"a": entry()}, bytes(9), "1 bytes after the last tensor"),
    "empty": ({}, b"", "hold no tensor"),
}


def test_rows_of_no_columns_are_one_slab(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": entry(shape=(1 << 40, 0), offsets=(0, 0))})
    (slab,) = open_folder(tmp_path, "test").slabs("a", 1000)
    assert slab.shape == (1 << 40, 0)


@pytest.mark.parametrize("fault", BAD_HEADERS)
def test_header_that_lies_is_refused_before_any_work(tmp_path: Path, fault: str) -> None:
    header, data, what = BAD_HEADERS[fault]
    write_raw(tmp_path / "model.safetensors", header, data)
    with pytest.raises(SourceError, match=what) as caught:
        open_folder(tmp_path, "manifest.yaml:3:5")
    assert caught.value.where.startswith("manifest.yaml:3:5") and caught.value.remedy
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("data", [b"", b"\0" * 7, struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 3) + b"{}"])
def test_file_without_room_for_its_header_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(SourceError, match="bytes"):
        open_folder(tmp_path, "test")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_header_parser(data: bytes) -> None:
    try:
        length = header_length(data[:8], len(data), "f", "test")
        headers = parse_header(data[8 : 8 + length], len(data), "f", "test")
    except SourceError:
        return
    assert all(header.end <= len(data) for header in headers)


@given(st.data())
def test_headers_cover_the_file_or_are_refused(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    declared = {
        f"t{n}": entry("U8", [size], [start, start + size])
        for n, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    victim = data.draw(st.sampled_from(sorted(declared)))
    shift = data.draw(st.integers(0, 3))
    size = len(declared[victim]["shape"]) and declared[victim]["shape"][0]  # type: ignore[index, arg-type]
    begin = declared[victim]["data_offsets"][0] + shift  # type: ignore[index]
    declared[victim]["data_offsets"] = [begin, begin + size]
    text = json.dumps(declared).encode()
    total = 8 + len(text) + sum(sizes)
    try:
        headers = parse_header(text, total, "f", "test")
    except SourceError:
        assert shift
        return
    assert sum(header.end - header.start for header in headers) == sum(sizes)
    assert max(header.end for header in headers) == total


def test_file_cut_after_planning_is_told_when_it_is_read(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    snapshot = open_folder(tmp_path, "test")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    last = max(snapshot.tensors.values(), key=lambda header: header.end)
    with pytest.raises(SourceError, match="ends 1 bytes before"):
        snapshot.read(last.name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="is not here"):
        snapshot.read(last.name)


# Shards and indexes


def test_missing_shard_is_named_with_what_it_holds(tmp_path: Path) -> None:
    write_sharded(tmp_path, WEIGHTS)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model-00002-of-00002\.safetensors with 1 of 2 tensors is missing"):
        open_folder(tmp_path, "test")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"ghost": "model-00001-of-00002.safetensors"}, "'ghost' into .* does not hold it"),
        ({"a.bias": "model-00002-of-00002.safetensors"}, "'a.bias' into .* does not hold it"),
        ({"x": "../model.safetensors"}, "could lead out"),
        ({"x": "/etc/passwd"}, "could lead out"),
        ({"x": "sub\\..\\model.safetensors"}, "could lead out"),
    ],
)
def test_index_that_lies_is_refused(tmp_path: Path, changes: dict[str, str], what: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    write_sharded(folder, WEIGHTS, **changes)
    with pytest.raises(SourceError, match=what):
        open_folder(folder, "test")


def test_shard_with_more_than_its_index_says_is_told(tmp_path: Path) -> None:
    write_sharded(tmp_path, WEIGHTS)
    save_file({"b.weight": WEIGHTS["b.weight"], "c": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(SourceError, match=r"tensor 'c', which .* does not name \(1 in all\)"):
        open_folder(tmp_path, "test")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{", "[]"])
def test_broken_index_is_refused(tmp_path: Path, text: str) -> None:
    write_sharded(tmp_path, WEIGHTS)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(SourceError):
        open_folder(tmp_path, "test")


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "one.safetensors")
    save_file({"a.bias": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(SourceError, match=r"'a\.bias' is in both"):
        open_folder(tmp_path, "test")


# Models that are not converted


def test_pickled_weights_are_refused_with_a_command_that_works(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "training_args.bin")
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        torch.save({name: weight}, tmp_path / f"pytorch_model-{number}.bin")
    with pytest.raises(SourceError, match="pickled") as caught:
        open_folder(tmp_path, "test")
    command = caught.value.remedy.split('`python -c "')[1].removesuffix('"`')
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True, timeout=PATIENCE_SECONDS)
    assert torch.equal(open_folder(tmp_path, "test").read("b.weight"), WEIGHTS["b.weight"])


def test_file_name_of_a_stranger_does_not_enter_the_command(tmp_path: Path) -> None:
    (tmp_path / "a'); import os; os.system('id'); ('.bin").write_bytes(b"x")
    with pytest.raises(SourceError) as caught:
        open_folder(tmp_path, "test")
    assert "os.system" not in caught.value.remedy


@pytest.mark.parametrize(
    ("files", "kind", "what"),
    [
        ({"weights.pth": b"x"}, SourceError, "pickled"),
        ({"model.ckpt": b"x"}, SourceError, "pickled"),
        ({"sub/model.pt": b"x"}, SourceError, "pickled"),
        ({"m.gguf": b"GGUF"}, SourceError, "not a GGUF file"),
        ({"config.json": b"{}"}, SourceError, "no .safetensors file"),
        ({}, SourceError, "no .safetensors file"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, UnsupportedError, "an adapter"),
    ],
)
def test_folder_without_weights_to_convert_is_told_why(
    tmp_path: Path, files: dict[str, bytes], kind: type[Exception], what: str
) -> None:
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=what):
        open_folder(tmp_path, "test")


def test_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no folder"):
        open_folder(tmp_path / "none", "test")


@pytest.mark.parametrize("config", [b"{", b"[]", b"", b"\xff\xfe", b'{"a": 1, "a": 2}'])
def test_broken_config_is_refused(tmp_path: Path, config: bytes) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(SourceError, match=r"config\.json"):
        open_folder(tmp_path, "test")


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, True),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, True),
        (None, True),
        ({"quant_method": "gptq", "bits": 4}, True),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, False),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, False),
        ({"quant_method": "aqlm"}, False),
        ("int8", False),
    ],
)
def test_a_checkpoint_that_is_quantized_in_a_way_not_read_is_refused(
    tmp_path: Path, settings: Any, taken: bool
) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    if taken:
        assert open_folder(tmp_path, "test").tensors
    else:
        with pytest.raises(UnsupportedError, match=r"already quantized|not an object"):
            open_folder(tmp_path, "test")


# Small questions


@pytest.mark.parametrize(
    ("config", "names", "expected"),
    [
        ({"tie_word_embeddings": True}, ["embed.weight"], True),
        ({}, ["embed.weight"], True),
        ({"text_config": {"tie_word_embeddings": None}}, ["embed.weight"], True),
        ({"tie_word_embeddings": False}, ["embed.weight"], False),
        ({"text_config": {"tie_word_embeddings": False}}, ["embed.weight"], False),
        ({"tie_word_embeddings": True}, ["embed.weight", "lm_head.weight"], False),
    ],
)
def test_head_is_tied_when_it_is_absent_and_not_denied(
    config: dict[str, object], names: list[str], expected: bool
) -> None:
    assert tied(config, names) is expected


def test_small_files_that_are_no_weights_travel() -> None:
    assert travels("tokenizer.model", 5 << 20) and travels("sub/chat_template.jinja", 10)
    assert not travels("big.json", 33 << 20)
    assert not any(travels(name, 1) for name in ("a.safetensors", "a.BIN", "a.gguf", "x/optimizer.pt"))
