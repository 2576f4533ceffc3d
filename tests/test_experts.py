"""Mixtures of experts: both checkpoint layouts, the block forward, statistics of each expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from converter.adapt import adapt
from converter.architecture import find
from converter.blocks import Decoder
from converter.calibrate import calibrate_block
from converter.errors import SourceError
from converter.source import Snapshot, open_folder

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 96,
}
FAMILIES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=24, head_dim=16, norm_topk_prob=True),
    "qwen2_moe": Qwen2MoeConfig(
        **SHAPE, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40, norm_topk_prob=False
    ),
    "olmoe": OlmoeConfig(**SHAPE, num_experts=4),
}


def build(family: str, folder: Path, fused: bool) -> PreTrainedModel:
    """A random model of this family, saved in the layout of most checkpoints or with its experts fused."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    if fused:
        stored = load_file(folder / "model.safetensors")
        kept = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
        experts = {name: one.clone() for name, one in model.state_dict().items() if ".experts." in name}
        renamed = {
            name.replace("mlp.", "block_sparse_moe.") if family == "mixtral" else name: one
            for name, one in experts.items()
        }
        save_file(kept | renamed, folder / "model.safetensors", {"format": "pt"})
    ready: PreTrainedModel = model.eval()
    return ready


def opened(folder: Path) -> tuple[Snapshot, Decoder]:
    snapshot = open_folder(folder, "test")
    snapshot, architecture = adapt(snapshot, find(snapshot.config, "test"), "test")
    decoder = Decoder(folder, architecture, "test", stored=snapshot.tensors)
    decoder.check({name: header.shape for name, header in snapshot.tensors.items()})
    return snapshot, decoder


def block(snapshot: Snapshot, b: int) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{b}."
    return {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_separate_experts_compute_what_transformers_does(family: str, fused: bool, tmp_path: Path) -> None:
    model = build(family, tmp_path, fused)
    snapshot, decoder = opened(tmp_path)
    rows = torch.arange(2 * 24).reshape(2, 24) % 90
    hidden = decoder.embed(rows, {name: snapshot.read(name) for name in decoder.input_names})
    for b in range(decoder.blocks):
        hidden = decoder.run_block(b, block(snapshot, b), hidden)
    logits = decoder.logits(hidden, {name: snapshot.read(name) for name in decoder.output_names})
    with torch.no_grad():
        expected = model(rows).logits
    # f32 sums of at most 48 products in another order, through two blocks; logits are about 1.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_each_expert_counts_the_rows_that_reach_it(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path, fused=False)
    snapshot, decoder = opened(tmp_path)
    rows = torch.arange(2 * 24).reshape(2, 24) % 90
    hidden = decoder.embed(rows, {name: snapshot.read(name) for name in decoder.input_names})
    stats = calibrate_block(decoder, 0, block(snapshot, 0), hidden).stats
    seen = {tap: one.rows for tap, one in stats.items() if tap.startswith("expert_input.")}
    assert sum(seen.values()) == rows.numel() * 2, "each row reaches two experts"
    assert {tap.replace("input", "middle"): n for tap, n in seen.items()} == {
        tap: one.rows for tap, one in stats.items() if tap.startswith("expert_middle.")
    }


def test_a_wrong_number_of_experts_is_told(tmp_path: Path) -> None:
    build("qwen3_moe", tmp_path, fused=True)
    snapshot = open_folder(tmp_path, "test")
    architecture = find(snapshot.config, "test")
    for count, said in ((3, "counts 3 experts"), (None, "num_local_experts")):
        wrong = replace(snapshot, config={**snapshot.config, "num_local_experts": count})
        with pytest.raises(SourceError, match=said):
            adapt(wrong, architecture, "test")
