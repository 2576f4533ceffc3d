"""llama-quantize as stock llama.cpp has it: `llama_model_quantize` of a released libllama, called through ctypes.

It is asked for the type that every tensor of small generated models gets, and its answers are the truth that our
mixtures are held to. It needs hyper-parameters and tensor names and never builds the graph, so tensors of two rows do.
The library comes from the npm package @node-llama-cpp/linux-x64, which `make peers` brings to .venv/peers; the variable
HUBMILL_LLAMA_LIB names another folder. It runs in a process of its own, for what it does not like can end in an abort.

Run as a program, it answers questions on standard input, a line of JSON each.
"""

# O rows out, I columns in, E experts

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

PEERS = Path(__file__).parent.parent / ".venv" / "peers"
VARIABLE = "HUBMILL_LLAMA_LIB"
ROWS = 2  # the least that llama.cpp takes for a matrix


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model by what decides the types of its tensors; `shared` is the middle width of shared experts, 0 for none."""

    architecture: str = "llama"
    layers: int = 32
    heads: int = 4
    kv_heads: int = 4
    experts: int = 0
    tied: bool = False
    fused: bool = False  # one tensor for queries, keys and values
    width: int = 256
    middle: int = 512
    shared: int = 0
    gated: bool = True
    attention_every: int = 1  # blocks between those with attention, as in hybrids
    dense_first: int = 0  # blocks without experts in front of those with them

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes [O, I], or [E, O, I] for stacked experts, or [I] for norms."""
        yield "token_embd.weight", (ROWS, self.width)
        yield "output_norm.weight", (self.width,)
        if not self.tied:
            yield "output.weight", (ROWS, self.width)
        for layer in range(self.layers):
            for name, shape in self._block(layer):
                yield f"blk.{layer}.{name}.weight", shape

    def _block(self, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        plain, narrow = (ROWS, self.width), (ROWS, self.middle)
        stacked = self.experts > 0 and layer >= self.dense_first
        yield "attn_norm", (self.width,)
        if layer % self.attention_every == 0:
            for name in ("attn_qkv",) if self.fused else ("attn_q", "attn_k", "attn_v"):
                yield name, plain
            yield "attn_output", plain
        if stacked:
            yield "ffn_gate_inp", (self.experts, self.width)
            for name in ("ffn_gate_exps", "ffn_up_exps"):
                yield name, (self.experts, *plain)
            yield "ffn_down_exps", (self.experts, *narrow)
        if stacked and self.shared:
            yield "ffn_gate_shexp", plain
            yield "ffn_up_shexp", plain
            yield "ffn_down_shexp", (ROWS, self.shared)
        if not stacked:
            if self.gated:
                yield "ffn_gate", plain
            yield "ffn_up", plain
            yield "ffn_down", narrow


MODELS: Mapping[str, Model] = {
    "dense": Model(),
    "grouped": Model(heads=8, kv_heads=2, tied=True),
    "few": Model(layers=3, heads=4, kv_heads=2),
    "forty": Model(layers=40, heads=40, kv_heads=10),
    "70b": Model(layers=80, heads=8, kv_heads=1),
    "65b": Model(layers=80),
    "qwen72b": Model(architecture="qwen2", layers=80),
    "mixtral": Model(experts=8, heads=8, kv_heads=2),
    "fewexperts": Model(architecture="qwen2moe", layers=24, experts=3, shared=256),
    "manyexperts": Model(architecture="qwen3moe", layers=48, experts=16),
    "sharedexperts": Model(architecture="qwen2moe", layers=24, experts=16, shared=768, tied=True),
    "densefirst": Model(architecture="qwen3moe", layers=27, experts=64, dense_first=3, middle=256),
    "hybrid": Model(layers=36, heads=16, kv_heads=4, attention_every=3),
    "falcon": Model(architecture="falcon", fused=True, kv_heads=1, gated=False),
    "fused": Model(architecture="phi3", fused=True, heads=8, kv_heads=2),
    "ragged": Model(layers=16, width=288, middle=352),
    "raggedgrouped": Model(layers=16, width=256, middle=896, heads=8, kv_heads=2, tied=True),
    "unusual": Model(layers=8, width=40, middle=256, tied=True),
}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to quantize how: a name of MODELS or the path of a file, the number of a file type, and options.

    A file is quantized without imatrix.
    """

    model: str
    number: int
    imatrix: bool = False
    output: str = ""
    embedding: str = ""
    pure: bool = False
    rules: tuple[tuple[str, str], ...] = ()


Answer = dict[str, str] | str  # types by tensor, or llama.cpp's words of refusal


class Params(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int),
        ("output_tensor_type", ctypes.c_int),
        ("token_embedding_type", ctypes.c_int),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("tt_overrides", ctypes.c_void_p),
        ("prune_layers", ctypes.c_void_p),
        ("max_buf_size", ctypes.c_size_t),
    )


class ImatrixEntry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class TypeRule(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("type", ctypes.c_int))


def library_folder() -> Path | None:
    """The folder with libllama, None when there is none."""
    folders = [Path(os.environ[VARIABLE])] if VARIABLE in os.environ else [PEERS]
    found = (file.parent for folder in folders for file in sorted(folder.rglob("libllama.*so*")))
    return next(found, None)


class Quantizer:
    """llama.cpp in a process of its own, started anew when a question ended it; to be used in a `with` statement."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Quantizer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def ask(self, question: Question) -> Answer:
        """The types that llama-quantize gives to the tensors, or why it refuses."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asdict(question)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self._stop()
            return "llama.cpp ended"
        answer: Answer = json.loads(line)
        return answer

    def _stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


# --- inside that process -------------------------------------------------------------------------------------------


class Library:
    """libllama with its quantizer; what it logs is kept for refusals. Raises RuntimeError for another version."""

    def __init__(self, folder: Path) -> None:
        (file,) = folder.glob("libllama.*so*")
        self.llama = ctypes.CDLL(str(file))
        self.llama.llama_model_quantize_default_params.restype = Params
        self.llama.llama_model_quantize.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Params))
        self.llama.llama_model_quantize.restype = ctypes.c_uint32
        default = self.llama.llama_model_quantize_default_params()
        self.no_type = default.token_embedding_type
        same = default.output_tensor_type == self.no_type and 40 <= self.no_type < 64
        if (default.nthread, default.ftype, default.max_buf_size, default.imatrix) != (0, 7, 8 << 30, None) or not same:
            raise RuntimeError(f"{file} has other parameters than this file describes")
        self.log: list[str] = []
        self.keep = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(self._listen)
        self.llama.llama_log_set(self.keep, None)

    def _listen(self, level: int, text: bytes, _: object) -> None:
        if level in (3, 4):  # warnings and errors
            self.log.append(text.decode("utf-8", "replace"))

    def types(self, source: Path, out: Path, question: Question) -> Answer:
        params = self.llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.pure = 1, question.number, question.pure
        params.output_tensor_type = type_number(question.output, self.no_type)
        params.token_embedding_type = type_number(question.embedding, self.no_type)
        rules = [TypeRule(pattern.encode(), type_number(type, 0)) for pattern, type in question.rules]
        rule_array = (TypeRule * (len(rules) + 1))(*rules, TypeRule(None, self.no_type))
        entries, kept = importance(MODELS[question.model]) if question.imatrix else ([], [])
        entry_array = (ImatrixEntry * (len(entries) + 1))(*entries, ImatrixEntry(None, None, 0))
        params.tt_overrides = ctypes.addressof(rule_array) if rules else None
        params.imatrix = ctypes.addressof(entry_array) if question.imatrix else None
        self.log.clear()
        failed = self.llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params))
        del kept
        if failed:
            return " ".join("".join(self.log).split())
        return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}


def type_number(name: str, otherwise: int) -> int:
    return int(gguf.GGMLQuantizationType[name]) if name else otherwise


def importance(model: Model) -> tuple[list[ImatrixEntry], list[Any]]:
    """An entry of ones for every matrix in a block, as llama-imatrix collects them, and what must not be freed."""
    entries, kept = [], []
    for name, shape in model.tensors():
        if name.startswith("blk.") and len(shape) > 1:
            size = shape[-1] * (shape[0] if len(shape) == 3 else 1)
            ones = (ctypes.c_float * size)(*[1.0] * size)
            kept.append(ones)
            entries.append(ImatrixEntry(name.encode(), ones, size))
    return entries, kept


def write_model(model: Model, path: Path) -> None:
    """Write the model with F32 tensors of small random numbers."""
    writer = gguf.GGUFWriter(path, model.architecture)
    writer.add_block_count(model.layers)
    writer.add_context_length(128)
    writer.add_embedding_length(model.width)
    writer.add_feed_forward_length(model.middle)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(ROWS)
    if model.experts:
        writer.add_expert_count(model.experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(model.middle)
    random = np.random.default_rng(0)
    for name, shape in model.tensors():
        writer.add_tensor(name, random.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    library = Library(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            values = json.loads(line)
            values["rules"] = tuple((pattern, type) for pattern, type in values["rules"])
            question = Question(**values)
            known = MODELS.get(question.model)
            source = Path(folder) / f"{question.model}.gguf" if known else Path(question.model)
            if known and not source.exists():
                write_model(known, source)
            answer = library.types(source, Path(folder) / "out.gguf", question)
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
