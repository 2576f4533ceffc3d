"""What attention keeps of each token, the keys after norms and rope and the values: seen, and rounded as readers do.

Attention modules of transformers hand both to a cache and go on with what it gives back. One that keeps nothing
therefore sees, for any family, exactly what a reader's cache will hold, and gives it back rounded where an artifact
says so. The alternative, rounding what k_proj and v_proj give, would be before rope and norms.

Statistics of both are those of two more taps, a row for each token and a column for each dimension of each head.
"""

# B sequences, H heads of keys and values, T tokens, D dimensions of a head
from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from converter.activations import quantize_inputs
from converter.architecture import Tap
from converter.schemes import Activations

KEYS, VALUES = "cached_keys", "cached_values"  # the names of the two taps
MAKERS = {KEYS: ("k_proj", "qkv_proj"), VALUES: ("v_proj", "qkv_proj")}  # linears that readers look for
SCALES = {KEYS: "k_scale", VALUES: "v_scale"}  # what readers call their scales, inside of the attention
LATENT = "kv_b_proj"  # of attention that keeps what this linear makes keys and values of (MLA)
ARGUMENTS = ("past_key_values", "past_key_value")  # what attention modules call the cache

# Takes the keys and the values [B, H, T, D] of a call, and gives what attention shall use.
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class CacheRounding:
    """How keys and values are rounded: one static range for all heads, or one for each."""

    keys: tuple[Activations, ...]
    values: tuple[Activations, ...]

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] as a reader's cache holds them."""
        return _rounded(keys, self.keys), _rounded(values, self.values)


@dataclass(frozen=True, kw_only=True)
class Cached:
    """What is stored beside a linear for the keys or values that it makes, or for both.

    attention: the module that readers look in, relative to the block. of: KEYS, VALUES. heads: how many scales each
    has, 1 for all heads together. dtype: of the scales.
    """

    attention: str
    of: tuple[str, ...]
    how: Activations
    heads: int
    dtype: str


def rounding_of(cached: Cached, largest: Mapping[str, Tensor]) -> CacheRounding:
    """How keys and values are rounded, given the largest magnitudes [H] of each, or [1]."""

    def each(tap: str) -> tuple[Activations, ...]:
        return tuple(replace(cached.how, lowest=-one, largest=one) for one in largest[tap].tolist())

    return CacheRounding(keys=each(KEYS), values=each(VALUES))


def attention_of(taps: Sequence[Tap], there: Collection[str]) -> str | None:
    """The module of a block with the linears `there` whose keys and values readers can keep rounded; None: none."""
    for tap in taps:
        for linear in tap.linears:
            attention, _, name = linear.rpartition(".")
            beside = {one.rpartition(".")[2] for one in there if one.rpartition(".")[0] == attention}
            known = all(beside & {*makers} for makers in MAKERS.values())
            if linear in there and name in MAKERS[KEYS] and known and LATENT not in beside:
                return attention
    return None


def flat(states: Tensor) -> Tensor:
    """Keys or values [1, H, T, D] as rows of a tap [T, H D]."""
    return states[0].transpose(0, 1).flatten(1)


def keep_in(attention: nn.Module, keep: Keep) -> Callable[[], None]:
    """Let `keep` see and change what this module of transformers would put into a cache; returns how to undo that."""
    signature = inspect.signature(attention.forward)
    name = next(one for one in ARGUMENTS if one in signature.parameters)

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = signature.bind_partial(*args, **kwargs)
        bound.arguments[name] = _Cache(keep)
        return bound.args, bound.kwargs

    return attention.register_forward_pre_hook(give, with_kwargs=True).remove


class _Cache:
    """What attention takes for a cache: it gives back what `keep` makes of what it is given."""

    is_compileable = False

    def __init__(self, keep: Keep) -> None:
        self.update = partial(_update, keep)


def _update(keep: Keep, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return keep(keys, values)


def _rounded(states: Tensor, how: tuple[Activations, ...]) -> Tensor:
    if len(how) == 1:
        return quantize_inputs(states, how[0])
    return torch.stack([quantize_inputs(states[:, head], one) for head, one in enumerate(how)], 1)
