"""GGUF without its reader: the mixture table, exact sizes, golden bytes, the way there and back, bad input."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import gguf_models as tiny
from converter.containers.gguf import GGUF, header
from converter.containers.gguf.imatrix import Sums, write_imatrix
from converter.errors import SourceError, UnsupportedError
from converter.manifest import Rule
from converter.schemes import GGUF_TYPES

# File types with tensors that are no use without importance, which these tests mostly do without.
DEMANDING = ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")
GOLDEN_HEAD = "5ca6023fec4e81e52b98aae3539613e3799e88295401342ebcafe6390aaab0ad"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


@pytest.fixture(scope="session")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny.save_model(folder, "llama")
    tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    card = "---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [test]\nbase_model: acme/base\n---\n# Tiny\n"
    (folder / "README.md").write_text(card)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "tiny-llama"))


def plan(folder: Path, type: str = "Q8_0", **more: Any) -> Any:
    return GGUF.plan(*tiny.load(folder), tiny.target(type, **more))


# --- plan ----------------------------------------------------------------------------------------------------------


def test_norms_and_biases_stay_f32_and_the_head_gets_more_bits(llama: Path) -> None:
    types = {tensor.name: tensor.grid.name for tensor in plan(llama, "Q4_K_M").tensors}
    assert types["output.weight"] == "Q6_K"
    assert types["token_embd.weight"] == "Q4_K"
    assert {types[name] for name in types if "norm" in name or name.endswith(".bias")} == {"F32"}


def test_an_embedding_that_is_also_the_head_is_stored_as_the_head(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "qwen2")
    tiny.save_tokenizer(tokenizer, tmp_path)
    types = {tensor.name: tensor.grid.name for tensor in plan(tmp_path, "Q4_K_M").tensors}
    assert types["token_embd.weight"] == "Q6_K" and "output.weight" not in types


def test_rules_win_over_the_mixture_and_the_shape_over_rules(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "llama", middle=352)
    tiny.save_tokenizer(tokenizer, tmp_path)
    rules = (Rule(pattern=r"lm_head", type="BF16"), Rule(pattern=r"\.1\.mlp", type="Q6_K"))
    tensors = {tensor.name: tensor for tensor in plan(tmp_path, "Q4_K_M", rules=rules).tensors}
    assert tensors["output.weight"].grid.name == "BF16" and not tensors["output.weight"].quantized
    assert tensors["blk.1.ffn_up.weight"].grid.name == "Q6_K"
    assert tensors["blk.1.ffn_down.weight"].grid.name == "Q8_0" and "352" in tensors["blk.1.ffn_down.weight"].fallback
    assert tensors["blk.0.ffn_down.weight"].grid.name == "Q5_0"  # Q4_K of the mixture, falling back
    assert tensors["blk.0.ffn_up.weight"].grid.name == "Q4_K" and tensors["blk.0.ffn_up.weight"].fallback == ""


@pytest.mark.parametrize("type", DEMANDING)
def test_the_plan_refuses_types_that_need_importance_and_says_where_to_get_it(llama: Path, type: str) -> None:
    with pytest.raises(UnsupportedError, match=r"blk\.\d\.\w+\.weight.*which needs importance.*imatrix: true"):
        plan(llama, type)
    assert plan(llama, type, imatrix=True).tensors


def test_a_fallback_is_refused_in_the_plan_where_asked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny.save_model(tmp_path, "llama", middle=352)
    tiny.save_tokenizer(tokenizer, tmp_path)
    with pytest.raises(UnsupportedError, match=r"matrices do not fit: blk\.0\.ffn_down\.weight \(rows of 352"):
        plan(tmp_path, "Q4_K_M", fallback="refuse")


def test_rules_may_speak_of_the_names_in_the_file(llama: Path) -> None:
    rules = (Rule(pattern=r"^blk\.\d+\.ffn_up", type="F16"),)
    tensors = {tensor.name: tensor.grid.name for tensor in plan(llama, "Q4_0", rules=rules).tensors}
    assert {name for name, type in tensors.items() if type == "F16"} == {name for name in tensors if "ffn_up" in name}


def test_the_search_reaches_the_grids_of_what_is_quantized(llama: Path) -> None:
    grids = {tensor.grid.search for tensor in plan(llama, search="thorough").tensors if tensor.quantized}
    assert grids == {"thorough"}
    assert {t.grid for t in plan(llama).tensors if not t.quantized} == {
        t.grid for t in plan(llama, search="thorough").tensors if not t.quantized
    }


def test_gptq_always_weighs_by_what_it_collects() -> None:
    assert tiny.target("Q4_K_M", methods=("gptq",)).with_defaults().collects_imatrix
    assert tiny.target("Q4_K_M", methods=("gptq",), imatrix="/a/file").with_defaults().imatrix_file == Path("/a/file")
    assert not tiny.target("Q4_K_M").with_defaults().weighs_columns


def test_the_remedy_for_an_embedding_without_importance_is_one_that_works(llama: Path) -> None:
    with pytest.raises(UnsupportedError) as refused:
        plan(llama, "Q4_K_M", imatrix=True, embedding_type="IQ2_XXS")
    assert "Name an imatrix file" in str(refused.value) and "embedding_type" in str(refused.value)


def test_planning_reads_no_weight(copy: Path) -> None:
    before = plan(copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    weights.write_bytes(data[:start] + bytes(b"\xff" * (len(data) - start)))  # every value NaN
    assert {t.name: t.size_bytes for t in plan(copy).tensors} == {t.name: t.size_bytes for t in before.tensors}


# --- file ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [type for type in GGUF_TYPES if type not in DEMANDING])
def test_the_file_has_the_planned_size_and_opens_to_what_was_stored(llama: Path, type: str, tmp_path: Path) -> None:
    wanted = tiny.target(type)
    planned = tiny.write(llama, wanted, tmp_path)
    (path,) = tmp_path.iterdir()
    assert dict(planned.files) == {path.name: path.stat().st_size} and path.name == f"tiny-llama-{type}.gguf"
    snapshot, architecture = tiny.load(llama)
    opened = GGUF.open(tmp_path, architecture)
    assert set(opened.names) == set(snapshot.tensors)
    for tensor in planned.tensors:
        weight = snapshot.read(tensor.source).float()
        expected = tensor.grid.decode(tensor.grid.encode(weight, None)).reshape(weight.shape)
        assert torch.equal(opened.read(tensor.source), expected), tensor.name
        assert opened.stored(tensor.source) == (tensor.grid.name, tensor.size_bytes)
        assert opened.activations(tensor.source) is None


def test_gguf_py_reads_the_file_as_we_do(llama: Path, tmp_path: Path) -> None:
    tiny.write(llama, tiny.target("Q4_K_M"), tmp_path)
    (path,) = tmp_path.iterdir()
    theirs, ours = gguf.GGUFReader(path), header.read_head(path)
    assert {t.name for t in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == mine.shape and tensor.tensor_type.name == mine.type
        assert (tensor.data_offset, tensor.n_bytes) == (ours.data_start + mine.offset, mine.size_bytes)
    for key, field in ours.fields.items():
        value = theirs.get_field(key).contents()
        assert value == (list(field.value) if isinstance(field.value, tuple) else field.value), key


def test_what_gguf_py_writes_is_read_by_us(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("some.names", ["a", "ü", ""])
    writer.add_float64("some.wide", 0.1)
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("values", values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    head = header.read_head(path)
    assert head.value("some.names") == ("a", "ü", "") and head.value("some.wide") == 0.1
    assert head.tensors["values"].shape == (3, 4)


def test_the_head_says_where_the_model_comes_from(llama: Path, tmp_path: Path) -> None:
    tiny.write(llama, tiny.target("Q4_K_M", imatrix=True), tmp_path)
    head = header.read_head(next(tmp_path.iterdir()))
    snapshot, _ = tiny.load(llama)
    expected = {
        "general.architecture": "llama",
        "general.name": "Tiny Llama",
        "general.license": "apache-2.0",
        "general.languages": ("en", "de"),
        "general.tags": ("test",),
        "general.base_model.0.repo_url": "https://huggingface.co/acme/base",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.quantized_by": "hubmill",
        "hubmill.source.commit": snapshot.commit,
        "quantize.imatrix.entries_count": 14,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: head.value(key) for key in expected} == expected
    assert not any(str(llama.parent) in str(field.value) for field in head.fields.values())


def test_the_head_is_the_same_bytes_every_time_and_on_every_machine() -> None:
    fields = {
        "general.architecture": header.string("llama"),
        "a.u32": header.u32(7),
        "a.f32": header.f32(0.5),
        "a.bool": header.boolean(True),
        "a.strings": header.strings(["x", "ü"]),
        "a.i32s": header.i32s([-1, 2]),
        "a.f32s": header.f32s([0.25]),
    }
    placed = header.place([("one", (2, 256), "Q4_K"), ("two", (3,), "F32"), ("three", (1, 32), "Q8_0")])
    head = header.compose(fields, placed)
    assert [stored.offset for stored in placed] == [0, 288, 320]
    assert len(head) % 32 == 0 and header.file_size(head, placed) == len(head) + 320 + 64
    assert head[:8] == b"GGUF\x03\x00\x00\x00"
    assert hashlib.sha256(head).hexdigest() == GOLDEN_HEAD


def test_an_imatrix_file_holds_sums_and_counts_for_each_weight(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    squares = torch.arange(64, dtype=torch.float64)
    write_imatrix(
        path, {"blk.0.attn_q.weight": Sums(sum_squares=squares[None], counts=torch.tensor([512]))}, ["builtin"], 4, 128
    )
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.attn_q.weight.in_sum2"].data.reshape(-1).tolist() == squares.tolist()
    assert tensors["blk.0.attn_q.weight.counts"].data.reshape(-1).tolist() == [512.0]
    assert reader.get_field("general.type").contents() == "imatrix"
    assert reader.get_field("imatrix.datasets").contents() == ["builtin"]
    assert reader.get_field("imatrix.chunk_count").contents() == 4


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_attention_heads": 5}, "5 heads, which 2 key-value heads do not divide"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope scaling 'llama3' is incomplete"),
    ],
)
def test_a_config_that_is_incomplete_or_contradicts_itself_is_refused(
    copy: Path, changes: dict[str, Any], words: str
) -> None:
    tiny.edit_json(copy / "config.json", **changes)
    with pytest.raises(SourceError, match=words):
        plan(copy)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_gguf_cannot_say_is_refused(copy: Path, changes: dict[str, Any], words: str) -> None:
    tiny.edit_json(copy / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=words):
        plan(copy)


def test_a_model_without_architecture_is_refused(llama: Path) -> None:
    snapshot, architecture = tiny.load(llama)
    with pytest.raises(UnsupportedError, match="model family"):
        GGUF.plan(snapshot, None, tiny.target("Q8_0"))
    with pytest.raises(UnsupportedError, match="llama has no GGUF section"):
        GGUF.plan(snapshot, replace(architecture, gguf=None), tiny.target("Q8_0"))


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar to 144, .* with 64"),
        ("gemma2", {"num_hidden_layers": 46}, "query_pre_attn_scalar to 64, .* with 32"),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .* last of every 2 layers"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings to False"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation to 'gelu'"),
        ("gemma3", {"layer_types": None, "sliding_window_pattern": 1}, "sliding_window_pattern to 1"),
        ("gemma3", {"layer_types": None, "rope_local_base_freq": 5000}, "rope_local_base_freq to 5000"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping to 30.0"),
    ],
)
def test_a_gemma_that_readers_compute_otherwise_is_refused(
    tokenizer: Tokenizer, tmp_path: Path, family: str, changes: dict[str, Any], words: str
) -> None:
    tiny.save_model(tmp_path, family)
    tiny.save_tokenizer(tokenizer, tmp_path)
    tiny.edit_json(tmp_path / "config.json", **changes)
    with pytest.raises(UnsupportedError, match=words):
        plan(tmp_path)


def test_the_window_that_readers_do_without_is_told_when_the_context_can_exceed_it(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tiny.save_model(tmp_path, "mistral", sliding_window=100)
    tiny.save_tokenizer(tokenizer, tmp_path)
    (said,) = plan(tmp_path).notes
    assert "the last 100 only" in said and not said.endswith(".")
    tiny.edit_json(tmp_path / "config.json", max_position_embeddings=100)
    assert plan(tmp_path).notes == ()


def test_a_card_that_cannot_be_read_is_told_and_stops_nothing(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: [unclosed\n---\n# A model\n")
    assert any("front matter of README.md cannot be read" in note for note in plan(copy).notes)


def test_a_missing_broken_or_foreign_tokenizer_is_refused_in_the_plan(copy: Path) -> None:
    path = copy / "tokenizer.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"tokenizer\.json: broken"):
        plan(copy)
    content = json.loads(whole)
    content["model"]["vocab"]["another"] = 5000
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match="5001 tokens, and the embedding 1024 rows"):
        plan(copy)
    path.write_text(json.dumps(json.loads(whole) | {"model": {"type": "WordLevel", "vocab": {"a": 0}}}))
    with pytest.raises(UnsupportedError, match="WordLevel"):
        plan(copy)
    path.unlink()
    with pytest.raises(SourceError, match="has no tokenizer"):
        plan(copy)


def test_a_way_of_splitting_without_a_name_is_refused_until_the_manifest_accepts_the_nearest(copy: Path) -> None:
    path = copy / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, bytes_]}
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(UnsupportedError, match=r"the nearest, '([\w-]+)'.*metadata: \{tokenizer\.ggml\.pre: \1\}"):
        plan(copy)
    accepted = plan(copy, metadata={"tokenizer.ggml.pre": "qwen2"})
    assert any("'qwen2', cuts otherwise" in note for note in accepted.notes)


def test_a_tokenizer_that_changes_after_planning_is_noticed_before_anything_is_written(
    copy: Path, tmp_path: Path
) -> None:
    snapshot, architecture = tiny.load(copy)
    wanted = tiny.target("Q8_0")
    planned = GGUF.plan(snapshot, architecture, wanted)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(SourceError, match="plan anew"):
        GGUF.write(planned, snapshot, architecture, wanted, lambda name: {}, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 3, 20, 30, 2000, -1, -5000])
def test_a_truncated_file_is_refused(llama: Path, tmp_path: Path, kept: int) -> None:
    tiny.write(llama, tiny.target("Q8_0"), tmp_path)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    last = max(header.read_head(path).tensors.values(), key=lambda stored: stored.offset)
    size = kept if kept >= 0 else len(data) - (header.padded(last.size_bytes) - last.size_bytes) + kept
    path.write_bytes(data[:size])
    with pytest.raises(SourceError):
        GGUF.open(tmp_path, tiny.load(llama)[1])


@given(at=st.integers(0, 2000), value=st.integers(0, 255))
def test_a_damaged_head_is_refused_or_read_but_never_anything_else(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    placed = header.place([(f"blk.{i}.weight", (4, 256), "Q4_K") for i in range(20)])
    data = bytearray(header.compose({"a": header.strings(["x"] * 40), "b": header.f32(1)}, placed))
    data += bytes(sum(header.padded(stored.size_bytes) for stored in placed))
    data[at] = value
    path.write_bytes(data)
    with contextlib.suppress(SourceError):
        header.read_head(path)
