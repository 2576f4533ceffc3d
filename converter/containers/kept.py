"""Scales of the keys and values that attention keeps, beside the linears that make them: what a plan holds of them.

    <attention>.k_scale, <attention>.v_scale    [1], or [H, 1, 1] with a scale for each of H heads

Readers look for them in modules that have a k_proj and a v_proj, or a qkv_proj: transformers with compressed-tensors,
and vLLM, which takes fp8 alone. Attention that keeps a latent (MLA) has other tensors in its cache than transformers'
modules hand to it in every version, so its scale would be of no certain reader.
"""

# H heads of keys and values

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from converter.activations import fixed_scale
from converter.architecture import Architecture, ranges, text_config
from converter.caches import LATENT, MAKERS, SCALES, Cached, attention_of
from converter.containers import TensorPlan
from converter.containers.safetensors_file import Entry
from converter.containers.selection import float_dtype
from converter.errors import UnsupportedError
from converter.grids.plain import DTYPES
from converter.manifest import Target
from converter.schemes import CACHES
from converter.source import Snapshot

HEADS = ("num_key_value_heads", "num_attention_heads")  # where config.json counts those of keys and values


def with_scales(
    tensors: Sequence[TensorPlan], snapshot: Snapshot, architecture: Architecture | None, target: Target, where: str
) -> list[TensorPlan]:
    """The tensors, those that make keys and values with the scales that go beside them.

    Raises UnsupportedError where the model keeps none that a reader has a scale for.
    """
    if target.kv_cache is None:
        return list(tensors)
    scheme, attentions = CACHES[target.kv_cache], _attentions(tensors, architecture)
    heads = _heads(snapshot.config, where) if scheme.by_head else 1
    found: list[TensorPlan] = []
    for tensor in tensors:
        attention, _, linear = tensor.source.removesuffix(".weight").rpartition(".")
        of = tuple(tap for tap, makers in MAKERS.items() if linear in makers)
        if not of or attentions.get(tensor.block) != attention or not tensor.source.endswith(".weight"):
            found.append(tensor)
            continue
        if tensor.shape[0] % heads:
            what = f"{tensor.source} has {tensor.shape[0]} rows, which are not those of {heads} heads"
            raise UnsupportedError(where, what, f"Write kv_cache: {target.kv_cache.removesuffix('_HEAD')}")
        dtype = float_dtype(snapshot.tensors[tensor.source].dtype) or "F32"
        cached = Cached(attention=attention, of=of, how=scheme.how, heads=heads, dtype=dtype)
        found.append(replace(tensor, cached=cached))
    if not any(tensor.cached for tensor in found):
        latent = any(f".{LATENT}." in tensor.source for tensor in tensors)
        why = "keeps a latent in place of keys and values" if latent else "has no module with k_proj and v_proj"
        what = f"kv_cache {target.kv_cache}: the attention of this model {why}, so readers have no scale for it"
        raise UnsupportedError(where, what, "Remove kv_cache for this model, by overrides: kv_cache: null")
    return found


def notes(tensors: Sequence[TensorPlan], target: Target, architecture: Architecture | None) -> tuple[str, ...]:
    """What a plan tells about the scales of keys and values, a sentence each without full stop."""
    if target.kv_cache is None or architecture is None:
        return ()
    having = {tensor.block for tensor in tensors if tensor.cached}
    without = [block for block in range(architecture.blocks) if block not in having]
    said = [f"blocks {ranges(without)} keep no keys and values"] if without else []
    if CACHES[target.kv_cache].how.values == "int":
        said.append("vLLM keeps keys and values in fp8 alone and refuses INT8; transformers computes with it")
    return tuple(said)


def settings(target: Target) -> dict[str, Any] | None:
    """What config.json says under `kv_cache_scheme`."""
    if target.kv_cache is None:
        return None
    scheme = CACHES[target.kv_cache]
    return {
        "num_bits": scheme.how.bits,
        "type": "int" if scheme.how.values == "int" else "float",
        "symmetric": True,
        "strategy": "attn_head" if scheme.by_head else "tensor",
        "group_size": None,
        "dynamic": False,
    }


def entries(tensor: TensorPlan) -> tuple[Entry, ...]:
    """The scales that stand beside a tensor, in the order of `values`."""
    if tensor.cached is None:
        return ()
    cached = tensor.cached
    shape = (cached.heads, 1, 1) if cached.heads > 1 else (1,)
    return tuple(Entry(name=f"{cached.attention}.{SCALES[tap]}", dtype=cached.dtype, shape=shape) for tap in cached.of)


def values(tensor: TensorPlan, parts: Mapping[str, Tensor]) -> list[Tensor]:
    """The scales that `entries` names, from the largest magnitudes of each head, parts named as the taps."""
    found = []
    for entry, tap in zip(entries(tensor), tensor.cached.of if tensor.cached else (), strict=True):
        assert tensor.cached is not None
        scales = [fixed_scale(replace(tensor.cached.how, largest=largest))[0] for largest in parts[tap].tolist()]
        found.append(parts[tap].new_tensor(scales).reshape(entry.shape).to(DTYPES[entry.dtype]))
    return found


def _attentions(tensors: Sequence[TensorPlan], architecture: Architecture | None) -> dict[int | None, str]:
    """By block the module, by its name in the checkpoint, whose keys and values readers keep."""
    if architecture is None:
        return {}
    there: dict[int, set[str]] = {}
    for tensor in tensors:
        if tensor.block is not None and architecture.is_linear(tensor.source):
            local = tensor.source.removeprefix(architecture.prefix(tensor.block)).removesuffix(".weight")
            there.setdefault(tensor.block, set()).add(local)
    found = {block: attention_of(architecture.taps, linears) for block, linears in there.items()}
    return {
        block: architecture.prefix(block) + attention for block, attention in found.items() if attention is not None
    }


def _heads(config: Mapping[str, Any], where: str) -> int:
    inner = text_config(config)
    count = next((inner[key] for key in HEADS if inner.get(key) is not None), None)
    if type(count) is not int or count < 1:
        what = f"config.json gives {count!r} for {HEADS[0]}, not a number of heads"
        raise UnsupportedError(where, what, "Write kv_cache: FP8, which has one scale for all")
    return count
