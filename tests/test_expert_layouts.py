"""Experts in every layout that checkpoints have: the same linears come out, and transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

import gguf_models as tiny
from converter.architecture import check_blocks, families
from converter.blocks import Decoder
from converter.containers.gguf import GGUF
from converter.containers.gguf.family import family_of, unread
from converter.errors import UnsupportedError
from converter.source import Snapshot
from tiny_families import Tiny, few, tiny_models

TINY = tiny_models()
SEPARATE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3")
ROWS = torch.arange(300, 324)[None]


def rewritten(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    kept = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def fuse(one: Tiny, folder: Path) -> None:
    """Store the experts as transformers holds them, in two tensors for each block."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if ".experts." not in name}
    fused = {name: tensor for name, tensor in model.state_dict().items() if ".experts." in name}
    if one.family == "mixtral":
        fused = {name.replace(".mlp.", ".block_sparse_moe."): tensor for name, tensor in fused.items()}
    assert len(kept) < len(stored)
    rewritten(folder, kept | fused)


def tensors_of(snapshot: Snapshot) -> dict[str, Tensor]:
    return {name: snapshot.read(name) for name in snapshot.tensors}


@pytest.mark.parametrize("family", few(SEPARATE, ("mixtral", "deepseek_v3")))
def test_fused_experts_are_read_as_the_separate_ones(family: str, tmp_path: Path) -> None:
    TINY[family].save(tmp_path)
    separate = tensors_of(tiny.load(tmp_path)[0])
    fuse(TINY[family], tmp_path)
    fused = tensors_of(tiny.load(tmp_path)[0])
    assert fused.keys() == separate.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in separate.items())


def to_mxfp4(folder: Path) -> None:
    """Store gpt-oss' experts as the released checkpoints do: random codes and scales [E, O, G, 16] and [E, O, G]."""
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, ins, outs = tensors.pop(name).shape
        shape = (experts, outs, ins // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        # Powers of two around 1/32, so that sums of some hundred products stay near 1.
        tensors[f"{name}_scales"] = torch.randint(121, 124, shape, dtype=torch.uint8, generator=generator)
    rewritten(folder, tensors)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    unconverted = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": unconverted}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")


def test_experts_of_gpt_oss_in_mxfp4_compute_what_transformers_does(tmp_path: Path) -> None:
    TINY["gpt_oss"].save(tmp_path)
    to_mxfp4(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    snapshot, architecture = tiny.load(tmp_path)
    held = dict(model.named_parameters())
    for b in range(architecture.blocks):
        experts = f"{architecture.prefix(b)}mlp.experts"
        for e in range(TINY["gpt_oss"].config.num_local_experts):
            gate_up = held[f"{experts}.gate_up_proj"][e].T.float()  # exact: codes times powers of two fit bf16
            assert torch.equal(snapshot.read(f"{experts}.{e}.gate_proj.weight"), gate_up[::2])
            assert torch.equal(snapshot.read(f"{experts}.{e}.up_proj.weight"), gate_up[1::2])
            assert torch.equal(
                snapshot.read(f"{experts}.{e}.down_proj.weight"), held[f"{experts}.down_proj"][e].T.float()
            )
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    decoder.check({name: header.shape for name, header in snapshot.tensors.items()})
    hidden = decoder.embed(ROWS, {name: snapshot.read(name) for name in decoder.input_names})
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}
        hidden = decoder.run_block(b, own, hidden)
    logits = decoder.logits(hidden, {name: snapshot.read(name) for name in decoder.output_names})
    with torch.no_grad():
        expected = model(ROWS).logits
    # f32 sums of at most 256 products in another order, through three blocks; logits are about 1.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_predict_further_tokens_are_left_out_and_listed(tmp_path: Path) -> None:
    TINY["deepseek_v3"].save(tmp_path)
    tiny.save_tokenizer(tiny.byte_level(), tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    last = {name.replace(".2.", ".3.", 1): tensor for name, tensor in stored.items() if ".layers.2." in name}
    ahead = {"model.layers.3.eh_proj.weight": torch.zeros(256, 512), "model.layers.3.enorm.weight": torch.ones(256)}
    rewritten(tmp_path, stored | last | ahead)
    snapshot, architecture = tiny.load(tmp_path)
    check_blocks(architecture, snapshot.config, snapshot.tensors, "test")
    plan = GGUF.plan(snapshot, architecture, tiny.target("F32"))
    assert set(plan.dropped) == {name for name in snapshot.tensors if name.startswith("model.layers.3.")}
    assert all("further ahead" in reason for reason in plan.dropped.values())


YARN = {"type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0}
REFUSED = [
    ("granitemoe", {"hidden_act": "gelu"}, "hidden_act"),
    ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek_v2-query-latent", {"num_hidden_layers": 27}, "num_hidden_layers"),
    ("deepseek_v2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ("deepseek_v2-yarn", {"rope_scaling": YARN | {"mscale": 0.7}}, "yarn"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("mamba", {"expand": 4}, "expand"),
    ("mamba", {"use_conv_bias": False}, "use_conv_bias"),
    ("lfm2", {"conv_bias": True}, "conv_bias"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def saved(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        TINY[name].save(folder)
        return folder

    return saved


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED)
def test_what_readers_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], said: str, folders: Callable[[str], Path]
) -> None:
    snapshot, architecture = tiny.load(folders(name))
    changed = replace(snapshot, config={**snapshot.config, **changes})
    with pytest.raises(UnsupportedError, match=said):
        GGUF.plan(changed, architecture, tiny.target("F32"))


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("deepseek_v2", {"n_group": 8, "topk_method": "group_limited_greedy"}, "groups of experts"),
    ],
)
def test_what_readers_compute_a_little_otherwise_is_said(family: str, config: dict[str, Any], said: str) -> None:
    described = family_of(next(one for one in families() if one.name == family), "test")
    (note,) = unread(described, config, 512)
    assert said in note
    assert unread(described, {}, 512) == ()
