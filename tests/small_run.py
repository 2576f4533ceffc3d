"""A model small enough to convert in seconds, and a manifest for it, for tests of whole runs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "manifests" / "quickstart" / "model"
TARGETS: Mapping[str, str] = {
    "q8-0": "{format: gguf, type: Q8_0}",
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, gptq]}",
    "int8": "{format: parquet, scheme: INT8}",
    "int2": "{format: parquet, scheme: INT2, group_size: 32}",
}


def write_model(folder: Path, layers: int = 2, seed: int = 0) -> Path:
    """A random Qwen3 model of 2 blocks, bf16, with the quickstart's tokenizer; returns its folder."""
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def write_manifest(
    folder: Path, targets: Mapping[str, str] = TARGETS, extra: str = "", sources: tuple[str, ...] = ("model",)
) -> Path:
    """A manifest for the models beside it; returns its path."""
    lines = ["name: small", "models:", *(f"  - source: folder:{source}" for source in sources), "targets:"]
    lines += [f"  {name}: {text}" for name, text in targets.items()]
    # f32: what is expected is the same on every machine.
    lines += [
        "calibration: {sequences: 4, length: 64, precision: f32}",
        "evaluation: {sequences: 2, length: 64}",
        extra,
    ]
    path = folder / "small.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path
