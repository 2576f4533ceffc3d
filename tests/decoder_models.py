"""Random models of every supported family, small enough to run whole: the references of the decoder's tests.

Granite is there for its scales outside the blocks (embedding, residual, logits); Llama's names fit it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 96,
}
GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    "llama3-rope": LlamaConfig(
        **SHAPE,
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "gemma2": Gemma2Config(
        **SHAPE, **GEMMA, layer_types=SLIDING, final_logit_softcapping=3.0, attn_logit_softcapping=5.0
    ),
    "gemma3": Gemma3TextConfig(**SHAPE, **GEMMA, layer_types=SLIDING),
    "granite": GraniteConfig(
        **SHAPE, embedding_multiplier=7.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=3.0
    ),
}


def build(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """A model of this family with random f32 weights, in eval mode, its config and weights saved in `folder`."""
    config = FAMILIES[family].__class__(**{**FAMILIES[family].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases included, so that none can be forgotten unnoticed
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded.eval()


def tensors_of(model: PreTrainedModel, prefix: str = "") -> dict[str, Tensor]:
    """The model's tensors whose names begin with `prefix`, which is taken off."""
    return {name.removeprefix(prefix): one for name, one in model.state_dict().items() if name.startswith(prefix)}
