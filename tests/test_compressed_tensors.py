"""compressed-tensors artifacts: sizes planned to the byte, configs the format accepts, weights transformers runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from converter.activations import quantize_inputs
from converter.architecture import find
from converter.containers import ArtifactPlan
from converter.containers.compressed_tensors import CompressedTensors
from converter.containers.safetensors_file import Entry, SafetensorsWriter, plan_files, read_headers, read_tensor
from converter.containers.safetensors_open import OpenedSafetensors
from converter.errors import SourceError, UnsupportedError
from converter.manifest import Rule, Target
from converter.schemes import COMPRESSED_TENSORS_SCHEMES, TOKEN_INT8, Activations
from converter.source import Snapshot, open_folder
from tiny_models import round_to_nearest, write_llama, write_state_dict

LOWEST, LARGEST = -2.0, 6.0  # inputs, as if calibration had seen them
TOKENS = torch.arange(48).reshape(2, 24)


def make_target(scheme: str, *rules: tuple[str, str], **fields: Any) -> Target:
    listed = tuple(Rule(pattern=pattern, type=type) for pattern, type in rules)
    return Target.model_construct(
        **{
            **Target(name="t", format="compressed-tensors", scheme=scheme, observer="minmax").__dict__,
            "rules": listed,
            **fields,
        }
    )


def convert(model: Path, out: Path, target: Target) -> tuple[Snapshot, ArtifactPlan, OpenedSafetensors]:
    snapshot = open_folder(model, "test")
    architecture = find(snapshot.config, "test") if snapshot.config.get("architectures") else None
    container = CompressedTensors()
    plan = container.plan(snapshot, architecture, target)
    out.mkdir()
    rounded = round_to_nearest(plan, snapshot)
    parts = lambda name: {**rounded(name), "input_range": torch.tensor([LOWEST, LARGEST])}  # noqa: E731
    container.write(plan, snapshot, architecture, target, parts, out)
    return snapshot, plan, container.open(out, architecture)


def plan_only(model: Path, target: Target) -> ArtifactPlan:
    snapshot = open_folder(model, "test")
    return CompressedTensors().plan(snapshot, find(snapshot.config, "test"), target)


def load_weights(model: Path, opened: OpenedSafetensors) -> Any:
    """The original model in transformers, with the weights that our reader decodes."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain.load_state_dict({name: opened.read(name) for name in opened.names})
    return plain


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits.float()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


FIRST = "model.layers.0.self_attn.q_proj"


def first_queries(model: Any) -> Tensor:
    """What the first linear of the first block gives: its inputs are those of the original in every artifact."""
    seen: list[Tensor] = []
    handle = model.get_submodule(FIRST).register_forward_hook(lambda *args: seen.append(args[2].float()))
    logits(model)
    handle.remove()
    return seen[0]


def round_inputs(hidden: Tensor, how: Activations) -> Tensor:
    return quantize_inputs(hidden.float(), how).to(hidden.dtype)


# compressed-tensors' name for how a scheme is stored; integers whose inputs keep their precision are "pack-quantized".
LAYOUTS = {
    "W8A8": "int-quantized",
    "W8A8_STATIC": "int-quantized",
    "W8A8_STATIC_ASYM": "int-quantized",
    "FP8": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "FP8_BLOCK": "float-quantized",
    "FP8A16": "naive-quantized",
    "NVFP4": "nvfp4-pack-quantized",
    "NVFP4A16": "nvfp4-pack-quantized",
    "MXFP4": "mxfp4-pack-quantized",
    "MXFP4A16": "mxfp4-pack-quantized",
    "MXFP8": "mxfp8-quantized",
    "MXFP8A16": "mxfp8-quantized",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_ASYM", "W8A8", "W8A8_STATIC_ASYM", "FP8", "NVFP4", "MXFP8"])
def test_plan_is_exact_to_the_byte(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", dtype)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme))
    assert plan.exact
    assert plan.files == {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {tensor.name: tensor.size_bytes for tensor in plan.tensors} == {
        name: opened.stored(name)[1] for name in opened.names
    }


@pytest.mark.parametrize("scheme", COMPRESSED_TENSORS_SCHEMES)
def test_config_is_accepted_by_the_format_and_names_its_layout(scheme: str, llama: Path, tmp_path: Path) -> None:
    _, plan, opened = convert(llama, tmp_path / "out", make_target(scheme))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(settings)
    [group] = parsed.config_groups.values()
    assert group.format == parsed.format == LAYOUTS.get(scheme, "pack-quantized")
    assert parsed.ignore == ["lm_head"]
    assert group.weights.num_bits == COMPRESSED_TENSORS_SCHEMES[scheme].bits
    known = None if scheme == "W8A16" else PRESET_SCHEMES.get(scheme)  # theirs has groups of 128, where a row does
    preset = known and {key: known.get(key) for key in ("weights", "input_activations")}
    if preset:  # where the format has a name for it, it means the same
        for ours, theirs in (
            (group.weights, preset["weights"]),
            (group.input_activations, preset["input_activations"]),
        ):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                for field in ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic"):
                    assert getattr(ours, field) == getattr(theirs, field), field
    name = "model.layers.0.self_attn.q_proj.weight"
    [planned] = [tensor for tensor in plan.tensors if tensor.name == name]
    assert opened.stored(name)[0] == planned.grid.name
    declared = opened.activations(name)
    assert (declared is None) == (planned.activations is None)
    if declared and planned.activations:
        assert replace(declared, lowest=0.0, largest=0.0) == planned.activations
        # a scale in bf16 is off by 2^-9 of itself, and a zero point is a whole number of the range's 255 steps
        near = 2**-8 if declared.symmetric else 2**-6
        assert declared.largest == pytest.approx(LARGEST if declared.static else 0.0, rel=near)
        assert declared.symmetric or declared.lowest == pytest.approx(LOWEST, rel=near)


MICRO = [name for name in LAYOUTS if name.startswith(("MX", "NV"))]  # whose reader computes in BF16 only


@pytest.mark.parametrize(
    "scheme", ["W2A16", "W3A16", "W5A16", "W6A16", "W7A16", "W4A8", *(name for name in LAYOUTS if name != "W8A8")]
)
def test_transformers_runs_every_layout_as_our_reader_decodes_it(scheme: str, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if scheme in MICRO else torch.float32
    write_llama(tmp_path / "model", dtype)
    _, _, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme))
    simulated = load_weights(tmp_path / "model", opened).to(dtype)
    weights_only = first_queries(simulated)
    activations = opened.activations(f"{FIRST}.weight")
    if activations:
        module = simulated.get_submodule(FIRST)
        module.register_forward_pre_hook(lambda _, inputs: (round_inputs(inputs[0], activations),))
    loaded, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), first_queries(simulated)
    # The same codes and inputs, but for values within an ulp of the middle between two. Scales of NVFP4's inputs are
    # computed in BF16 there, so that some come out an fp8 step of 1/16 away.
    tolerance = 0.03 if scheme == "NVFP4" else 0.01 if scheme in MICRO else 1e-3
    assert (first_queries(loaded) - ours).norm() < tolerance * ours.norm()
    if activations:
        assert (weights_only - ours).norm() > 5e-3 * ours.norm()
    else:
        assert (logits(loaded) - logits(simulated)).norm() < 0.03 * logits(loaded).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "W3A16_ASYM"])
def test_transformers_computes_what_our_reader_decodes(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", dtype)
    _, _, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # Equal, not close: a code times a scale of the model's type, rounded to that type, is one rounding on both sides.
    assert torch.equal(logits(loaded), logits(load_weights(tmp_path / "model", opened)))
    assert not torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")))


def test_w8a8_is_our_weights_with_inputs_rounded_per_token(tmp_path: Path) -> None:
    write_llama(tmp_path / "model", torch.float32)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W8A8"))
    quantized = {tensor.name.removesuffix(".weight") for tensor in plan.tensors if tensor.quantized}
    simulated = load_weights(tmp_path / "model", opened)
    weights_only = logits(simulated)

    def round_input(module: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        scale = inputs[0].abs().amax(-1, keepdim=True) / 127.5
        return ((inputs[0] / scale).round().clamp(-128, 127).mul(scale),)

    for name, module in simulated.named_modules():
        if name in quantized:
            assert opened.activations(f"{name}.weight") == TOKEN_INT8
            module.register_forward_pre_hook(round_input)
    loaded = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    rounding = (loaded - weights_only).norm() / loaded.norm()
    error = (loaded - logits(simulated)).norm() / loaded.norm()
    # In f32 both choose the same codes, but for a value within an ulp of the middle between two; a single code that
    # differs moves one of 128 inputs by one step, at most a tenth of what all of them together move.
    assert error < 0.1 * rounding
    assert 1e-3 < rounding < 0.1
    assert opened.activations("lm_head.weight") is None


@pytest.mark.parametrize(("scheme", "other"), [("W4A16", "W8A16"), ("W8A8", "W8A16"), ("W4A16", "BF16")])
def test_rules_give_other_schemes_to_some_linears(scheme: str, other: str, llama: Path, tmp_path: Path) -> None:
    target = make_target(scheme, (r"layers\.0\.self_attn\.[qkv]_proj", other), (r"layers\.1\.mlp\.down", other))
    _, _, opened = convert(llama, tmp_path / "out", target)
    stored = {name: opened.stored(name)[0] for name in opened.names}
    assert stored["model.layers.0.self_attn.q_proj.weight"] == ("BF16" if other == "BF16" else "int8 channel")
    assert stored["model.layers.1.self_attn.q_proj.weight"] == ("int8 channel" if scheme == "W8A8" else "int4 g128")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    if scheme == "W4A16":
        assert torch.equal(logits(loaded), logits(load_weights(llama, opened)))
    else:
        settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
        assert QuantizationConfig.model_validate(settings).format == "mixed-precision"
        error = logits(loaded) - logits(load_weights(llama, opened))
        assert 0 < error.norm() / logits(loaded).norm() < 0.05


@pytest.mark.parametrize(("intermediate", "stored"), [(192, "int4 g64"), (96, "int4 g32"), (104, "int4 channel")])
def test_rows_that_groups_do_not_divide_get_smaller_groups(intermediate: int, stored: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", intermediate=intermediate)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W4A16"))
    name = "model.layers.0.mlp.down_proj.weight"
    assert opened.stored(name)[0] == stored
    assert {tensor.name for tensor in plan.tensors if tensor.fallback} == {
        f"model.layers.{block}.mlp.down_proj.weight" for block in range(2)
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(load_weights(tmp_path / "model", opened)))


@pytest.mark.parametrize(("scheme", "intermediate"), [("W4A16_ASYM", 192), ("W4A16", 100), ("W8A16", 102)])
def test_rows_that_no_reader_takes_packed_keep_their_type(scheme: str, intermediate: int, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", intermediate=intermediate)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target(scheme))
    assert opened.stored("model.layers.1.mlp.down_proj.weight")[0] == "BF16"
    kept = [tensor for tensor in plan.tensors if tensor.fallback]
    assert len(kept) == 2 and all("kept" in tensor.fallback for tensor in kept)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(load_weights(tmp_path / "model", opened)))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (make_target("W4A16_ASYM", (r"mlp\.(gate|up)_proj", "W8A16")), "asymmetric codes beside another scheme"),
        (make_target("W8A8", symmetric=False), "no reader runs W8A8 with asymmetric weights"),
        (make_target("W8A8_STATIC", group_size=64), "no reader runs W8A8_STATIC with weights in groups"),
        (make_target("W4A16", granularity="tensor"), "one scale per tensor"),
        (make_target("W4A16", (r"q_proj", "W8A16")), "let rules cover all of"),
        (make_target("W4A16", (r"v_proj", "BF16")), "let rules cover all of"),
        (make_target("W4A16", (r".", "BF16")), "no linear"),
    ],
)
def test_what_readers_do_not_load_is_refused_in_the_plan(target: Target, message: str, llama: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        plan_only(llama, target)


def test_w8a8_with_one_scale_per_tensor_loads(llama: Path, tmp_path: Path) -> None:
    _, _, opened = convert(llama, tmp_path / "out", make_target("W8A8", granularity="tensor"))
    assert read_headers(tmp_path / "out")["model.layers.0.mlp.up_proj.weight_scale"].shape == (1,)
    loaded, ours = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(load_weights(llama, opened))
    assert (loaded - ours).norm() / ours.norm() < 0.05


def test_a_head_is_quantized_only_by_a_rule_that_names_it(llama: Path, tmp_path: Path) -> None:
    _, _, opened = convert(llama, tmp_path / "out", make_target("W4A16", ("lm_head", "W4A16"), group_size=64))
    assert opened.stored("lm_head.weight")[0] == "int4 g64"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(load_weights(llama, opened)))


def test_a_plain_state_dict_lists_its_linears_one_by_one(tmp_path: Path) -> None:
    tensors = {
        "encoder.fc1.weight": torch.randn(24, 128),
        "encoder.fc1.bias": torch.randn(24),
        "encoder.conv.weight": torch.randn(4, 3, 3, 3).half(),
        "token_embedding.weight": torch.randn(10, 128),
        "position_ids": torch.arange(10)[None],
    }
    write_state_dict(tmp_path / "model", tensors)
    _, plan, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W4A16"))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["config_groups"]["group_0"]["targets"] == ["encoder.fc1"]
    assert set(plan.dropped) == {"position_ids"} == set(tensors) - set(opened.names)
    assert torch.equal(opened.read("encoder.conv.weight"), tensors["encoder.conv.weight"].float())
    error = opened.read("encoder.fc1.weight") - tensors["encoder.fc1.weight"]
    steps = tensors["encoder.fc1.weight"].abs().amax(1, keepdim=True) / 7.5
    assert (error.abs() <= steps * 0.5001 + 1e-6).logical_or(error.abs() <= steps).all()


def test_fp8_sources_keep_what_is_not_quantized_as_bf16(tmp_path: Path) -> None:
    weight = torch.randn(32, 128)
    write_state_dict(
        tmp_path / "model",
        {
            "fc.weight": weight.to(torch.float8_e4m3fn),
            "fc.weight_scale_inv": torch.full((1, 1), 2.0),
            "lm_head.weight": weight.to(torch.float8_e4m3fn),
        },
        {"quantization_config": {"quant_method": "fp8"}},
    )
    _, _, opened = convert(tmp_path / "model", tmp_path / "out", make_target("W8A16"))
    assert {name: opened.stored(name)[0] for name in opened.names} == {
        "fc.weight": "int8 channel",
        "lm_head.weight": "BF16",
    }
    # Half a step of 2 * absmax / 127.5, and BF16's rounding of the scale.
    assert (opened.read("fc.weight") - 2 * weight.to(torch.float8_e4m3fn).float()).abs().max() < 2 * 5 / 127
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"


def test_small_files_travel_and_weights_and_cards_do_not(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_llama(model)
    (model / "processor").mkdir()
    for name in (
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        "processor/vocab.txt",
        "chat_template.jinja",
        ".hidden",
    ):
        (model / name).write_text("x")
    convert(model, tmp_path / "out", make_target("W4A16"))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    beside = {"generation_config.json", "tokenizer.json", "processor/vocab.txt", "chat_template.jinja"}
    assert found == {"config.json", "model.safetensors"} | beside
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((model / "config.json").read_text())


def test_a_second_conversion_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(llama, tmp_path / name, make_target("W4A16"))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("keep", [4, 300, -1])
def test_truncated_weights_are_a_source_error(keep: int, llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", make_target("W4A16"))
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError):
        CompressedTensors().open(tmp_path / "out", None)


def test_an_artifact_without_its_config_is_a_source_error(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "out", make_target("W4A16"))
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="quantization_config"):
        CompressedTensors().open(tmp_path / "out", None)
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json"):
        CompressedTensors().open(tmp_path / "out", None)


def test_the_writer_gives_the_bytes_of_the_safetensors_library(tmp_path: Path) -> None:
    dtypes = (torch.int8, torch.bfloat16, torch.float32, torch.int64, torch.float16, torch.int32, torch.uint8)
    tensors = {f"t{i}": torch.ones(i + 1, 3, dtype=dtype) for i, dtype in enumerate(dtypes)}
    names = ("I8", "BF16", "F32", "I64", "F16", "I32", "U8")
    entries = [[Entry(name=f"t{i}", dtype=dtype, shape=(i + 1, 3))] for i, dtype in enumerate(names)]
    plans = plan_files(entries, {"format": "pt"})
    with SafetensorsWriter(plans, tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    assert (tmp_path / "model.safetensors").read_bytes() == save(tensors, {"format": "pt"})


def test_shards_stay_below_their_limit_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    groups = [
        [Entry(name=f"{i}.a", dtype="F32", shape=(10,)), Entry(name=f"{i}.b", dtype="I8", shape=(5,))] for i in range(5)
    ]
    plans = plan_files(groups, {"format": "pt"}, shard_bytes=100)
    with SafetensorsWriter(plans, tmp_path) as writer:
        for group in groups:
            writer.write(group[0].name, torch.arange(10.0))
            writer.write(group[1].name, torch.ones(5, dtype=torch.int8))
    assert {plan.name: plan.size_bytes for plan in plans} == {
        path.name: path.stat().st_size for path in tmp_path.glob("*.safetensors")
    }
    assert len(plans) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 5 * 45
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], read_tensor(tmp_path, read_headers(tmp_path)[name]))
