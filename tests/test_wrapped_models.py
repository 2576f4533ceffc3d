"""Models of pictures and text: GGUF takes the language model alone, other formats keep every tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    LlavaConfig,
    Mistral3Config,
    PretrainedConfig,
    PreTrainedModel,
)

import gguf_models as tiny
from command import Command, hubmill
from converter.architecture import find
from converter.containers.gguf import header
from converter.errors import UnsupportedError
from tiny_families import few

__all__ = ["hubmill"]  # a fixture

TEXT: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
CONFIGS: Mapping[str, PretrainedConfig] = {
    "gemma3": Gemma3Config(
        text_config=TEXT | {"model_type": "gemma3_text", "query_pre_attn_scalar": 32},
        vision_config=SIGHT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=1000,
    ),
    "llama": LlavaConfig(
        text_config=TEXT | {"model_type": "llama"},
        vision_config=SIGHT | {"model_type": "clip_vision_model"},
        image_token_index=1000,
    ),
    "mistral": Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"},
        vision_config=SIGHT | {"model_type": "pixtral", "head_dim": 32},
        image_token_index=1000,
    ),
}
ROWS = torch.arange(300, 340)[None]


@pytest.fixture(scope="module", params=few(CONFIGS, ("gemma3",)))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The family of the language model, and the folder of the whole."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[request.param], dtype=torch.float32)
    model.save_pretrained(folder)
    tiny.save_tokenizer(tiny.byte_level(), folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return request.param, folder


def convert(folder: Path, out: Path, target: str, hubmill: Command) -> Path:
    """The artifact of one target of the model in `folder`."""
    manifest = out / "one.yaml"
    manifest.write_text(
        f"name: run\nmodels:\n  - source: folder:{folder}\ntargets:\n  one: {{{target}}}\n"
        "calibration: {sequences: 2, length: 32}\nevaluation: {sequences: 2, length: 32}\n"
    )
    answer = hubmill("convert", manifest, "--out", out, "--executor", "inprocess", "--json")
    assert answer.code == 0, answer.errors + answer.output
    return out / "run" / "model" / "one"


def loaded(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def test_the_plan_lists_what_is_not_text_as_left_out(saved: tuple[str, Path], hubmill: Command) -> None:
    family, folder = saved
    answer = hubmill("plan", folder, "--json")
    assert answer.code == 0, answer.errors
    found = json.loads(answer.output)
    assert found["family"] == family and found["blocks"] == 2
    left_out = {one["tensors"]: one["reason"] for one in found["dropped"]}
    assert len(left_out) == 2 and set(left_out.values()) == {"it is for pictures"}, left_out
    assert any("vision_tower" in part for part in left_out)
    assert any("multi_modal_projector" in part for part in left_out)


def test_gguf_is_that_of_the_language_model_alone(saved: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = saved
    whole = loaded(folder)
    config = whole.config.get_text_config()
    config.tie_word_embeddings = whole.config.tie_word_embeddings
    text = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.save_pretrained(tmp_path / "text")
    tiny.save_tokenizer(tiny.byte_level(), tmp_path / "text", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    written = []
    for name, source in (("alone", tmp_path / "text"), ("wrapped", folder)):
        tiny.write(source, tiny.target("Q8_0"), tmp_path / name)
        path = next((tmp_path / name).glob("*.gguf"))
        head = header.read_head(path)
        written.append((list(head.tensors.values()), path.read_bytes()[head.data_start :]))
    assert written[0] == written[1]


def test_tables_hold_every_tensor(saved: tuple[str, Path], tmp_path: Path, hubmill: Command) -> None:
    _, folder = saved
    artifact = convert(folder, tmp_path, "format: parquet, scheme: INT8", hubmill)
    names = duckdb.sql(f"select distinct layer_name from '{artifact}/*.parquet'").fetchall()
    assert {name for (name,) in names} == set(load_file(folder / "model.safetensors"))
    assert (artifact / "config.json").read_text() == (folder / "config.json").read_text()


def test_transformers_loads_the_whole_with_its_language_model_quantized(
    saved: tuple[str, Path], tmp_path: Path, hubmill: Command
) -> None:
    _, folder = saved
    artifact = convert(folder, tmp_path, "format: compressed-tensors, scheme: W8A16", hubmill)
    config = json.loads((artifact / "config.json").read_text())
    del config["quantization_config"]
    assert config == json.loads((folder / "config.json").read_text())
    original, model = loaded(folder), loaded(artifact)
    for part in ("vision_tower", "multi_modal_projector"):
        theirs = model.model.get_submodule(part).state_dict()
        for name, tensor in original.model.get_submodule(part).state_dict().items():
            assert torch.equal(theirs[name], tensor), name
    with torch.no_grad():
        expected, found = original(ROWS).logits, model(ROWS).logits
    # Weights are off by at most half a step of 127 in the largest of a row, so outputs by a few percent at most.
    assert 0 < float((found - expected).norm() / expected.norm()) < 0.05


def test_a_wrapper_of_another_language_model_is_not_taken_for_a_known_one() -> None:
    config = {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "opt"}}
    with pytest.raises(UnsupportedError, match="LlavaForConditionalGeneration with a language model of type 'opt'"):
        find(config, "test")
