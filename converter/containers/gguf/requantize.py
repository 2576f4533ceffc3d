"""GGUF from GGUF: other types for the tensors of a file, everything else as it is.

Tensors keep their names, order and rows, so no model family needs to be known and any file that llama.cpp reads can be
converted. Tokenizer and hyper-parameters are copied; what is about the old types, its imatrix and its files is not. A
matrix that has its type already is copied byte by byte. Rounding what was rounded before adds one error to another, so
it has to be asked for.

Source: llama.cpp, src/llama-quant.cpp (llama_model_quantize_impl), which does the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf

from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.gguf.choice import stored_types
from converter.containers.gguf.coverage import Weighing, check_coverage, weighing_fields, weighing_of
from converter.containers.gguf.files import Layout, check_planned, entries_of, write_files
from converter.containers.gguf.header import Field, size_of, string, u32
from converter.containers.gguf.mixing import Facts, Weight, is_quantized, may_quantize
from converter.containers.gguf.mixture import MIXTURES
from converter.containers.gguf.naming import file_stem
from converter.containers.gguf.overrides import overridden
from converter.containers.gguf.shards import Bundle, lay_out_files, too_large
from converter.containers.gguf.source import UNQUANTIZED, bundle_of
from converter.errors import UnsupportedError
from converter.grids.ggml import GgmlGrid
from converter.manifest import Target
from converter.source import Snapshot
from quantkernels.ggml import TYPES

DROPPED = ("general.alignment", "general.file_type", "general.quantization_version", "general.quantized_by")
SHOWN = 3


def plan(snapshot: Snapshot, target: Target) -> ArtifactPlan:
    """See Container.plan, for a snapshot that is a GGUF file. Raises UnsupportedError for rounding a second time."""
    where = f"{snapshot.repo} (target {target.name})"
    if target.methods != ("rtn",):
        what = f"a GGUF source is not run, and {' and '.join(target.methods)} needs to see it run"
        raise UnsupportedError(where, what, "Write method: rtn, or convert the original model")
    if target.collects_imatrix:
        what = "a GGUF source is not run, so no imatrix can be collected from it"
        raise UnsupportedError(where, what, "Name an imatrix file, or convert the original model")
    bundle = bundle_of(snapshot)
    tensors = plan_tensors(bundle, target, where)
    notes = again(bundle, tensors, target, where)
    weighing = weighing_of(target)
    notes += check_coverage([t for t in tensors if not copied(bundle, t)], weighing, target, None, where)
    layout = lay_out(snapshot, bundle, target, tensors, weighing)
    return ArtifactPlan(
        tensors=tensors,
        files=layout.files,
        exact=True,
        dropped={},
        notes=notes + layout.notes,
        imatrix_sha256=weighing.sha256 if weighing else "",
    )


def write(plan: ArtifactPlan, snapshot: Snapshot, target: Target, parts: Parts, folder: Path) -> None:
    """See Container.write, for a snapshot that is a GGUF file."""
    layout = lay_out(snapshot, bundle_of(snapshot), target, plan.tensors, weighing_of(target))
    check_planned(plan, layout, snapshot.repo)
    write_files(layout, plan.tensors, parts, folder)


def copied(bundle: Bundle, tensor: TensorPlan) -> bool:
    """Whether the tensor is stored as it is in the source."""
    return bundle.pieces[tensor.source].stored.type == tensor.grid.name


def plan_tensors(bundle: Bundle, target: Target, where: str) -> tuple[TensorPlan, ...]:
    """Every tensor of the file in its order, with the types that llama-quantize would choose."""
    weights = {
        name: Weight(name=name, columns=piece.stored.shape[-1], matrices=math.prod(piece.stored.shape[:-2]))
        for name, piece in bundle.pieces.items()
        if len(piece.stored.shape) > 1 and may_quantize(name) and piece.stored.type in TYPES
    }
    chosen = stored_types(target, weights, dict.fromkeys(weights, ()), facts_of(bundle, target), where)
    plans = []
    for name, piece in bundle.pieces.items():
        choice = chosen.get(name)
        type = choice.type if choice else piece.stored.type
        block = Weight(name=name, columns=1).block
        plans.append(
            TensorPlan(
                name=name,
                source=name,
                shape=piece.stored.shape,
                grid=GgmlGrid(type=type, search=target.search if is_quantized(type) else "ggml"),
                block=block if block >= 0 else None,
                size_bytes=size_of(piece.stored.shape, type),
                quantized=is_quantized(type),
                fallback=choice.fallback if choice else "",
            )
        )
    return tuple(plans)


def facts_of(bundle: Bundle, target: Target) -> Facts:
    """What the mixture asks of the model. Where a value differs by layer, the first layer's stands for all."""
    architecture = str(bundle.get("general.architecture"))

    def number(key: str) -> int:
        value = bundle.get(f"{architecture}.{key}")
        first = value[0] if isinstance(value, tuple) and value else value
        return first if type(first) is int else 0

    heads = number("attention.head_count")
    return Facts(
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv") or heads,
        experts=number("expert_count"),
        imatrix=target.weighs_columns,
        architecture=architecture,
    )


def again(bundle: Bundle, tensors: tuple[TensorPlan, ...], target: Target, where: str) -> tuple[str, ...]:
    """What is rounded a second time, a sentence; raises UnsupportedError unless the target asks for that."""
    second = [
        tensor.name
        for tensor in tensors
        if not copied(bundle, tensor) and bundle.pieces[tensor.source].stored.type not in UNQUANTIZED
    ]
    if not second:
        return ()
    types = Counter(bundle.pieces[name].stored.type for name in second)
    what = ", ".join(f"{count} x {type}" for type, count in types.most_common(SHOWN))
    if not target.requantize:
        others = f" and {len(second) - 1} others" if len(second) > 1 else ""
        raise UnsupportedError(
            where,
            f"{second[0]}{others} of the source are quantized already ({what}), and rounding them again adds "
            "one error to the other",
            "Convert the original model or a BF16 file of it, or write requantize: true",
        )
    return (f"the source is quantized already ({what}), so its error comes on top of what is measured here",)


def lay_out(
    snapshot: Snapshot, bundle: Bundle, target: Target, tensors: tuple[TensorPlan, ...], weighing: Weighing | None
) -> Layout:
    """The layout of the files."""
    where = f"{snapshot.repo} (target {target.name})"
    fields = overridden(fields_of(snapshot, bundle, target, tensors, weighing), target.metadata, where)
    shards = lay_out_files(
        file_stem(snapshot, target), fields, entries_of(tensors), target.split_tensors, target.split_bytes
    )
    return Layout(shards=shards, notes=too_large(shards, target.split_bytes))


def fields_of(
    snapshot: Snapshot,
    bundle: Bundle,
    target: Target,
    tensors: tuple[TensorPlan, ...],
    weighing: Weighing | None,
) -> Mapping[str, Field]:
    """The source's metadata, with what is about types, importance and origin made anew."""
    fields = {
        key: entry
        for key, entry in bundle.fields.items()
        if key not in DROPPED and not key.startswith(("quantize.imatrix.", "hubmill."))
    }
    fields["general.quantized_by"] = string("hubmill")
    fields["general.file_type"] = u32(MIXTURES[target.type or ""].number)
    if any(tensor.quantized for tensor in tensors):
        fields["general.quantization_version"] = u32(gguf.GGML_QUANT_VERSION)
    fields["hubmill.source.repo"] = string(snapshot.repo)
    fields["hubmill.source.commit"] = string(snapshot.commit)
    return fields | weighing_fields(weighing)
