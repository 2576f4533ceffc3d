"""What is fuzzed: for each reader inputs that are whole, and what it does with the bytes of one."""

from __future__ import annotations

import atexit
import io
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from converter import provenance
from converter.compare.tables import read_comparison
from converter.containers.gguf import header
from converter.containers.gguf.authorship import card_metadata
from converter.containers.gguf.imatrix import open_imatrix
from converter.containers.gguf.open import open_file
from converter.containers.gguf.sampling import add_sampling
from converter.containers.gguf.tokenizer import describe_tokenizer
from converter.containers.parquet_file import ParquetWriter
from converter.containers.parquet_open import open_parquet
from converter.containers.parquet_rows import COLUMNS
from converter.front_matter import read_front_matter
from converter.lock import read_lock
from converter.manifest import load
from converter.pooling import declared_pooling
from converter.source import INDEX, open_folder
from converter.tokenizer import check_files
from jobs.survey import survey

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader: `seeds` are inputs to begin with, `read` raises errors of ours for those it refuses."""

    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[bytes], object]


@cache
def place(name: str) -> Path:
    """A folder for the files of one reader, which goes with this process."""
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def safetensors_file(text: bytes, size_bytes: int = 0) -> bytes:
    return struct.pack("<Q", len(text)) + text + bytes(size_bytes)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# Safetensors: the header alone, since a length in front of it would refuse nearly all that is mutated.


def headers() -> Sequence[bytes]:
    plain = {"__metadata__": {"format": "pt"}, "a.weight": entry("F32", [2, 4], 0, 32), "b": entry("BF16", [3], 32, 38)}
    packed = {
        "q.weight": entry("F8_E4M3", [4, 4], 0, 16),
        "q.weight_scale": entry("F32", [4, 1], 16, 32),
        "k.qweight": entry("I32", [4, 8], 32, 160),
        "k.qzeros": entry("I32", [1, 1], 160, 164),
        "k.scales": entry("F16", [1, 8], 164, 180),
        "k.g_idx": entry("I32", [32], 180, 308),
    }
    state = {"w.quant_state.bitsandbytes__nf4": entry("U8", [8], 0, 8), "w": entry("U8", [8, 1], 8, 16)}
    named = {"a._weight_qdata": entry("I8", [2, 4], 0, 8), "a._weight_scale": entry("F32", [2, 1], 8, 16)}
    return [json.dumps(one, separators=(",", ":")).encode() for one in (plain, packed, state, named)]


def read_header(data: bytes) -> None:
    folder = place("safetensors")
    try:
        spans = [one["data_offsets"][1] for one in json.loads(data).values() if "data_offsets" in one]
        size = min(max(spans, default=0), 1 << 16)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        size = 38
    (folder / "model.safetensors").write_bytes(safetensors_file(data, size if isinstance(size, int) else 38))
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    kinds = ({}, gptq, {"quant_method": "bitsandbytes"}, {"quant_method": "torchao"})
    settings = kinds[len(data) % len(kinds)]
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings} if settings else {}))
    snapshot = open_folder(folder, "fuzz")
    for name in snapshot.tensors:
        snapshot.read(name)


def indexes() -> Sequence[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}).encode()]


def read_index(data: bytes) -> None:
    folder = place("index")
    for name, shard in (("a", "one"), ("b", "two")):
        text = json.dumps({name: entry("U8", [1], 0, 1)}).encode()
        (folder / f"{shard}.safetensors").write_bytes(safetensors_file(text, 1))
    (folder / INDEX).write_bytes(data)
    open_folder(folder, "fuzz")


# GGUF


def gguf_files() -> Sequence[bytes]:
    fields = {
        "general.architecture": header.string("llama"),
        "general.alignment": header.u32(32),
        "general.file_type": header.u32(7),
        "llama.block_count": header.u32(1),
        "llama.rope.freq_base": header.f32(10000.0),
        "tokenizer.ggml.tokens": header.strings(["a", "b", "é"]),
        "tokenizer.ggml.scores": header.f32s([0.0, 1.0]),
        "tokenizer.ggml.token_type": header.i32s([1, 1, 3]),
        "x": header.booleans([True, False]),
    }
    placed = header.place([("token_embd.weight", (2, 32), "Q8_0"), ("output_norm.weight", (32,), "F32")])
    split = {"split.no": header.u16(0), "split.count": header.u16(1), "split.tensors.count": header.i32(2)}
    heads = (header.compose(fields, placed), header.compose(split, placed), header.compose({}, ()))
    return [head + bytes(header.file_size(b"", placed)) for head in heads]


def read_gguf(data: bytes) -> None:
    folder = place("gguf")
    (folder / "a.gguf").write_bytes(data)
    snapshot = open_folder(folder, "fuzz")
    for name in snapshot.tensors:
        snapshot.read(name)
    opened = open_file(folder, None)
    for name in opened.names:
        opened.stored(name)
        opened.read(name)


def imatrix_files() -> Sequence[bytes]:
    def values(count: int) -> NDArray[np.float32]:
        return np.linspace(0, 1, count, dtype=np.float32)

    old = struct.pack("<i", 2)
    for name, count in ((b"blk.0.attn_q.weight", 8), (b"output.weight", 4)):
        old += struct.pack("<i", len(name)) + name + struct.pack("<ii", 3, count) + values(count).tobytes()
    placed = header.place(
        [
            ("blk.0.ffn_up_exps.weight.in_sum2", (2, 32), "F32"),
            ("blk.0.ffn_up_exps.weight.counts", (2, 1), "F32"),
            ("output.weight.in_sum2", (1, 32), "F32"),
            ("output.weight.counts", (1, 1), "F32"),
        ]
    )
    fields = {
        "general.type": header.string("imatrix"),
        "imatrix.datasets": header.strings(["wiki.txt"]),
        "imatrix.chunk_count": header.u32(2),
        "imatrix.chunk_size": header.u32(512),
    }
    data = b"".join(
        values(stored.size_bytes // 4).tobytes().ljust(header.padded(stored.size_bytes), b"\0") for stored in placed
    )
    return [old, old + struct.pack("<ii", 10, 4) + b"wiki", header.compose(fields, placed) + data]


def read_imatrix(data: bytes) -> None:
    path = place("imatrix") / "a.imatrix"
    path.write_bytes(data)
    found = open_imatrix(path)
    for name, one in found.entries.items():
        columns = one.values // len(one.counts)
        shape = (len(one.counts), 1, columns)
        if not found.misfit(name, shape):
            found.importance(name, shape)


# Parquet


def tables() -> Sequence[bytes]:
    row = {column.name: 0 for column in COLUMNS} | {
        **{"layer_name": "a", "dtype": "float32", "quant_type": "int8", "packing": "none", "shape": (1, 4)},
        **{"num_chunks": 1, "num_params": 4, "bits": 8, "scales_dtype": "float32", "zero_points_dtype": ""},
        **{"data_sha256": "9f64a747e1b97f131fabb6b447296c9b6f0201e79fb3c5356e6c77e89b6a806a", "data": b"\1\2\3\4"},
        **{"scales": struct.pack("<f", 1.0), "zero_points": b""},
    }
    ours = io.BytesIO()
    writer = ParquetWriter(ours, COLUMNS, {"schema_version": "3"})
    writer.write_row_group([row])
    writer.close()
    older = io.BytesIO()
    facts = {"layer_name": "a", "shape": "[2]", "dtype": "torch.float32", "data": bytes(8), "num_params": 2}
    pq.write_table(pa.Table.from_pylist([facts]), older, compression="snappy")
    return [ours.getvalue(), older.getvalue()]


def read_tables(data: bytes) -> None:
    folder = place("parquet")
    (folder / "model.parquet").write_bytes(data)
    opened = open_parquet(folder)
    for name in opened.names:
        opened.stored(name)
        opened.read(name)


# Text


def manifests() -> Sequence[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "manifests").glob("*.yaml"))]


def read_manifest(data: bytes) -> None:
    path = place("manifest") / "m.yaml"
    (path.parent / "quickstart" / "model").mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    load(path).jobs()


def locks() -> Sequence[bytes]:
    lines = ["version: 1", "manifest: {name: n, sha256: 0}", "models: [{name: m, source: 'hub:a/b', commit: '0'}]"]
    return ["\n".join([*lines, "jobs: [{model: m, target: q}]"]).encode()]


def read_lock_file(data: bytes) -> None:
    path = place("lock") / "manifest.lock.yaml"
    path.write_bytes(data)
    read_lock(path)


def cards() -> Sequence[bytes]:
    return [
        b"---\nlicense: mit\nlanguage: [en, no]\ntags:\n- a\nbase_model: org/name\nname: X 7B\n"
        b"model-index:\n- name: x\n  results: []\ndatasets: [{name: d, url: https://x.y/z}]\n---\n# Title\n"
    ]


def read_card(data: bytes) -> None:
    folder = place("card")
    (folder / "README.md").write_bytes(data)
    card_metadata(read_front_matter(folder)[0], 7_000_000_000)


def lists() -> Sequence[bytes]:
    made = provenance.Conversion(
        source="hub:a/b", parameters={"target": {"format": "gguf"}}, settings={}, dependencies=(), versions={}
    )
    row = {"model": "m", "target": "t", "format": "gguf", "status": "done", "files": []}
    comparison = {"format_version": 1, "artifacts": [row], "sources": []}
    return [provenance.statement({"a": "0" * 64}, made).encode(), json.dumps(comparison).encode()]


def read_lists(data: bytes) -> None:
    folder = place("lists")
    (folder / "comparison.json").write_bytes(data)
    provenance.read_statement(data)
    read_comparison(folder)


# A model's small files, one after the other in one input, a line with the name of each before it.

TOKENIZERS = {
    "BPE": {"vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}, "merges": ["a b"], "byte_fallback": False},
    "WordPiece": {
        "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        "unk_token": "[UNK]",
        "max_input_chars_per_word": 100,
        "continuing_subword_prefix": "##",
    },
    "Unigram": {"vocab": [["<unk>", 0.0], ["a", -1.0], ["▁b", -2.0]], "unk_id": 0},
}


def tokenizer_files() -> Sequence[bytes]:
    found = []
    for kind, model in TOKENIZERS.items():
        bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        steps = {"BPE": bytewise, "WordPiece": {"type": "BertPreTokenizer"}, "Unigram": metaspace}[kind]
        added = [{"id": 0, "content": "<s>", "special": True, "lstrip": False}] if kind == "BPE" else []
        tokenizer = {
            "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]} if kind == "BPE" else None,
            "pre_tokenizer": steps,
            "decoder": steps if kind == "BPE" else None,
            "model": {"type": kind, **model},
        }
        settings = {"tokenizer_class": "X", "bos_token": "<s>", "chat_template": "{{ messages }}"}
        settings["added_tokens_decoder"] = {"7": {"content": "<x>", "special": True}}  # type: ignore[assignment]
        generation = {"temperature": 0.7, "top_k": 20}
        parts = (
            ("tokenizer.json", tokenizer),
            ("tokenizer_config.json", settings),
            ("generation_config.json", generation),
        )
        found.append(b"\n".join(name.encode() + b"\n" + json.dumps(part).encode() for name, part in parts))
    return found


def read_tokenizer(data: bytes) -> None:
    folder = place("tokenizer")
    lines = data.split(b"\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        said = dict(pairwise(lines))
        (folder / name).write_bytes(said.get(name.encode(), b"{}"))
    add_sampling(gguf.Metadata(), folder)
    check_files(folder, "fuzz")
    describe_tokenizer(folder, {"model_type": "llama", "vocab_size": 8}, 8, "fuzz")


def poolings() -> Sequence[bytes]:
    return [b'[{"type": "x.Pooling", "path": "one"}]\n{"pooling_mode": ["cls"], "pooling_mode_mean_tokens": true}']


def read_pooling(data: bytes) -> None:
    folder = place("pooling")
    (folder / "one").mkdir(exist_ok=True)
    modules, _, settings = data.partition(b"\n")
    (folder / "modules.json").write_bytes(modules)
    (folder / "one" / "config.json").write_bytes(settings)
    declared_pooling(folder, "fuzz")


def configs() -> Sequence[bytes]:
    llama = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 32},
        **{"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "hidden_act": "silu"},
    }
    moe = llama | {
        **{"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 2},
        **{"num_experts_per_tok": 1},
    }
    return [json.dumps(one).encode() for one in (llama, moe)]


def shapes() -> dict[str, list[int]]:
    block = "model.layers.0."
    attention = {"q_proj": [32, 32], "k_proj": [16, 32], "v_proj": [16, 32], "o_proj": [32, 32]}
    return {
        "model.embed_tokens.weight": [8, 32],
        "model.norm.weight": [32],
        f"{block}input_layernorm.weight": [32],
        f"{block}post_attention_layernorm.weight": [32],
        **{f"{block}self_attn.{name}.weight": shape for name, shape in attention.items()},
        **{f"{block}mlp.{name}.weight": [32, 32] for name in ("gate_proj", "up_proj", "down_proj")},
    }


def write_around(folder: Path) -> None:
    """Weights and a tokenizer that go with the first of `configs`."""
    declared, end = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        declared[name] = entry("BF16", shape, end, end + size)
        end += size
    (folder / "model.safetensors").write_bytes(safetensors_file(json.dumps(declared).encode(), end))
    (folder / "tokenizer.json").write_bytes(tokenizer_files()[0].split(b"\n")[1])


def read_config(data: bytes) -> None:
    folder = place("config")
    if not (folder / "model.safetensors").exists():
        write_around(folder)
    (folder / "config.json").write_bytes(data)
    survey(f"folder:{folder}", folder / "cache")


TARGETS: Mapping[str, Target] = {
    "safetensors": Target(seeds=headers, read=read_header),
    "index": Target(seeds=indexes, read=read_index),
    "gguf": Target(seeds=gguf_files, read=read_gguf),
    "imatrix": Target(seeds=imatrix_files, read=read_imatrix),
    "parquet": Target(seeds=tables, read=read_tables),
    "manifest": Target(seeds=manifests, read=read_manifest),
    "lock": Target(seeds=locks, read=read_lock_file),
    "card": Target(seeds=cards, read=read_card),
    "lists": Target(seeds=lists, read=read_lists),
    "tokenizer": Target(seeds=tokenizer_files, read=read_tokenizer),
    "pooling": Target(seeds=poolings, read=read_pooling),
    "config": Target(seeds=configs, read=read_config),
}
