"""The tensors of a block in the families that most models are of, from config.json alone.

transformers knows the tensors of every family, but to ask it takes seconds and hundreds of megabytes of imports, too
much for a look at a model. What is written here for some families is a shortcut and no second truth: it answers only
where config.json says everything outright and nothing unusual, and a test holds it against transformers' own models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from converter.architecture import COMPUTED, Architecture, text_config
from converter.source import Header

Shapes = Mapping[str, tuple[int, ...]]

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
ROPES = ("default", "linear", "yarn", "llama3")
# Keys that ask for tensors of their own when they hold something.
SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "use_bidirectional_attention", "mlp_only_layers")
NORMS = ("input_layernorm", "post_attention_layernorm")
GEMMA_NORMS = (*NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


class UnsaidError(Exception):
    """config.json does not say a number outright."""


def is_usual(architecture: Architecture, config: Mapping[str, Any], tensors: Mapping[str, Header]) -> bool:
    """Whether these are, for sure, the tensors that config.json calls for; False says nothing.

    architecture is fitted, `tensors` adapted to it; config with its text_config at the top.
    """
    if architecture.name not in FAMILIES or not _is_plain(architecture, config):
        return False
    try:
        wanted = [block_shapes(architecture, config, b) for b in range(architecture.blocks)]
        outside = {
            f"{architecture.embedding}.weight": (_number(config, "vocab_size"), _number(config, "hidden_size")),
            f"{architecture.final_norm}.weight": (_number(config, "hidden_size"),),
        }
    except UnsaidError:
        return False
    head = f"{architecture.head}.weight"
    if head in tensors:
        outside[head] = outside[f"{architecture.embedding}.weight"]
    elif config.get("tie_word_embeddings") is not True:
        return False
    if any(name not in tensors or tensors[name].shape != shape for name, shape in outside.items()):
        return False
    blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in wanted]
    for name, header in tensors.items():
        b = architecture.block_of(name)
        if b is not None and not COMPUTED.search(name):
            blocks[b][name.removeprefix(architecture.prefix(b))] = header.shape
    return blocks == wanted


def block_shapes(architecture: Architecture, config: Mapping[str, Any], b: int) -> Shapes:
    """The shapes of block b's tensors by name relative to it; raises UnsaidError where config.json leaves one open."""
    return FAMILIES[architecture.name](config, b)


def _is_plain(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether nothing in config.json could ask for other tensors, or be refused by transformers."""
    numbers = ("rms_norm_eps", "rope_theta", "max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scalings = [scaling] if isinstance(scaling, Mapping) else [None]
    if isinstance(scaling, Mapping) and any(isinstance(value, Mapping) for value in scaling.values()):
        scalings = list(scaling.values())  # one for each kind of layer
    ropes = [one.get("rope_type", one.get("type", "default")) if isinstance(one, Mapping) else None for one in scalings]
    activations = [config[key] for key in ("hidden_act", "hidden_activation") if config.get(key) is not None]
    kinds = config.get("layer_types")
    return (
        str(text_config(config).get("model_type", "")).removesuffix("_text") == architecture.name
        and isinstance(config.get("text_config", {}), Mapping)
        and not any(config.get(key) for key in SWITCHES)
        and all(type(config.get(key, 0)) in (int, float) for key in numbers)
        and all(activation in ACTIVATIONS for activation in activations)
        and all(rope in ROPES for rope in ropes)
        and (kinds is None or (isinstance(kinds, list) and len(kinds) == architecture.blocks))
    )


def _number(config: Mapping[str, Any], *keys: str) -> int:
    value = next((config[key] for key in keys if config.get(key) is not None), None)
    if type(value) is not int or value < 1:
        raise UnsaidError(keys)
    return value


def _attention(config: Mapping[str, Any], derived: bool) -> dict[str, tuple[int, ...]]:
    """derived: the width of a head, where it is not given, is that of the model by the number of heads."""
    width, heads = _number(config, "hidden_size"), _number(config, "num_attention_heads")
    kv_heads = _number(config, "num_key_value_heads")
    each = width // heads if derived and config.get("head_dim") is None else _number(config, "head_dim")
    return {
        "self_attn.q_proj.weight": (heads * each, width),
        "self_attn.k_proj.weight": (kv_heads * each, width),
        "self_attn.v_proj.weight": (kv_heads * each, width),
        "self_attn.o_proj.weight": (width, heads * each),
    }


def _gated(module: str, width: int, middle: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{module}.gate_proj.weight": (middle, width),
        f"{module}.up_proj.weight": (middle, width),
        f"{module}.down_proj.weight": (width, middle),
    }


def _norms(names: tuple[str, ...], width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,) for name in names}


def _llama(config: Mapping[str, Any], b: int) -> Shapes:
    width = _number(config, "hidden_size")
    middle = _number(config, "intermediate_size")
    return _attention(config, derived=True) | _gated("mlp", width, middle) | _norms(NORMS, width)


def _qwen2(config: Mapping[str, Any], b: int) -> Shapes:
    shapes = _llama(config, b)
    biases = {f"self_attn.{name}_proj.bias": shapes[f"self_attn.{name}_proj.weight"][:1] for name in "qkv"}
    return {**shapes, **biases}


def _head_norms(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return _norms(("self_attn.q_norm", "self_attn.k_norm"), _number(config, "head_dim"))


def _qwen3(config: Mapping[str, Any], b: int) -> Shapes:
    return {**_llama(config, b), **_head_norms(config)}


def _gemma2(config: Mapping[str, Any], b: int) -> Shapes:
    _number(config, "head_dim")
    return {**_llama(config, b), **_norms(GEMMA_NORMS, _number(config, "hidden_size"))}


def _gemma3(config: Mapping[str, Any], b: int) -> Shapes:
    return {**_gemma2(config, b), **_head_norms(config)}


def _qwen3_moe(config: Mapping[str, Any], b: int) -> Shapes:
    width, count = _number(config, "hidden_size"), _number(config, "num_experts", "num_local_experts")
    if _number(config, "decoder_sparse_step") != 1:
        raise UnsaidError("decoder_sparse_step")
    shapes = _attention(config, derived=False) | _norms(NORMS, width) | _head_norms(config)
    for e in range(count):
        shapes |= _gated(f"mlp.experts.{e}", width, _number(config, "moe_intermediate_size"))
    return shapes | {"mlp.gate.weight": (count, width)}


def _deepseek_v3(config: Mapping[str, Any], b: int) -> Shapes:
    width, heads, count = (_number(config, key) for key in ("hidden_size", "num_attention_heads", "n_routed_experts"))
    query, latent, rope = (_number(config, key) for key in ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"))
    plain, value = _number(config, "qk_nope_head_dim"), _number(config, "v_head_dim")
    shapes = _norms(NORMS, width) | {
        "self_attn.q_a_proj.weight": (query, width),
        "self_attn.q_a_layernorm.weight": (query,),
        "self_attn.q_b_proj.weight": (heads * (plain + rope), query),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, width),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (plain + value), latent),
        "self_attn.o_proj.weight": (width, heads * value),
    }
    if b < _number(config, "first_k_dense_replace"):
        return shapes | _gated("mlp", width, _number(config, "intermediate_size"))
    middle = _number(config, "moe_intermediate_size")
    for e in range(count):
        shapes |= _gated(f"mlp.experts.{e}", width, middle)
    shapes |= _gated("mlp.shared_experts", width, middle * _number(config, "n_shared_experts"))
    return shapes | {"mlp.gate.weight": (count, width), "mlp.gate.e_score_correction_bias": (count,)}


FAMILIES: Mapping[str, Callable[[Mapping[str, Any], int], Shapes]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}
