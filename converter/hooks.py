"""What happens inside a block while it runs: taps are seen, what linears read and attention keeps is rounded.

Modules of transformers call hooks by themselves, whatever the family, so nothing here knows one. In a pass that is
differentiated, rounding counts as slope 1 ("straight through"), as gradients of anything that is rounded are taken.
"""

# T tokens, I inputs of a linear
from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from converter.activations import quantize_inputs
from converter.architecture import Architecture
from converter.caches import KEYS, VALUES, CacheRounding, attention_of, flat, keep_in
from converter.schemes import Activations
from converter.stand_ins import submodule


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """Hooks for a block of a family; what taps see goes into thread.seen. where: the block in words, for errors."""

    layer: nn.Module
    architecture: Architecture
    thread: threading.local
    where: str

    @contextmanager
    def inputs(self, observed: bool, activations: Mapping[str, Activations]) -> Iterator[None]:
        """Inside, the block's linears report what they read, [T, I], if `observed`, and then quantize it."""

        def see(tap: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.thread.seen[tap] = inputs[0].reshape(-1, inputs[0].shape[-1])

        def quantize(how: Activations, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (_straight(inputs[0], quantize_inputs(inputs[0], how)), *inputs[1:])

        inner = self.architecture.inner
        hooks: list[tuple[str, Callable[..., Any]]] = []
        if observed:
            inside = dict(self.layer.named_modules())
            for tap in self.architecture.taps:  # a block may have only some of them, in families of unlike blocks
                linear = next((linear for linear in tap.linears if inner(linear) in inside), None)
                hooks += [(linear, partial(see, tap.name))] if linear else []
        hooks += [(linear, partial(quantize, how)) for linear, how in activations.items()]
        handles = []
        try:
            for linear, hook in hooks:
                handles.append(submodule(self.layer, inner(linear), self.where).register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def products(self, linears: Iterable[nn.Linear], within: torch.dtype, without: torch.dtype) -> Iterator[None]:
        """Inside, these linears multiply in the type `within`; what lies between them stays in `without`."""
        handles = []
        try:
            for linear in linears:
                handles.append(linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(within),)))
                handles.append(linear.register_forward_hook(lambda _, inputs, product: product.to(without)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def cache(self, rounding: CacheRounding | None, watched: bool) -> Iterator[None]:
        """Inside, the block's attention reports the keys and values that it keeps, if `watched`, and rounds them."""
        inside, taps, inner = dict(self.layer.named_modules()), self.architecture.taps, self.architecture.inner
        there = [linear for tap in taps for linear in tap.linears if inner(linear) in inside]
        name = attention_of(taps, there) if rounding or watched else None
        if name is None:
            yield
            return

        def keep(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            if watched:
                self.thread.seen |= {KEYS: flat(keys), VALUES: flat(values)}
            if rounding is None:
                return keys, values
            rounded_keys, rounded_values = rounding(keys, values)
            return _straight(keys, rounded_keys), _straight(values, rounded_values)

        undo = keep_in(inside[inner(name)], keep)
        try:
            yield
        finally:
            undo()


def _straight(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the slope of `values` where gradients are asked for."""
    return values + (rounded - values).detach() if torch.is_grad_enabled() else rounded
