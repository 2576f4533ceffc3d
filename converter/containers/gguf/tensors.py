"""Which tensors a GGUF file holds, what they are called, in which type, and what is done to their rows.

Names come from gguf-py's own map from checkpoint names, so that a file is laid out as every reader expects, and from
the family's section where that map has none. What a family can have and a checkpoint lacks is left out: that the
checkpoint is whole was found when it was opened, by transformers' own list of the family's tensors.
"""

# O out, B bytes of an encoded row

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import gguf
import torch
from torch import Tensor

from converter.architecture import COMPUTED, Architecture, Experts, ranges
from converter.containers import TensorPlan
from converter.containers.gguf.choice import Chosen, stored_types
from converter.containers.gguf.family import Family, modules_of
from converter.containers.gguf.header import size_of
from converter.containers.gguf.mixing import Facts, Weight, is_quantized, may_quantize
from converter.containers.gguf.operations import PREPARATIONS, apply_operation, apply_preparation
from converter.errors import SourceError, UnsupportedError
from converter.grids.ggml import GgmlGrid
from converter.manifest import Target
from converter.source import Snapshot, tied

SHOWN = 8  # tensors that a refusal names
# Parts of models of pictures, sound and text that are no language model, by pattern of checkpoint names.
OTHER_SENSES = {
    r"(^|\.)(vision_\w+|visual|multi_modal_projector|connector|embed_vision)\.": "it is for pictures",
    r"(^|\.)(audio_\w+|embed_audio)\.": "it is for sound",
}


@dataclass(frozen=True, kw_only=True)
class Named:
    """A checkpoint tensor and its name in the file; `operation` and `prepare` as in TensorPlan.

    An expert's weight is slice `slot` of the tensor `stack` in the file, and named after both.
    """

    source: str
    name: str
    operation: str = ""
    prepare: str = ""
    stack: str = ""
    slot: int = 0

    @property
    def stored_as(self) -> str:
        """The tensor of the file that holds it."""
        return self.stack or self.name


def named(family: Family, architecture: Architecture, integers: Mapping[str, int]) -> Iterator[Named]:
    """Every tensor that a model of this family can have, in the order of the file; architecture is fitted."""
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[family.architecture]
    names = gguf.TensorNameMap(kind, architecture.blocks)

    def numbered(operation: str) -> str:
        """The operation with the numbers that its GGUF keys stand for."""
        steps = (step.split() for step in operation.split(","))
        return " ".join(":".join([verb, *(str(integers.get(key, key)) for key in keys)]) for verb, *keys in steps)

    def changed(operation: str) -> tuple[str, str]:
        """An operation as Named has it: `operation` and `prepare`, one of them empty."""
        given = numbered(operation) if operation else ""
        return ("", given + ":0") if operation.partition(" ")[0] in PREPARATIONS else (given, "")

    def known(module: str) -> bool:
        return names.get_name(architecture.canonical(module + ".").removesuffix(".")) is not None

    def found(module: str) -> str:
        name = names.get_name(architecture.canonical(module + ".").removesuffix("."))
        assert name is not None, f"gguf does not know {module} of {family.architecture}"
        return str(name)

    def entries(prefix: str, module: str) -> Iterator[Named]:
        own = architecture.canonical(module + ".").removesuffix(".")
        for ending in (".weight", ".bias") if own in family.biases else (".weight",):
            operation, prepare = changed(family.operations.get(own + ending, family.operations.get(own, "")))
            name = found(prefix + module) + ending
            yield Named(source=prefix + module + ending, name=name, operation=operation, prepare=prepare)

    def slices(prefix: str, experts: Experts) -> Iterator[Named]:
        endings = (".weight", ".bias") if experts.module in family.biases else (".weight",)
        for linear, ending in product(experts.linears, endings):
            stack = found(f"{prefix}{experts.module}.{linear}") + ending
            for e in range(experts.count):
                own = f"{prefix}{experts.module}.{e}.{linear}{ending}"
                yield Named(source=own, name=f"{stack}[{e}]", stack=stack, slot=e)

    def listed(prefix: str, place: str) -> Iterator[Named]:
        """The tensors that the section itself names: in block `place`, "blk.3." say, or outside all."""
        for local, name in family.names.items():
            operation, prepare = changed(family.operations.get(local, ""))
            yield Named(source=prefix + local, name=place + name, operation=operation, prepare=prepare)
        for local, divided in family.divided.items():
            for number, name in enumerate(divided.into):
                given, prepare = family.operations.get(name, ""), f"{numbered(divided.by)}:{number}"
                operation = numbered(given) if given else ""
                yield Named(source=prefix + local, name=place + name, operation=operation, prepare=prepare)
        for module, stacked in family.stacked.items():
            for i in range(integers[stacked.count]):
                stack = place + stacked.name
                yield Named(source=f"{prefix}{module}.{i}.weight", name=f"{stack}[{i}]", stack=stack, slot=i)

    modules = modules_of(family, architecture)
    yield from entries("", architecture.embedding)
    for module in family.outside:
        yield from entries("", architecture.spelled(module + ".").removesuffix("."))
    for b in range(architecture.blocks):
        prefix = architecture.prefix(b)
        if architecture.experts:
            yield from slices(prefix, architecture.experts)
        for module in modules:
            if not architecture.decoder or known(prefix + module):  # an encoder and a decoder have different ones
                yield from entries(prefix, module)
        yield from listed(prefix, f"blk.{b}.")
    for module in (architecture.final_norm, architecture.head):
        if known(module):
            yield from entries("", module)  # OLMo's norm has no weight, Gemma 2 no head beside the embedding


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
    for tensor in named(family, architecture, integers):
        if tensor.source in snapshot.tensors:
            present.append(tensor)
        elif tensor.source == head and not without_head:
            what = f"the checkpoint has no tensor {tensor.source}, which config.json calls for"
            raise SourceError(where, what, "Check config.json, and that the download is whole")
    shapes = {tensor.name: shape_of(tensor, snapshot.tensors[tensor.source].shape) for tensor in present}
    chosen = choose(present, shapes, family, target, integers, where)
    plans: list[TensorPlan] = []
    for tensor in present:
        shape, choice = shapes[tensor.name], chosen.get(tensor.stored_as, Chosen(type="F32"))
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
                prepare=tensor.prepare,
                stack=tensor.stack,
                fallback=choice.fallback,
            )
        )
    used = {plan.source for plan in plans} | numbers_of(family, architecture, snapshot, where)
    return tuple(plans), left_out(snapshot, used, family, architecture, where)


def numbers_of(family: Family, architecture: Architecture, snapshot: Snapshot, where: str) -> set[str]:
    """The tensors that become metadata; raises SourceError when one is missing or holds something else."""
    found: set[str] = set()
    for b in range(architecture.blocks):
        for number in family.from_tensors.values():
            name = architecture.prefix(b) + number.tensor
            header = snapshot.tensors.get(name)
            if header is None or header.shape != number.shape:
                what = f"the checkpoint has {list(header.shape) if header else 'no tensor'} for {name}"
                what += f", which is {list(number.shape)} in this family"
                raise SourceError(where, what, "Check config.json, and that the download is whole")
            found.add(name)
    return found


def shape_of(tensor: Named, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in the file of a tensor that has this one in the checkpoint."""
    return (
        tuple(apply_preparation(tensor.prepare, torch.empty(shape, device="meta")).shape) if tensor.prepare else shape
    )


def left_out(
    snapshot: Snapshot, used: set[str], family: Family, architecture: Architecture, where: str
) -> dict[str, str]:
    """Reasons by checkpoint tensor that is not used; raises UnsupportedError, naming all, when some have none."""
    dropped: dict[str, str] = {}
    for name in snapshot.tensors:
        if name not in used:
            dropped[name] = reason_to_drop(name, family, architecture)
    if homeless := [name for name, reason in dropped.items() if not reason]:
        what = (
            f"the checkpoint holds {listing(homeless, architecture)}, which has no place in GGUF's "
            f"{family.architecture}"
        )
        remedy = "Check that config.json names the right architecture, or choose format: parquet"
        raise UnsupportedError(where, what, remedy)
    return dropped


def listing(names: Sequence[str], architecture: Architecture) -> str:
    """Tensors in words, those that blocks have alike as one: "model.layers.{0 to 3, 7}.mlp.gate.weight"."""
    blocks: dict[tuple[str, str], list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name) if architecture.number_of(name) is not None else None
        start, local = (name[: number.start() + 1], name[number.end() - 1 :]) if number else (name, "")
        blocks.setdefault((start, local), []).extend([int(number[1])] if number else [])
    found = [
        start + (f"{{{ranges(sorted(own))}}}" if len(own) > 1 else "".join(map(str, own))) + local
        for (start, local), own in blocks.items()
    ]
    return ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def reason_to_drop(name: str, family: Family, architecture: Architecture) -> str:
    """Why a checkpoint tensor has no place in the file; empty when there is no reason that it should not."""
    if COMPUTED.search(name):
        return "readers compute it"
    if architecture.canonical(name) == f"{architecture.canonical(architecture.head)}.weight":
        return "readers take the embedding for it"
    for pattern, reason in {**family.dropped, **OTHER_SENSES}.items():
        if re.search(pattern, architecture.canonical(name)):
            return reason
    if architecture.number_of(name) is not None and architecture.block_of(name) is None:
        return "it predicts tokens further ahead (MTP), which readers do not run"
    return ""


def choose(
    present: Sequence[Named],
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
    target: Target,
    integers: Mapping[str, int],
    where: str,
) -> dict[str, Chosen]:
    """The ggml type of every matrix by its name in the file; what has none is stored as F32. See stored_types.

    shapes are those in the file, by the tensor's name there.
    """
    weights: dict[str, Weight] = {}
    sources: dict[str, list[str]] = {}
    for tensor in present:
        shape = shapes[tensor.name]
        if math.prod(shape[:-1]) < 2 or not may_quantize(tensor.stored_as):
            continue  # ggml takes a matrix of one row for a vector
        sources.setdefault(tensor.stored_as, []).append(tensor.source)
        stacked = len(sources[tensor.stored_as]) * math.prod(shape[:-2])
        weights[tensor.stored_as] = Weight(name=tensor.stored_as, columns=shape[-1], matrices=stacked)
    return stored_types(target, weights, sources, facts_of(family, integers, target), where)


def facts_of(family: Family, integers: Mapping[str, int], target: Target) -> Facts:
    """What the mixture asks of the model, whose hyper-parameters are `integers`."""
    return Facts(
        layers=integers["block_count"],
        heads=integers.get("attention.head_count", 0),
        kv_heads=integers.get("attention.head_count_kv", 0),
        experts=integers.get("expert_count", 0),
        imatrix=target.weighs_columns,
        architecture=family.architecture,
    )


def file_rows(plan: TensorPlan, blocks: Tensor) -> Tensor:
    """The bytes of a tensor as the file holds them, from `blocks` [O, B] u8 in the checkpoint's row order."""
    if not plan.operation:
        return blocks
    rows = blocks.reshape(plan.shape[0], -1)  # a vector comes as one row: its elements are what is moved
    return apply_operation(plan.operation, rows)


def torch_bytes(values: tuple[float, ...]) -> Tensor:
    """`values` as F32 blocks, one row of u8."""
    return torch.tensor(values, dtype=torch.float32).view(torch.uint8).reshape(1, -1)
