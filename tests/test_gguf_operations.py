"""Operations on the way into a GGUF file: each has an inverse, and says what it says."""

from __future__ import annotations

import pytest
import torch

from converter.containers.gguf.operations import (
    OPERATIONS,
    PREPARATIONS,
    apply_operation,
    apply_preparation,
    parsed,
    undo_operation,
    undo_preparation,
)

# An operation with numbers, and a shape that fits them.
MOVED = [
    ("", (5, 3)),
    ("rope_permute:3", (12, 5)),
    ("rope_permute:1", (2, 1)),
    ("ungroup:6:2", (30, 4)),
    ("ungroup:3:3", (27, 2)),
    ("add:1", (7, 1)),
    ("rope_permute:2 add:1", (8, 1)),
    ("shrink:256", (7, 1)),
]
# A preparation without the number of the part, how many parts there are, and a shape.
PREPARED = [
    ("halves", 2, (8, 3)),
    ("squeeze", 1, (6, 1, 4)),
    ("latent:3:2", 2, (18, 5)),
    ("grouped:6:2", 3, (30, 4)),
    ("negated_exp", 1, (6, 4)),
]


def values(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).round(decimals=2)


@pytest.mark.parametrize(("operation", "shape"), MOVED)
def test_undoing_an_operation_gives_the_rows_back(operation: str, shape: tuple[int, ...]) -> None:
    rows = values(shape)
    moved = apply_operation(operation, rows)
    # Adding and taking away rounds twice, by at most half a unit of a value below 8.
    torch.testing.assert_close(undo_operation(operation, moved), rows, rtol=0, atol=8 * 2**-24)
    assert torch.equal(moved, rows) == (operation in ("", "rope_permute:1"))


@pytest.mark.parametrize(("preparation", "count", "shape"), PREPARED)
def test_all_parts_of_a_preparation_together_are_the_tensor(
    preparation: str, count: int, shape: tuple[int, ...]
) -> None:
    tensor = values(shape)
    parts = [apply_preparation(f"{preparation}:{part}", tensor) for part in range(count)]
    assert sum(part.numel() for part in parts) == tensor.numel()
    torch.testing.assert_close(undo_preparation(f"{preparation}:0", parts), tensor, rtol=1e-6, atol=0)


def test_every_verb_is_tried() -> None:
    assert {verb for operation, _ in MOVED for verb, _ in parsed(operation)} == set(OPERATIONS)
    whole = {preparation.partition(":")[0] for preparation, _, _ in PREPARED}
    assert whole | {"behind"} == set(PREPARATIONS)


def test_behind_leaves_out_rows_that_nothing_reads_and_puts_zeros_there() -> None:
    tensor = values((6, 3))
    part = apply_preparation("behind:2:0", tensor)
    assert torch.equal(part, tensor[2:])
    assert torch.equal(undo_preparation("behind:2:0", [part]), torch.cat([torch.zeros(2, 3), part]))


def test_encoded_rows_move_as_the_values_do() -> None:
    rows = values((12, 5))
    moved = apply_operation("rope_permute:3", rows.view(torch.uint8))
    assert torch.equal(moved.view(torch.float32), apply_operation("rope_permute:3", rows))


def test_rope_permute_interleaves_the_halves_of_each_head() -> None:
    rows = torch.arange(8).reshape(8, 1)  # two heads of four rows
    assert apply_operation("rope_permute:2", rows).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_ungroup_puts_all_queries_before_all_keys_before_all_values() -> None:
    rows = torch.tensor([10, 11, 20, 30, 12, 13, 21, 31]).reshape(8, 1)  # two groups of two queries, a key and a value
    assert apply_operation("ungroup:4:2", rows).flatten().tolist() == [10, 11, 12, 13, 20, 21, 30, 31]


def test_add_gives_f32_vectors_a_constant_also_as_bytes() -> None:
    weights = torch.tensor([0.25, -1.5, 0.0])
    rows = weights.view(torch.uint8).reshape(3, 4)
    assert apply_operation("add:1", rows).view(torch.float32).flatten().tolist() == [1.25, -0.5, 1.0]
