"""Small checkpoints for the container tests, each written to a folder as a hub would hold it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from converter.containers import ArtifactPlan, Parts
from converter.source import Snapshot


def write_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, intermediate: int = 256) -> None:
    """Write a Llama of two blocks with random weights; its norms are not all one, and its head is its own."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=128,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.1)
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")


def write_state_dict(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object] | None = None) -> None:
    """Write tensors as model.safetensors, and config.json when there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def round_to_nearest(plan: ArtifactPlan, snapshot: Snapshot) -> Parts:
    """The parts of planned tensors with every value rounded to nearest."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    return lambda name: planned[name].grid.encode(snapshot.read(planned[name].source).float(), None)
