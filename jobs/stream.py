"""Round tensors a slab of rows at a time, for targets whose rows do not depend on each other: GGUF by its own search.

Reading, rounding and writing overlap, and memory is a few slabs: an embedding of 128k x 4096 weights would take 2 GB as
f32. Slabs change no byte, because ggml encodes each row by itself. Other targets need a block as a whole, to solve
linears together or to fold scales between them, and go through converter.methods.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from converter import tensor_file
from converter.ahead import ahead
from converter.containers import TensorPlan
from converter.containers.gguf.header import BLOCKS
from converter.containers.gguf.operations import apply_preparation, keeps_columns
from converter.containers.gguf.verify import broken
from converter.errors import NumericsError
from converter.manifest import Target
from converter.methods import Block
from converter.methods.rtn import importance_of, nearest
from converter.source import Snapshot
from jobs.needs import SLAB_WEIGHTS
from jobs.store import Report
from quantkernels.ggml import TYPES

Slab = tuple[TensorPlan, int, Tensor]  # tensor, its first row here, values [n, I] or bytes [n, bytes a row] u8


def round_tensors(
    snapshot: Snapshot,
    tensors: Sequence[TensorPlan],
    importance: Mapping[str, Tensor],
    files: Mapping[str, Path],
    where: str,
    report: Report,
    device: str = "cpu",
) -> None:
    """Round each tensor to its grid and write its `blocks` to its file; importance is [I], or [M, I] for M matrices.

    importance and files go by the tensor's name in the artifact. Raises NumericsError, naming the tensor, for weights
    that are not finite or do not fit their grid.
    """
    total, done = sum(tensor.size_bytes for tensor in tensors), 0
    by_name = {tensor.name: tensor for tensor in tensors}
    with (
        closing(ahead(_read(snapshot, tensors))) as read,
        closing(ahead(_rounded(snapshot, read, importance, where, device))) as slabs,
    ):
        for name, group in groupby(slabs, key=lambda slab: slab[0].name):
            tensor = by_name[name]
            rows = math.prod(tensor.shape[:-1])
            shape = (rows, tensor.size_bytes // rows)
            tensor_file.save_rows(files[name], "blocks", shape, (blocks for _, _, blocks in group))
            done += tensor.size_bytes
            report(done / total)


def weigh(
    target: Target,
    snapshot: Snapshot,
    tensors: Sequence[TensorPlan],
    state: Block,
    prefix: str,
    from_file: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Importance by the tensor's name in the artifact, from an imatrix file or from the block's statistics, and notes.

    Notes are by checkpoint name, for tensors that the target weighs and nothing is known about. prefix is what the
    block's tensors begin with.
    """
    importance, notes = dict(from_file), {}
    for tensor in tensors if target.weighs_columns else ():
        if _is_copied(snapshot, tensor) or not keeps_columns(tensor.prepare):
            continue
        found = importance.get(tensor.name)
        if found is None:
            found = importance_of(state, tensor.source.removeprefix(prefix))
        if found is not None:
            importance[tensor.name] = found
        elif tensor.quantized and TYPES[tensor.grid.name].uses_importance and not _moved(snapshot, tensor):
            source = "entry in the imatrix" if target.imatrix_file else "calibration statistics"
            notes[tensor.source] = f"no {source}: rounded without importance"
    return importance, notes


def _is_copied(snapshot: Snapshot, tensor: TensorPlan) -> bool:
    """Whether the source's bytes are the artifact's: a GGUF file that has the type already."""
    return bool(snapshot.gguf) and snapshot.tensors[tensor.source].dtype == tensor.grid.name


def _moved(snapshot: Snapshot, tensor: TensorPlan) -> Iterator[Tensor] | None:
    """The rows of a tensor whose codes need no rounding, since the source is quantized on the type's own grid."""
    return None if tensor.prepare else snapshot.repacked(tensor.source, tensor.grid.name, SLAB_WEIGHTS)


def _read(snapshot: Snapshot, tensors: Sequence[TensorPlan]) -> Iterator[Slab]:
    for tensor in tensors:
        first = 0
        moved = _moved(snapshot, tensor)
        if _is_copied(snapshot, tensor):
            slabs = snapshot.stored_slabs(tensor.source, 4 * SLAB_WEIGHTS)
        elif moved is not None:
            slabs = moved
        elif tensor.prepare:
            values = apply_preparation(tensor.prepare, snapshot.read(tensor.source).float())
            slabs = iter([values.reshape(-1, values.shape[-1])])
        else:
            slabs = snapshot.slabs(tensor.source, SLAB_WEIGHTS)
        for slab in slabs:
            yield tensor, first, slab
            first += len(slab)


def _rounded(
    snapshot: Snapshot, slabs: Iterator[Slab], importance: Mapping[str, Tensor], where: str, device: str
) -> Iterator[Slab]:
    for tensor, first, slab in slabs:
        place = f"{where} {tensor.source}"
        if _is_copied(snapshot, tensor) or slab.dtype == torch.uint8:
            _check_copied(slab, tensor.grid.name, place)
            yield tensor, first, slab
            continue
        weights = importance.get(tensor.name)
        for start, stop in _matrices(first, len(slab), tensor.shape):
            own = weights if weights is None or weights.ndim == 1 else weights[(first + start) // tensor.shape[-2]]
            said = f"{place} (rows from {first + start} on)" if first + start else place
            values = slab[start:stop].to(device).float()  # a GPU makes the same bytes
            yield tensor, first + start, nearest(said, values, tensor.grid, own).parts["blocks"].cpu()


def _matrices(first: int, count: int, shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The rows [start, stop) of a slab, those of one matrix each; the slab begins with row `first` of the tensor."""
    height = shape[-2] if len(shape) > 2 else first + count
    start = 0
    while start < count:
        stop = min(count, start + height - (first + start) % height)
        yield start, stop
        start = stop


def _check_copied(blocks: Tensor, type: str, where: str) -> None:
    """Raise NumericsError when a block of the source cannot be computed with; its reader would not look."""
    if type in TYPES and bool(np.any(broken(blocks.numpy().reshape(-1, BLOCKS[type][1]), type))):
        what = f"a block of {type} in the source has a scale that is not finite"
        raise NumericsError(where, what, "The source is damaged: fetch it again, or take another")
