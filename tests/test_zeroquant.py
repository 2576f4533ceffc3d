"""ZeroQuant: weights in groups beside inputs with a scale for each token, as readers of compressed-tensors run them."""

# O out, I in, N tokens.
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from converter.activations import quantize_inputs
from converter.grids.affine import AffineGrid
from converter.schemes import TOKEN_INT8
from test_compressed_tensors import convert, load_weights, logits, make_target
from tiny_models import write_llama


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_further_off_than_half_a_step_of_its_group(bits: int) -> None:
    weight_OI = random(24, 256) * torch.logspace(-2, 1, 256)  # columns of very different sizes
    worst = {}
    for size in (None, 128, 32):
        grid = AffineGrid(
            bits=bits,
            granularity="group" if size else "channel",
            group_size=size,
            observer="minmax",
            scale_dtype="F32",
        )
        off = (grid.decode(grid.encode(weight_OI, None)) - weight_OI).reshape(24, -1, size or 256)
        range_OG1 = weight_OI.reshape(24, -1, size or 256).abs().amax(-1, keepdim=True)
        # the step is range / (2^b - 1) / 2; the largest positive value has no code of its own and is off by half of it
        assert bool((off.abs() <= range_OG1 / (2**bits - 1) * (1 + 4e-5)).all())
        worst[size] = float(off.square().mean())
    assert worst[32] < worst[128] < worst[None]


def test_a_token_is_rounded_as_if_it_were_alone() -> None:
    hidden_NI = random(9, 64) * torch.logspace(-3, 3, 9)[:, None]
    together = quantize_inputs(hidden_NI, TOKEN_INT8)
    for alone, one in zip(hidden_NI, together, strict=True):
        assert torch.equal(quantize_inputs(alone[None], TOKEN_INT8)[0], one)
        # half a step, and what f32 leaves of it: two roundings of 2^-24 of the largest value are 3e-5 of half a step
        assert bool(((one - alone).abs() <= alone.abs().max() / 255 * (1 + 4e-5)).all())


@pytest.mark.parametrize(("scheme", "size", "layout"), [("W8A8", 32, "int8 g32"), ("W4A8", 64, "int4 g64")])
def test_transformers_computes_what_is_measured(scheme: str, size: int, layout: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", torch.float32)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme, group_size=size))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    [group] = QuantizationConfig.model_validate(settings).config_groups.values()
    assert (group.format, group.weights.strategy, group.weights.group_size) == ("pack-quantized", "group", size)
    assert (group.input_activations.strategy, group.input_activations.num_bits) == ("token", 8)
    assert plan.files == {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    simulated = load_weights(tmp_path / "model", opened)
    weights_only = logits(simulated)
    for name, module in simulated.named_modules():
        if how := opened.activations(f"{name}.weight") if f"{name}.weight" in opened.names else None:
            assert opened.stored(f"{name}.weight")[0] == layout and how == TOKEN_INT8
            module.register_forward_pre_hook(lambda _, inputs: (quantize_inputs(inputs[0], TOKEN_INT8),))
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    rounding = (logits(simulated) - weights_only).norm()
    # In f32 both choose the same codes, but for a value within an ulp of the middle between two.
    assert (loaded - logits(simulated)).norm() < 0.1 * rounding
    assert rounding > 1e-3 * loaded.norm()


def test_inputs_in_groups_are_those_of_the_weights_and_computed_by_transformers(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", torch.float32, intermediate=72)
    _, _, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W8A8_GROUP", group_size=32))
    simulated = load_weights(tmp_path / "model", opened)
    weights_only, sizes = logits(simulated), set()
    for name, module in simulated.named_modules():
        if how := opened.activations(f"{name}.weight") if f"{name}.weight" in opened.names else None:
            sizes.add((name.rpartition(".")[2], how.group_size))
            module.register_forward_pre_hook(lambda _, inputs, how=how: (quantize_inputs(inputs[0], how),))
    assert {("up_proj", 32), ("q_proj", 32), ("down_proj", None)} <= sizes  # 72 columns are no groups of 32
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    rounding = (logits(simulated) - weights_only).norm()
    assert (loaded - logits(simulated)).norm() < 0.1 * rounding
    assert rounding > 1e-3 * loaded.norm()


def test_rows_that_groups_do_not_divide_are_stored_beside_them(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", torch.float32, intermediate=72)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W8A8", group_size=128))
    assert opened.stored("model.layers.0.mlp.down_proj.weight")[0] == "int8 channel"
    assert opened.stored("model.layers.0.mlp.up_proj.weight")[0] == "int8 g128"
    assert any("do not divide rows of 72" in tensor.fallback for tensor in plan.tensors)
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (loaded - logits(load_weights(tmp_path / "model", opened))).norm() < 0.1 * loaded.norm()
