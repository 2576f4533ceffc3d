"""What importance a target has for each of its tensors, found in the plan and not after an hour.

Importance comes from the calibration pass, which sees every linear of the blocks, or from an imatrix file, which holds
what its maker ran. Types below three bits are garbage without it and are refused, as by llama-quantize, which notices
a missing entry only when it arrives at the tensor. Embedding and head are exempt, as there: no imatrix has them.

Source: llama.cpp, src/llama-quant.cpp (tensor_requires_imatrix); tools/quantize (the keys quantize.imatrix.*).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from converter.architecture import Architecture
from converter.containers import TensorPlan
from converter.containers.gguf.header import Field, string, u32
from converter.containers.gguf.imatrix import Imatrix, open_imatrix
from converter.containers.gguf.mixture import MIXTURES
from converter.errors import SourceError, UnsupportedError
from converter.folder import file_sha256
from converter.manifest import Target
from converter.methods import Block
from converter.methods.rtn import importance_of as importance_from_statistics
from quantkernels.ggml import TYPES

EXEMPT = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
TEXT_BYTES = 127  # of a text in quantize.imatrix.*, as llama-quantize cuts it


WITHOUT = "the target has no imatrix"


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """The imatrix file that a target takes importance from, and its sha256."""

    imatrix: Imatrix
    sha256: str


def weighing_of(target: Target) -> Weighing | None:
    """The target's imatrix file, opened; None when it has none. Raises SourceError when it is damaged."""
    path = target.imatrix_file
    return Weighing(imatrix=open_imatrix(path), sha256=file_sha256(path)) if path else None


def check_unchanged(weighing: Weighing, sha256: str) -> None:
    """Raise SourceError when the file is not the one that was planned with."""
    if weighing.sha256 != sha256:
        path = weighing.imatrix.path
        raise SourceError(str(path), "the imatrix changed since planning", "Run the same command again: it plans anew")


def weighing_fields(weighing: Weighing | None) -> dict[str, Field]:
    """What llama-quantize writes about an imatrix: its file's name, data set, entries and chunks."""
    if weighing is None:
        return {}
    imatrix = weighing.imatrix
    fields = {"quantize.imatrix.file": string(_cut(imatrix.path.name))}
    if imatrix.datasets:
        fields["quantize.imatrix.dataset"] = string(_cut(imatrix.datasets[0]))
    fields["quantize.imatrix.entries_count"] = u32(len(imatrix.entries))
    if 0 < imatrix.chunks < 1 << 32:
        fields["quantize.imatrix.chunks_count"] = u32(imatrix.chunks)
    return fields


def _cut(text: str) -> str:
    return text.encode()[:TEXT_BYTES].decode(errors="ignore")


def whole_shapes(tensors: Sequence[TensorPlan]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the file, stacks with all their slices, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        if tensor.stack:
            slices = shapes.get(tensor.stack, (0,))[0] + 1
            shapes[tensor.stack] = (slices, *tensor.shape)
        else:
            shapes[tensor.name] = tensor.shape
    return shapes


def importance_of(
    weighing: Weighing, tensors: Sequence[TensorPlan], note: Callable[[str, str], None]
) -> Mapping[str, Tensor]:
    """Importance from the file for those of `tensors` that it covers, by their names: [I], or [M, I] for M matrices.

    Stacks are there with all their slices. note(name, what) is told what had to be mended.
    """
    found: dict[str, Tensor] = {}
    stacks: dict[str, tuple[Tensor, str]] = {}
    slots: dict[str, int] = {}
    shapes = whole_shapes(tensors)
    for tensor in tensors:
        name = tensor.stack or tensor.name
        if not _is_weighed(tensor):
            continue
        if weighing.imatrix.misfit(name, shapes[name]):
            continue
        if name not in stacks:
            stacks[name] = weighing.imatrix.importance(name, shapes[name])
        means_MI, mended = stacks[name]
        slot = slots[name] = slots.get(name, -1) + 1
        one = tensor.stack or len(means_MI) == 1
        found[tensor.name] = means_MI[slot if tensor.stack else 0] if one else means_MI
        if mended:
            note(tensor.source, mended)
    return found


def unreached(
    tensors: Sequence[TensorPlan], state: Block, prefix: str, note: Callable[[str, str], None]
) -> Mapping[str, Tensor]:
    """Importance [I] for those of `tensors` that calibration looked at and no row reached, by their names: 1.

    Such is an expert that no token chose. Readers of an imatrix file take a count of 0 so, too, and types that
    cannot do without importance can be made. state holds the statistics, prefix is what the block's tensors begin
    with; note(name, what) is told.
    """
    linears = {linear for tap in state.taps for linear in tap.linears}
    found: dict[str, Tensor] = {}
    for tensor in tensors:
        local = tensor.source.removeprefix(prefix)
        known = local.removesuffix(".weight") in linears
        if known and _is_weighed(tensor) and importance_from_statistics(state, local) is None:
            found[tensor.name] = torch.ones(tensor.shape[-1])
            note(tensor.source, "no calibration row reached it: all its columns weigh alike")
    return found


def _is_weighed(tensor: TensorPlan) -> bool:
    """Whether importance changes the bytes of the tensor."""
    return tensor.quantized and tensor.grid.name in TYPES and TYPES[tensor.grid.name].uses_importance


def check_coverage(
    tensors: Sequence[TensorPlan],
    weighing: Weighing | None,
    target: Target,
    architecture: Architecture | None,
    where: str,
) -> tuple[str, ...]:
    """What is rounded without importance though the target asks for it, a sentence each.

    Raises UnsupportedError when a type is garbage without, and SourceError when the imatrix is of another model.
    """
    shapes = whole_shapes(tensors)
    missing: dict[str, str] = {}  # why, by name in the file
    needing: dict[str, str] = {}  # type, by name in the file
    of_use: set[str] = set()
    for tensor in tensors:
        name, type = tensor.stack or tensor.name, tensor.grid.name
        if not _is_weighed(tensor) or name in missing:
            continue
        of_use.add(name)
        why = _why_not(tensor, name, shapes[name], weighing, target, architecture)
        if why:
            missing[name] = why
            if _needs(name, type, target):
                needing[name] = type
    if needing:
        name, type = next(iter(needing.items()))
        others = f" (and {len(needing) - 1} more like it)" if len(needing) > 1 else ""
        what = f"{name}{others} is to be stored as {type}, which needs importance, and {missing[name]}"
        own = "Write imatrix: true, or name" if missing[name] == WITHOUT else "Name"
        remedy = (
            f"{own} an imatrix file that covers it, or give it another type: by a rule, output_type, embedding_type"
        )
        raise UnsupportedError(where, what, remedy)
    if weighing is None or not missing:
        return ()
    path = weighing.imatrix.path.name
    wrong = [name for name, why in missing.items() if name in weighing.imatrix.entries and name not in EXEMPT]
    if wrong or (len(missing) == len(of_use) and set(missing) - set(EXEMPT)):
        what = f"it is of another model: {(wrong or list(missing))[0]}: {missing[(wrong or list(missing))[0]]}"
        raise SourceError(f"{where}: {path}", what, "Name the imatrix of this model")
    names = sorted(missing)
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (f"{path} does not cover {listed}: rounded without importance",)


def _why_not(
    tensor: TensorPlan,
    name: str,
    shape: tuple[int, ...],
    weighing: Weighing | None,
    target: Target,
    architecture: Architecture | None,
) -> str:
    if weighing is not None:
        return weighing.imatrix.misfit(name, shape)
    if architecture is None or architecture.tap_of(tensor.source) is None:
        return "calibration sees the linears of the blocks only"
    return "" if target.weighs_columns else WITHOUT


def _needs(name: str, type: str, target: Target) -> bool:
    """Whether a type is no use without importance: ggml refuses some everywhere, llama-quantize more in the blocks."""
    return TYPES[type].needs_importance or MIXTURES[target.type or ""].demands_importance(name, type)
