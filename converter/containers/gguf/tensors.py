"""Which tensors a GGUF file holds, what they are called, in which type, and what is done to their rows.

Names come from gguf-py's own map from checkpoint names, so that a file is laid out as every reader expects. Row
operations work on encoded rows: ggml encodes each row by itself, so moving rows before or after encoding is the same,
and whatever rounds a tensor sees it as the checkpoint has it. Two exist: rope_permute brings q and k from transformers'
order (first halves, then second halves of each head) into the interleaved order of ggml's llama; add is for vectors
stored as F32, such as Gemma's norms, which multiply by one more than the checkpoint holds.

Sources: gguf-py's tensor_mapping; llama.cpp's conversion of LlamaForCausalLM and Gemma2ForCausalLM.
"""

# O out, I in, H heads, B bytes of an encoded row

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from converter.architecture import COMPUTED, Architecture, Experts
from converter.containers import TensorPlan
from converter.containers.gguf.choice import Chosen, stored_types
from converter.containers.gguf.family import Family, modules_of
from converter.containers.gguf.header import size_of
from converter.containers.gguf.mixing import Facts, Weight, is_quantized, may_quantize
from converter.errors import SourceError, UnsupportedError
from converter.grids.ggml import GgmlGrid
from converter.manifest import Target
from converter.source import Snapshot, tied

FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint tensor and its name in the file; `operation` as in TensorPlan; a `norm` is always stored as F32.

    An expert's weight is slice `slot` of the tensor `stack` in the file, and named after both.
    """

    source: str
    name: str
    operation: str
    norm: bool
    stack: str = ""
    slot: int = 0

    @property
    def stored_as(self) -> str:
        """The tensor of the file that holds it."""
        return self.stack or self.name


def named(family: Family, architecture: Architecture, blocks: int, integers: Mapping[str, int]) -> Iterator[Named]:
    """Every tensor that a model of this family can have, in the order of the file."""
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.TensorNameMap(kind, blocks)
    norms = {*family.norms, architecture.final_norm}

    def entry(prefix: str, module: str, ending: str) -> Named:
        name = names.get_name(prefix + module)
        assert name is not None, f"gguf does not know {prefix}{module} of {family.architecture}"
        operation = family.operations.get(module, "")
        if operation:
            verb, _, key = operation.partition(" ")
            operation = f"{verb}:{integers.get(key, key)}"
        return Named(source=prefix + module + ending, name=name + ending, operation=operation, norm=module in norms)

    def slices(prefix: str, experts: Experts) -> Iterator[Named]:
        for linear in experts.linears:
            stack = entry(prefix, f"{experts.module}.{linear}", ".weight").name
            for e in range(experts.count):
                own = f"{prefix}{experts.module}.{e}.{linear}.weight"
                yield Named(source=own, name=f"{stack}[{e}]", operation="", norm=False, stack=stack, slot=e)

    yield entry("", architecture.embedding, ".weight")
    for b in range(blocks):
        if architecture.experts:
            yield from slices(architecture.prefix(b), architecture.experts)
        for module in modules_of(family, architecture):
            yield entry(architecture.prefix(b), module, ".weight")
            if module in family.biases:
                yield entry(architecture.prefix(b), module, ".bias")
    yield entry("", architecture.final_norm, ".weight")
    if names.get_name(architecture.head) is not None:  # Gemma 2 has no head beside the embedding
        yield entry("", architecture.head, ".weight")


def plan_tensors(
    snapshot: Snapshot, architecture: Architecture, family: Family, target: Target, integers: Mapping[str, int]
) -> tuple[tuple[TensorPlan, ...], dict[str, str]]:
    """The file's tensors in order, and the checkpoint tensors left out with the reason.

    Raises SourceError when a tensor is missing or its shape disagrees with config.json, UnsupportedError for a tensor
    that GGUF's graph of this family has no place for and for a type that stored_types refuses.
    """
    where = f"{snapshot.repo} (target {target.name})"
    head = f"{architecture.head}.weight"
    without_head = tied(snapshot.config, snapshot.tensors, head)
    present: list[Named] = []
    for tensor in named(family, architecture, integers["block_count"], integers):
        header = snapshot.tensors.get(tensor.source)
        if header is None:
            if tensor.source.endswith(".bias") or (tensor.source == head and without_head):
                continue
            what = f"the checkpoint has no tensor {tensor.source}, which config.json calls for"
            raise SourceError(where, what, "Check config.json, and that the download is whole")
        check_shape(tensor, header.shape, family, integers, where)
        present.append(tensor)
    chosen = choose(present, snapshot, family, target, integers, where)
    plans: list[TensorPlan] = []
    for tensor in present:
        shape, choice = snapshot.tensors[tensor.source].shape, chosen.get(tensor.stored_as, Chosen(type="F32"))
        quantized = is_quantized(choice.type)
        plans.append(
            TensorPlan(
                name=tensor.name,
                source=tensor.source,
                shape=shape,
                grid=GgmlGrid(type=choice.type, search=target.search if quantized else "ggml"),
                block=architecture.block_of(tensor.source),
                size_bytes=size_of(shape, choice.type),
                quantized=quantized,
                operation=tensor.operation,
                stack=tensor.stack,
                fallback=choice.fallback,
            )
        )
    return tuple(plans), left_out(snapshot, {plan.source for plan in plans}, family, where)


def left_out(snapshot: Snapshot, used: set[str], family: Family, where: str) -> dict[str, str]:
    """Reasons by checkpoint tensor that is not used; raises UnsupportedError when there is none to give."""
    dropped: dict[str, str] = {}
    for name in snapshot.tensors:
        if name in used:
            continue
        if not COMPUTED.search(name):
            what = f"the checkpoint holds {name}, which has no place in GGUF's {family.architecture}"
            remedy = "Check that config.json names the right architecture, or choose format: parquet"
            raise UnsupportedError(where, what, remedy)
        dropped[name] = "readers compute it"
    return dropped


def choose(
    present: Sequence[Named],
    snapshot: Snapshot,
    family: Family,
    target: Target,
    integers: Mapping[str, int],
    where: str,
) -> dict[str, Chosen]:
    """The ggml type of every matrix by its name in the file; what has none is stored as F32. See stored_types."""
    weights: dict[str, Weight] = {}
    sources: dict[str, list[str]] = {}
    for tensor in present:
        shape = snapshot.tensors[tensor.source].shape
        if len(shape) < 2 or tensor.norm or not may_quantize(tensor.stored_as):
            continue
        sources.setdefault(tensor.stored_as, []).append(tensor.source)
        stacked = len(sources[tensor.stored_as])
        weights[tensor.stored_as] = Weight(name=tensor.stored_as, columns=shape[-1], matrices=stacked)
    facts = Facts(
        layers=integers["block_count"],
        heads=integers["attention.head_count"],
        kv_heads=integers["attention.head_count_kv"],
        experts=integers.get("expert_count", 0),
        imatrix=target.weighs_columns,
        architecture=family.architecture,
    )
    return stored_types(target, weights, sources, facts, where)


def check_shape(tensor: Named, shape: tuple[int, ...], family: Family, integers: Mapping[str, int], where: str) -> None:
    """Raise SourceError when a tensor's shape is not what the hyper-parameters say."""
    expected = _expected(integers, family.wide_norms).get(re.sub(r"^blk\.\d+\.", "", tensor.stored_as))
    if expected is not None and shape != expected:
        what = f"tensor {tensor.source} has the shape {list(shape)}, and config.json makes it {list(expected)}"
        raise SourceError(where, what, "config.json and weights are of different models: fetch both again")


def _expected(integers: Mapping[str, int], wide_norms: bool) -> dict[str, tuple[int, ...]]:
    width, middle, vocabulary = (integers[key] for key in ("embedding_length", "feed_forward_length", "vocab_size"))
    queries = integers["attention.head_count"] * integers["attention.key_length"]
    keys = integers["attention.head_count_kv"] * integers["attention.key_length"]
    values = integers["attention.head_count_kv"] * integers["attention.value_length"]
    mixed = integers["attention.head_count"] * integers["attention.value_length"]
    linears = {
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (values, width),
        "attn_output": (width, mixed),
        "ffn_gate": (middle, width),
        "ffn_up": (middle, width),
        "ffn_down": (width, middle),
    }
    if "expert_count" in integers:
        linears["ffn_gate_inp"] = (integers["expert_count"], width)
        own = integers["expert_feed_forward_length"]
        linears |= {"ffn_gate_exps": (own, width), "ffn_up_exps": (own, width), "ffn_down_exps": (width, own)}
        shared = integers.get("expert_shared_feed_forward_length", 0)
        linears |= {"ffn_gate_shexp": (shared, width), "ffn_up_shexp": (shared, width)}
        linears |= {"ffn_down_shexp": (width, shared)}
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm")
    found |= {f"{name}.weight": (width,) for name in norms}
    one_head = (integers["attention.key_length"],)
    found |= {"attn_q_norm.weight": (queries,) if wide_norms else one_head}
    found |= {"attn_k_norm.weight": (keys,) if wide_norms else one_head}
    found |= dict.fromkeys(("token_embd.weight", "output.weight"), (vocabulary, width))
    return found


def apply_operation(operation: str, rows: Tensor) -> Tensor:
    """`rows` [O, B] u8 (or any row vectors) as the file has them; an empty operation leaves them alone."""
    return _changed(rows, operation, forward=True)


def undo_operation(operation: str, rows: Tensor) -> Tensor:
    """`rows` [O, ...] as the checkpoint has them: the inverse of apply_operation."""
    return _changed(rows, operation, forward=False)


def _changed(rows: Tensor, operation: str, forward: bool) -> Tensor:
    verb, _, number = operation.partition(":")
    if verb == "add":
        values = rows.contiguous().view(torch.float32)
        return (values + (float(number) if forward else -float(number))).view(rows.dtype)
    if not operation:
        return rows
    assert verb == "rope_permute", operation
    heads = int(number)
    count = len(rows) // heads
    parts = (2, count // 2) if forward else (count // 2, 2)
    return rows.reshape(heads, *parts, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def file_rows(plan: TensorPlan, blocks: Tensor) -> Tensor:
    """The bytes of a tensor as the file holds them, from `blocks` [O, B] u8 in the checkpoint's row order."""
    if not plan.operation:
        return blocks
    rows = blocks.reshape(plan.shape[0], -1)  # a vector comes as one row: its elements are what is moved
    return apply_operation(plan.operation, rows)


def torch_bytes(values: tuple[float, ...]) -> Tensor:
    """`values` as F32 blocks, one row of u8."""
    return torch.tensor(values, dtype=torch.float32).view(torch.uint8).reshape(1, -1)
