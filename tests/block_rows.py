"""A block small enough for tests of methods that run it: two linears with a nonlinearity between, differentiated by
torch."""

# N sequences, T tokens, I in.
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor


class TinyRows:
    """Sequences [N, T, I] in front of `down(silu(up x))`, beside what the original's weights make of them."""

    device = torch.device("cpu")

    def __init__(self, tensors: Mapping[str, Tensor], hidden_NTI: Tensor) -> None:
        self._hidden_NTI = hidden_NTI
        self._wanted_NTI = forward(tensors, hidden_NTI)
        self.seen: list[list[int]] = []  # the sequences of each step

    @property
    def count(self) -> int:
        return len(self._hidden_NTI)

    def errors(self, tensors: Mapping[str, Tensor], sequences: Sequence[int]) -> Tensor:
        away = forward(tensors, self._hidden_NTI[list(sequences)]) - self._wanted_NTI[list(sequences)]
        return away.double().square().sum((1, 2))

    def gradients(
        self, tensors: Mapping[str, Tensor], sequences: Sequence[int], of: Collection[str]
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        self.seen.append(list(sequences))
        leaves = {name: tensor.detach().clone().requires_grad_(name in of) for name, tensor in tensors.items()}
        with torch.enable_grad():
            errors_N = self.errors(leaves, sequences)
            found = torch.autograd.grad(errors_N.sum(), [leaves[name] for name in of])
        return errors_N.detach(), dict(zip(of, found, strict=True))


def forward(tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    middle = torch.nn.functional.silu(hidden * tensors["norm.weight"] @ tensors["up.weight"].T)
    return middle @ tensors["down.weight"].T
