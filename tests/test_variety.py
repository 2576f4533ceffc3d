"""Whole runs on models of many kinds: every target measured, plausible, and read back by transformers alike.

The figures of the original and of the compressed-tensors artifacts are computed a second time with transformers' own
forward on the same tokens, which shares no code with ours.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from converter import manifest as manifests
from jobs.convert import Result, Run, convert
from jobs.texts import text_rows
from small_run import TARGETS, TOKENIZER, write_manifest
from tiny_families import few

SHAPE: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
WITHOUT_GGUF = {name: text for name, text in TARGETS.items() if "gguf" not in text}


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


def write(
    folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, shard_size: str = "50GB"
) -> Path:
    """A model with random weights, norms and biases that are not the usual ones, and the quickstart's tokenizer."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim == 1 else 0.08)
            parameter.copy_(parameter + noise if "norm" in name else noise)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def change(folder: Path, change_tensors: Callable[[dict[str, Tensor]], object], **settings: object) -> None:
    """Change a model's tensors, and add to its config.json."""
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))


def run(place: Path, targets: Mapping[str, str]) -> Result:
    manifest = manifests.load(write_manifest(place, targets))
    return convert(Run(manifest=manifest, out=place / "out", executor="inprocess"), Quiet())


def rows_of(place: Path) -> Tensor:
    """The tokens that the run was measured on."""
    manifest = manifests.load(place / "small.yaml")
    return text_rows(manifest.evaluation, place / "model", "model", place / "cache")


def log_probabilities(folder: Path, rows_NT: Tensor) -> Tensor:
    """What transformers makes of the model in a folder: [N, T - 1, V], for every token but the first."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[:, :-1].float() for row in rows_NT]).log_softmax(-1)


def check_figures(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Every figure is there, and in the order that bits dictate."""
    for row in rows.values():
        assert row["status"] == "done", row.get("error")
        figures = [row["bits_per_weight"], row["compression_ratio"], *row["weight"].values(), *row["output"].values()]
        assert all(isinstance(figure, float) and math.isfinite(figure) for figure in figures)
        assert row["output"]["kl_mean"] >= 0 and 0 <= row["output"]["top1_agreement"] <= 1
    cosine = {name: row["weight"]["cosine"] for name, row in rows.items()}
    divergence = {name: row["output"]["kl_mean"] for name, row in rows.items()}
    assert min(cosine[name] for name in cosine if "8" in name) > 0.9999
    assert cosine["w4a16"] > 0.995 and cosine["int2"] > 0.93
    assert max(divergence["int8"], divergence.get("w8a8", 0)) < divergence["w4a16"] < divergence["int2"]
    assert divergence["int8"] < 2e-3
    if "q8-0" in rows:
        assert divergence["q8-0"] < 2e-3 and divergence["q8-0"] <= divergence["q4-k-m"] < divergence["int2"]
        assert cosine["q4-k-m"] > 0.995


def check_run(place: Path, targets: Mapping[str, str] = TARGETS, *, by_transformers: bool = True) -> None:
    result = run(place, targets)
    assert result.failures == ()
    check_figures({row["target"]: row for row in result.rows})
    if not by_transformers:
        return
    table = json.loads((place / "out" / "small" / "comparison.json").read_text())
    rows_NT = rows_of(place)
    original = log_probabilities(place / "model", rows_NT)
    picked = original.gather(-1, rows_NT[:, 1:, None])
    assert table["sources"][0]["perplexity"] == pytest.approx(math.exp(-float(picked.double().mean())), rel=1e-3)
    for row in result.rows:
        if row["format"] == "compressed-tensors":
            theirs = log_probabilities(place / "out" / "small" / "model" / row["target"], rows_NT)
            divergence = float((original.exp() * (original - theirs)).sum(-1).mean())
            # The readers store what they decode in the model's own type, which ours does not round to once more.
            assert divergence == pytest.approx(row["output"]["kl_mean"], rel=0.1, abs=1e-4)


CONFIGS: Mapping[str, PretrainedConfig] = {
    "llama-biases": LlamaConfig(**SHAPE, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
    "llama3-rope": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama-wide-heads": LlamaConfig(**SHAPE, head_dim=32, tie_word_embeddings=False),
    "llama-odd-rows": LlamaConfig(
        **SHAPE | {"hidden_size": 72, "intermediate_size": 100}, head_dim=18, tie_word_embeddings=False
    ),
    "llama-rows-of-32": LlamaConfig(**SHAPE | {"hidden_size": 96, "intermediate_size": 176}, tie_word_embeddings=True),
    "llama-padded-vocabulary": LlamaConfig(**SHAPE | {"vocab_size": 4160}, tie_word_embeddings=False),
    "mistral-window": MistralConfig(**SHAPE, sliding_window=16),
    "qwen2-tied": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**SHAPE, tie_word_embeddings=False),
    "qwen3-one-block": Qwen3Config(**SHAPE | {"num_hidden_layers": 1}, head_dim=32, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**SHAPE, **GEMMA),
    "gemma3": Gemma3TextConfig(**SHAPE, **GEMMA),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
}
QUICK = ("llama-biases", "llama-odd-rows")


@pytest.mark.parametrize("name", few(CONFIGS, QUICK))
def test_a_model_of_any_family_and_shape_is_converted_and_read_alike(name: str, tmp_path: Path) -> None:
    write(tmp_path / "model", CONFIGS[name])
    targets = WITHOUT_GGUF if "gemma" in name or "odd" in name else TARGETS
    # transformers 5.23 fuses experts on load, which its converter does with decoded weights, not with int8 ones.
    check_run(tmp_path, {target: text for target, text in targets.items() if (name, target) != ("mixtral", "w8a8")})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types_in_several_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["llama-wide-heads"], dtype, "200KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    check_run(tmp_path)


@pytest.mark.slow
def test_buffers_that_old_checkpoints_carry_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["llama-wide-heads"])
    plain = load_file(folder / "model.safetensors").keys()
    extra = {f"model.layers.{b}.self_attn.rotary_emb.inv_freq": torch.rand(16) for b in range(2)}
    change(folder, lambda tensors: tensors.update(extra | {"model.position_ids": torch.arange(256)}))
    check_run(tmp_path)
    stored = load_file(tmp_path / "out" / "small" / "model" / "w8a8" / "model.safetensors").keys()
    assert not extra.keys() & stored and {name for name in stored if not name.endswith("_scale")} == plain


@pytest.mark.slow
def test_a_head_that_is_stored_is_used_even_where_config_ties_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", LlamaConfig(**SHAPE, tie_word_embeddings=True))
    head = torch.randn(4096, 64, generator=torch.Generator().manual_seed(7)).bfloat16() * 0.1
    change(folder, lambda tensors: tensors.update({"lm_head.weight": head}))
    check_run(tmp_path)


def test_experts_are_converted_one_by_one_also_those_that_no_token_reaches(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["mixtral"])

    def never_ask(tensors: dict[str, Tensor]) -> None:
        # A router that sees zeros finds all experts alike and takes the same two for every token.
        tensors["model.layers.0.post_attention_layernorm.weight"].zero_()

    change(folder, never_ask)
    targets = {name: TARGETS[name] for name in ("q8-0", "q4-k-m", "w4a16", "w8a8", "int8", "int2")}
    check_run(tmp_path, targets | {"mxfp4": "{format: gguf, type: MXFP4_MOE}"}, by_transformers=False)


@pytest.mark.slow
def test_types_that_need_importance_are_made_of_experts_that_no_token_reaches(tmp_path: Path) -> None:
    shape = SHAPE | {"hidden_size": 256, "intermediate_size": 256}
    folder = write(tmp_path / "model", MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=1))

    def average(tensors: dict[str, Tensor]) -> None:
        # A router's row that is the mean of the others is never the largest.
        router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
        router[3] = router[:3].float().mean(0).to(router.dtype)

    change(folder, average)
    method = {"rtn": "", "gptq": ", method: gptq"}
    targets = {name: f"{{format: gguf, type: IQ2_XXS, imatrix: true{more}}}" for name, more in method.items()}
    notes = {row["target"]: row["notes"] for row in run(tmp_path, targets).rows}
    name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    for note in (notes["rtn"][name], notes["gptq"][name]):
        assert note == "no calibration row reached it: statistics filled up to 256 with its layer's"


def to_fp8(tensors: dict[str, Tensor], rows: int, columns: int, ending: str) -> None:
    """Store the linears as fp8 with a scale for each block of rows x columns; rows of 0 mean one scale a row."""
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        height, width = weight.shape
        blocks = weight.reshape(height // rows, rows, width // (columns or width), columns or width)
        scale = blocks.abs().amax((1, 3)) / 448
        spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns or width, 1)
        tensors[name], tensors[name + ending] = (weight / spread).to(torch.float8_e4m3fn), scale


FP8 = {
    "rows": (1, 0, "_scale", {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}),
    "blocks": (32, 32, "_scale_inv", {"quant_method": "fp8", "weight_block_size": [32, 32]}),
}


@pytest.mark.parametrize("kind", few(FP8, ("blocks",)))
def test_fp8_checkpoints_are_multiplied_out_and_nothing_says_fp8_afterwards(kind: str, tmp_path: Path) -> None:
    rows, columns, ending, settings = FP8[kind]
    folder = write(tmp_path / "model", CONFIGS["llama-wide-heads"])
    change(folder, lambda tensors: to_fp8(tensors, rows, columns, ending), quantization_config=settings)
    check_run(tmp_path, by_transformers=False)
    results = tmp_path / "out" / "small" / "model"
    assert "quantization_config" not in json.loads((results / "int8" / "config.json").read_text())
    assert "scale_inv" not in (results / "int8" / "README.md").read_text()
    # transformers runs no fp8 here: the same values in bf16 are what its forward is asked about.
    plain = write(tmp_path / "plain", CONFIGS["llama-wide-heads"])
    change(plain, lambda tensors: tensors.update(multiplied_out(folder, rows, columns)))
    theirs = log_probabilities(plain, rows_of(tmp_path))
    ours = log_probabilities(results / "w8a8", rows_of(tmp_path))
    assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 2e-3


def multiplied_out(folder: Path, rows: int, columns: int) -> dict[str, Tensor]:
    stored = load_file(folder / "model.safetensors")
    found = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        scale = stored.get(f"{name}_scale", stored.get(f"{name}_scale_inv"))
        assert scale is not None
        wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns or stored[name].shape[1], 1)
        found[name] = (stored[name].float() * wide).bfloat16()
    return found


def zero_a_block(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if "layers.1" in name:
            tensors[name].zero_()


def dark_inputs(tensors: dict[str, Tensor]) -> None:
    """Inputs that are never seen or too small to square, in front of ordinary weights; a norm that lets one go."""
    tensors["model.layers.0.mlp.up_proj.weight"].mul_(1e-38)
    tensors["model.layers.1.self_attn.v_proj.weight"].mul_(1e-30)
    tensors["model.layers.1.input_layernorm.weight"][3] = 0


@pytest.mark.parametrize("damage", few([zero_a_block, dark_inputs], [dark_inputs]))
def test_weights_of_nothing_neither_fail_nor_spoil_the_rest(damage: Callable[..., None], tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["qwen2-tied"])
    change(folder, damage)
    check_run(tmp_path)


@pytest.mark.slow
def test_huge_outliers_are_stored_and_measured(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", CONFIGS["qwen2-tied"])

    def stretch(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
        tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = 1e4
        tensors["model.layers.1.self_attn.q_proj.weight"][3, 3] = -2000

    change(folder, stretch)
    result = run(tmp_path, TARGETS)
    assert result.failures == ()
    for row in result.rows:
        assert all(math.isfinite(figure) for figure in (*row["weight"].values(), *row["output"].values()))
        assert row["weight"]["cosine"] > 0.999


@pytest.mark.slow
def test_one_model_under_two_names_and_two_of_one_name(tmp_path: Path) -> None:
    write(tmp_path / "a" / "model", CONFIGS["qwen2-tied"])
    write(tmp_path / "b" / "model", CONFIGS["qwen3-one-block"])
    text = "name: small\nmodels:\n"
    text += "  - source: folder:a/model\n  - source: folder:b/model\n"
    text += "  - {source: folder:a/model, name: again, overrides: {w4a16: {group_size: 64}}}\n"
    text += "  - {source: folder:b/model, name: few, targets: [int8]}\ntargets:\n"
    text += "".join(f"  {name}: {TARGETS[name]}\n" for name in ("int8", "w4a16", "q8-0"))
    text += "exclude:\n  - {model: again, target: q8-0}\n"
    text += "calibration: {sequences: 2, length: 32}\nevaluation: {sequences: 2, length: 32}\n"
    (tmp_path / "small.yaml").write_text(text)
    manifest = manifests.load(tmp_path / "small.yaml")
    result = convert(Run(manifest=manifest, out=tmp_path / "out", executor="inprocess"), Quiet())
    assert result.failures == ()
    done = {f"{row['model']}/{row['target']}": row for row in result.rows}
    names = [f"{model}/{target}" for model in ("a-model", "b-model") for target in ("int8", "w4a16", "q8-0")]
    assert list(done) == [*names, "again/int8", "again/w4a16", "few/int8"]
    weights = {name: (tmp_path / "out" / "small" / name).rglob("model.*") for name in done}
    content = {name: b"".join(path.read_bytes() for path in sorted(paths)) for name, paths in weights.items()}
    assert content["a-model/int8"] == content["again/int8"] != content["b-model/int8"] == content["few/int8"]
    assert content["a-model/w4a16"] != content["again/w4a16"]
