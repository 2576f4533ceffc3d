"""What is done to a checkpoint tensor on its way into a GGUF file: a closed list, each with its inverse.

Two moments. `prepare` makes, from a tensor's values, those of the tensor, or of one of several, that the file has in
its place, before anything is rounded; such a tensor is rounded by itself. `operation` moves encoded rows or changes F32
vectors: ggml encodes each row by itself, so moving rows before or after encoding is the same, and whatever rounds a
tensor sees it as the checkpoint has it. Written as verbs with numbers, "rope_permute:8", several separated by spaces.

Sources: the readers' graphs (llama.cpp, src/models) and the definitions of the models in transformers.
"""

# O out, H heads, G groups of heads (key-value heads), D rows of a head, B bytes of an encoded row

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A change of rows and its inverse, each given the rows and the operation's numbers."""

    forward: Change
    inverse: Change


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Values becoming others, in one tensor or several: `part` gives those of the i-th, `join` the values from all.

    part is given the values and the operation's numbers, of which i is the last; join the parts and the numbers before
    it. keeps_columns: whether importance of the values' columns is that of the parts' columns.
    """

    part: Callable[..., Tensor]
    join: Callable[..., Tensor]
    keeps_columns: bool = True


def rope_permute(rows: Tensor, heads: int) -> Tensor:
    """From transformers' order, first halves then second halves of each head, to ggml's, where pairs are neighbours."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rope_unpermute(rows: Tensor, heads: int) -> Tensor:
    return rows.reshape(heads, len(rows) // heads // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def ungroup(rows: Tensor, heads: int, groups: int) -> Tensor:
    """Rows of [G, H/G queries, a key, a value] as all queries, then all keys, then all values."""
    each = heads // groups
    grouped = rows.reshape(groups, each + 2, -1, *rows.shape[1:])
    parts = (grouped[:, :each], grouped[:, each : each + 1], grouped[:, each + 1 :])
    return torch.cat([part.reshape(-1, *rows.shape[1:]) for part in parts])


def group(rows: Tensor, heads: int, groups: int) -> Tensor:
    each, size = heads // groups, len(rows) // (heads + 2 * groups)
    parts = torch.tensor_split(rows, [heads * size, (heads + groups) * size])
    shapes = [(groups, count, size, *rows.shape[1:]) for count in (each, 1, 1)]
    grouped = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return torch.cat(grouped, 1).reshape(rows.shape)


def add(rows: Tensor, number: int) -> Tensor:
    """Vectors of F32, each element plus `number`."""
    return (rows.contiguous().view(torch.float32) + float(number)).view(rows.dtype)


def subtract(rows: Tensor, number: int) -> Tensor:
    return add(rows, -number)


def shrink(rows: Tensor, number: int) -> Tensor:
    """Vectors of F32, each element divided by the root of `number`."""
    return (rows.contiguous().view(torch.float32) / math.sqrt(number)).view(rows.dtype)


def grow(rows: Tensor, number: int) -> Tensor:
    return (rows.contiguous().view(torch.float32) * math.sqrt(number)).view(rows.dtype)


def halves(values: Tensor, index: int) -> Tensor:
    """The first (0) or second (1) half of the rows."""
    return values.chunk(2)[index]


def join_halves(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts))


def squeeze(values: Tensor, _: int) -> Tensor:
    """[O, 1, I] as [O, I]: a convolution that mixes no channels."""
    return values.squeeze(1)


def unsqueeze(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unsqueeze(1)


def latent(values: Tensor, heads: int, rows: int, index: int) -> Tensor:
    """The keys [H, I, K], turned over (0), or the values [H, V, I] (1) of [H (K + V), I]; rows is V."""
    each = values.reshape(heads, -1, values.shape[-1])
    keys, own = each[:, :-rows], each[:, -rows:]
    return own.contiguous() if index else keys.transpose(1, 2).contiguous()


def join_latent(parts: Sequence[Tensor], heads: int, rows: int) -> Tensor:
    keys, own = parts
    return torch.cat([keys.transpose(1, 2), own], 1).reshape(-1, own.shape[-1])


def behind(values: Tensor, count: int, _: int) -> Tensor:
    """All rows but the first ones, which nothing reads; the inverse gives zeros for them."""
    return values[count:]


def put_before(parts: Sequence[Tensor], count: int) -> Tensor:
    return torch.cat([torch.zeros(count, *parts[0].shape[1:]), parts[0]])


def grouped(values: Tensor, heads: int, groups: int, index: int) -> Tensor:
    """The queries (0), keys (1) or values (2) of rows that `ungroup` puts in order."""
    size = len(values) // (heads + 2 * groups)
    return torch.tensor_split(ungroup(values, heads, groups), [heads * size, (heads + groups) * size])[index]


def join_grouped(parts: Sequence[Tensor], heads: int, groups: int) -> Tensor:
    return group(torch.cat(list(parts)), heads, groups)


def negated_exp(values: Tensor, _: int) -> Tensor:
    """A of a state space from its stored logarithm: -exp(x)."""
    return -values.exp()


def negated_log(parts: Sequence[Tensor]) -> Tensor:
    return (-parts[0]).log()


OPERATIONS: Mapping[str, Operation] = {
    "rope_permute": Operation(forward=rope_permute, inverse=rope_unpermute),
    "ungroup": Operation(forward=ungroup, inverse=group),
    "add": Operation(forward=add, inverse=subtract),
    "shrink": Operation(forward=shrink, inverse=grow),
}
PREPARATIONS: Mapping[str, Preparation] = {
    "halves": Preparation(part=halves, join=join_halves),
    "squeeze": Preparation(part=squeeze, join=unsqueeze),
    "latent": Preparation(part=latent, join=join_latent, keeps_columns=False),
    "grouped": Preparation(part=grouped, join=join_grouped),
    "behind": Preparation(part=behind, join=put_before),
    "negated_exp": Preparation(part=negated_exp, join=negated_log),
}


def apply_operation(operation: str, rows: Tensor) -> Tensor:
    """`rows` [O, B] u8 (or any row vectors) as the file has them; an empty operation leaves them alone."""
    for verb, numbers in parsed(operation):
        rows = OPERATIONS[verb].forward(rows, *numbers)
    return rows


def undo_operation(operation: str, rows: Tensor) -> Tensor:
    """`rows` [O, ...] as the checkpoint has them: the inverse of apply_operation."""
    for verb, numbers in reversed(parsed(operation)):
        rows = OPERATIONS[verb].inverse(rows, *numbers)
    return rows


def apply_preparation(prepare: str, values: Tensor) -> Tensor:
    """The part that `prepare`, "halves:1" say, takes of a tensor's values; its last number counts the parts."""
    ((verb, numbers),) = parsed(prepare)
    return PREPARATIONS[verb].part(values, *numbers)


def undo_preparation(prepare: str, parts: Sequence[Tensor]) -> Tensor:
    """The tensor whose parts these are, in order; prepare is that of any of them."""
    ((verb, numbers),) = parsed(prepare)
    return PREPARATIONS[verb].join(parts, *numbers[:-1])


def keeps_columns(prepare: str) -> bool:
    """Whether the columns of what `prepare` makes are those of the checkpoint's tensor."""
    return all(PREPARATIONS[verb].keeps_columns for verb, _ in parsed(prepare))


def parsed(operation: str) -> list[tuple[str, tuple[int, ...]]]:
    """The verbs of an operation with their numbers."""
    found = []
    for step in operation.split():
        verb, *numbers = step.split(":")
        found.append((verb, tuple(int(number) for number in numbers)))
    return found
