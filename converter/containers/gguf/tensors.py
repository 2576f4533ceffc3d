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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import gguf
import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import TensorPlan
from converter.containers.gguf.family import Family, modules_of
from converter.containers.gguf.header import size_of
from converter.containers.gguf.mixture import MIXTURES, Place, fit, is_quantized, type_in_block
from converter.errors import SourceError, UnsupportedError
from converter.grids.ggml import GgmlGrid
from converter.manifest import Target
from converter.source import Snapshot, tied
from quantkernels.ggml import TYPES

# Buffers that older checkpoints carry along; every reader computes them anew.
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(masked_)?bias)$")
FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint tensor and its name in the file; `operation` as in TensorPlan; a `norm` is always stored as F32."""

    source: str
    name: str
    operation: str
    norm: bool


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

    yield entry("", architecture.embedding, ".weight")
    for b in range(blocks):
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
    that GGUF's graph of this family has no place for.
    """
    where = f"{snapshot.repo} (target {target.name})"
    head = f"{architecture.head}.weight"
    without_head = tied(snapshot.config, snapshot.tensors, head)
    check_types(target, where)
    everywhere = Place(
        layer=0,
        layers=integers["block_count"],
        heads=integers["attention.head_count"],
        kv_heads=integers["attention.head_count_kv"],
        imatrix=target.imatrix,
        architecture=family.architecture,
    )
    plans: list[TensorPlan] = []
    for tensor in named(family, architecture, integers["block_count"], integers):
        header = snapshot.tensors.get(tensor.source)
        if header is None:
            if tensor.source.endswith(".bias") or (tensor.source == head and without_head):
                continue
            what = f"the checkpoint has no tensor {tensor.source}, which config.json calls for"
            raise SourceError(where, what, "Check config.json, and that the download is whole")
        check_shape(tensor, header.shape, integers, where)
        block = architecture.block_of(tensor.source)
        spot = None if block is None else replace(everywhere, layer=block)
        type, fallback = choose(tensor, header.shape, target, spot, without_head)
        plans.append(
            TensorPlan(
                name=tensor.name,
                source=tensor.source,
                shape=header.shape,
                grid=GgmlGrid(type=type),
                block=block,
                size_bytes=size_of(header.shape, type),
                quantized=is_quantized(type),
                operation=tensor.operation,
                fallback=fallback,
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


def check_types(target: Target, where: str) -> None:
    """Raise UnsupportedError when a rule names a type that is none of ggml's."""
    for rule in target.rules:
        if rule.type not in TYPES:
            what = f"rule '{rule.pattern}' asks for the type '{rule.type}', which is not made here"
            raise UnsupportedError(where, what, f"Choose one of {', '.join(TYPES)}")


def choose(
    tensor: Named, shape: tuple[int, ...], target: Target, spot: Place | None, without_head: bool
) -> tuple[str, str]:
    """The ggml type to store a tensor as, and why it is not the one asked for: rules, else mixture, then what fits.

    spot is the tensor's place among the blocks, None outside of them; without_head: the embedding serves as the head.
    """
    if len(shape) < 2 or tensor.norm or not tensor.source.endswith(".weight"):
        return "F32", ""
    mixture = MIXTURES[target.type or ""]
    rule = target.rule_for(tensor.source)
    if rule is not None:
        type = rule.type
    elif spot is not None:
        type = type_in_block(mixture, tensor.name, spot)
    else:
        type = mixture.embedding if tensor.name == "token_embd.weight" and not without_head else mixture.output
    return fit(type, shape[-1])


def check_shape(tensor: Named, shape: tuple[int, ...], integers: Mapping[str, int], where: str) -> None:
    """Raise SourceError when a tensor's shape is not what the hyper-parameters say."""
    expected = _expected(integers).get(re.sub(r"^blk\.\d+\.", "", tensor.name))
    if expected is not None and shape != expected:
        what = f"tensor {tensor.source} has the shape {list(shape)}, and config.json makes it {list(expected)}"
        raise SourceError(where, what, "config.json and weights are of different models: fetch both again")


def _expected(integers: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
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
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm")
    found |= {f"{name}.weight": (width,) for name in norms}
    found |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (integers["attention.key_length"],))
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
