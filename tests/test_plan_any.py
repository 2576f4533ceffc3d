"""`hubmill plan` on a model, without a manifest: what can be made of it, and all that stands against it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import gguf_models as tiny
from bad_models import REFUSED, add_tokens, pickle_weights
from command import Answer, Command, hubmill
from converter.usual import FAMILIES, SWITCHES, is_usual
from hub_server import HubServer, hub_server
from patience import PATIENCE_SECONDS
from small_run import ROOT, write_model
from tiny_families import few, tiny_models

__all__ = ["hub_server", "hubmill"]  # fixtures

FORMATS = ("gguf", "compressed-tensors", "parquet")
# A file whose metadata lack general.quantization_version, its key's length, type and value, and the padding behind.
UNQUANTIZED_HEAD_BYTES = 64
# What the tokenizer's damages say where a text is tokenized; here GGUF's own reading of it says so in other words.
OF_TEXT = {"no tokenizer", "broken tokenizer", "tokenizer of another kind", "tokenizer larger than the embedding"}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny.save_model(folder, attention_bias=False, rope_parameters=None)
    tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model that may be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("small") / "model")


def read(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.output)
    return found


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def test_a_sound_model_can_become_every_format(llama: Path, hubmill: Command) -> None:
    answer = hubmill("plan", llama, "--json")
    found = read(answer)
    assert (answer.code, answer.errors, found["problems"]) == (0, "", [])
    stored = load_file(llama / "model.safetensors")
    assert found["family"] == found["gguf_architecture"] == "llama" and found["blocks"] == 2
    assert found["parameters"] == sum(tensor.numel() for tensor in stored.values())
    assert found["bytes"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["types"] == {"F32": len(stored)} and found["dropped"] == []
    assert found["tokenizer"] == {"model": "gpt2", "pre": "qwen2", "tokens": 1024}
    assert all(found["formats"][name]["possible"] and found["formats"][name]["bytes"] for name in FORMATS)
    shown = hubmill("plan", llama)
    assert shown.code == 0 and "llama, 2 blocks" in shown.output and "pre-tokenizer qwen2" in shown.output


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M", "F16"])
def test_the_size_that_is_told_is_that_of_the_file(type: str, llama: Path, tmp_path: Path, hubmill: Command) -> None:
    told = read(hubmill("plan", llama, "--json"))["formats"]["gguf"]["bytes"][type]
    tiny.write(llama, tiny.target(type), tmp_path)
    (path,) = tmp_path.glob("*.gguf")
    assert 0 <= told - path.stat().st_size <= (UNQUANTIZED_HEAD_BYTES if type == "F16" else 0)


def test_a_manifest_is_still_planned_as_one(small: Path, tmp_path: Path, hubmill: Command) -> None:
    (tmp_path / "own.yaml").write_text(
        f"name: own\nmodels:\n  - source: folder:{small}\ntargets:\n  int8: {{format: parquet, scheme: INT8}}\n"
        "calibration: {sequences: 2, length: 32}\nevaluation: {sequences: 2, length: 32}\n"
    )
    answer = hubmill("plan", tmp_path / "own.yaml", "--json")
    assert answer.code == 0, answer.errors
    assert [job["job"] for job in read(answer)["jobs"]] == ["model/int8"]


def test_a_model_on_a_hub_is_planned_without_its_weights(
    small: Path, tmp_path: Path, hub_server: HubServer, hubmill: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub_server.url)
    template = f"{hub_server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    commit = hub_server.add("owner/small", {path.name: path.read_bytes() for path in small.iterdir()})
    answer = hubmill("plan", "hub:owner/small", "--out", tmp_path, "--json")
    assert answer.code == 0, answer.errors
    assert (read(answer)["commit"], read(answer)["family"]) == (commit, "qwen3")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_is_gguf_becomes_gguf_only(llama: Path, tmp_path: Path, hubmill: Command) -> None:
    tiny.write(llama, tiny.target("F16"), tmp_path)
    for named in (tmp_path, next(tmp_path.glob("*.gguf"))):
        answer = hubmill("plan", named, "--json")
        found = read(answer)
        assert (answer.code, found["family"], found["tokenizer"]["pre"]) == (0, "llama", "qwen2")
        assert {name: entry["possible"] for name, entry in found["formats"].items()} == {
            "gguf": True,
            "compressed-tensors": False,
            "parquet": False,
        }


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_manifest_refuses_is_refused_without_one(
    name: str, small: Path, tmp_path: Path, hubmill: Command
) -> None:
    damage, expected = REFUSED[name]
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    damage(folder)
    answer = hubmill("plan", folder, "--json")
    assert answer.code == 3, answer.output
    assert all(line.endswith(".") for line in answer.errors.splitlines())
    assert name in OF_TEXT or re.search(expected, answer.errors), answer.errors
    assert not any(entry["possible"] for entry in read(answer)["formats"].values()) or name in OF_TEXT


def test_all_problems_are_told_at_once(copy: Path, hubmill: Command) -> None:
    change(copy, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    change(copy, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    longrope = {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
    tiny.edit_json(copy / "config.json", hidden_act="gelu", rope_parameters=longrope)
    (copy / "tokenizer.json").write_text("{")
    answer = hubmill("plan", copy)
    assert answer.code == 3
    for told in (
        r"missing mlp\.up_proj\.weight",
        r"holds model\.extra\.weight, which has no place",
        r"hidden_act to 'gelu'",
        r"rope scaling 'longrope'",
        r"tokenizer\.json: broken",
    ):
        assert re.search(told, answer.errors), answer.errors


def test_missing_and_extra_tensors_are_grouped(copy: Path, hubmill: Command) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        for b in range(2):
            del tensors[f"model.layers.{b}.mlp.up_proj.weight"]
            tensors[f"model.layers.{b}.mlp.new_proj.weight"] = torch.ones(2, 2)

    change(copy, edit)
    answer = hubmill("plan", copy)
    assert answer.code == 3
    wrong = r"block 0 to 1: .*: missing mlp\.up_proj\.weight, unexpected mlp\.new_proj\.weight\."
    assert re.search(wrong, answer.errors), answer.errors
    assert re.search(r"holds model\.layers\.\{0 to 1\}\.mlp\.new_proj\.weight, which has no place", answer.errors)


def test_an_unknown_architecture_is_named_beside_the_nearest_one(copy: Path, hubmill: Command) -> None:
    tiny.edit_json(copy / "config.json", architectures=["LlamoForCausalLM"])
    change(copy, lambda tensors: tensors.update({"model.layers.0.self_attn.gate.weight": torch.ones(2, 2)}))
    answer = hubmill("plan", copy, "--json")
    found = read(answer)
    assert answer.code == 3 and found["family"] is None
    possible = {name: entry["possible"] for name, entry in found["formats"].items()}
    assert possible == {"gguf": False, "compressed-tensors": True, "parquet": True}
    (said,) = answer.errors.splitlines()
    for told in ("LlamoForCausalLM", "LlamaForCausalLM", "docs/adding-an-architecture.md"):
        assert told in said
    assert re.search(r"9 of the 10 modules of its blocks are named as in llama; .* say what self_attn\.gate are", said)
    assert "XLMRobertaModel" not in said  # the list of all families would hide what matters


@pytest.mark.parametrize(
    ("name", "kind", "near"),
    [
        ("Qwen3ForSequenceClassification", "qwen3", "Qwen3ForCausalLM"),  # by the family, not by the head
        ("ViTForImageClassification", "vit", None),
    ],
)
def test_the_nearest_architecture_is_one_of_a_family_alike(
    name: str, kind: str, near: str | None, copy: Path, hubmill: Command
) -> None:
    tiny.edit_json(copy / "config.json", architectures=[name], model_type=kind)
    found = re.search(r"The nearest known one is (\w+)", hubmill("plan", copy).errors)
    assert (found and found[1]) == near


def test_a_config_without_architectures_is_of_the_family_of_its_type(copy: Path, hubmill: Command) -> None:
    tiny.edit_json(copy / "config.json", architectures=None)
    answer = hubmill("plan", copy, "--json")
    assert answer.code == 0 and read(answer)["family"] == "llama", answer.errors


def test_what_every_block_would_lose_is_one_line(copy: Path, hubmill: Command) -> None:
    names = [f"model.layers.{b}.self_attn.rotary_emb.inv_freq" for b in range(2)]
    change(copy, lambda tensors: tensors.update({name: torch.ones(16) for name in names}))
    (left_out,) = read(hubmill("plan", copy, "--json"))["dropped"]
    assert (left_out["tensors"], left_out["count"]) == ("model.layers.*.self_attn.rotary_emb.inv_freq", 2)


def test_a_reason_is_told_once_and_small_models_have_parameters(copy: Path, hubmill: Command) -> None:
    assert "1.64 million parameters" in hubmill("plan", copy).output
    tiny.edit_json(copy / "config.json", num_key_value_heads=4)
    shown = hubmill("plan", copy).output
    assert shown.count("fetch both again") == 1 and shown.count("as gguf") == 2


def test_blocks_that_predict_further_tokens_are_listed_as_left_out(copy: Path, hubmill: Command) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        own = [name for name in tensors if name.startswith("model.layers.1.")]
        tensors.update({name.replace("layers.1.", "layers.2."): tensors[name].clone() for name in own})

    change(copy, edit)
    tiny.edit_json(copy / "config.json", num_nextn_predict_layers=1)
    answer = hubmill("plan", copy, "--json")
    (left_out,) = read(answer)["dropped"]
    assert answer.code == 0, answer.errors
    assert (left_out["tensors"], left_out["count"]) == ("model.layers.2.*", 9) and "MTP" in left_out["reason"]
    assert "model.layers.2.*" in hubmill("plan", copy).output


def test_a_vocabulary_larger_than_the_embedding_is_told(small: Path, tmp_path: Path, hubmill: Command) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    add_tokens(folder)
    answer = hubmill("plan", folder)
    assert answer.code == 3
    assert re.search(r"the tokenizer has 4093 tokens, and the embedding 100 rows", answer.errors), answer.errors


def test_an_adapter_is_refused(copy: Path, hubmill: Command) -> None:
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    (copy / "adapter_config.json").write_text("{}")
    answer = hubmill("plan", copy)
    assert answer.code == 3 and "this is an adapter, not a model. Merge it" in answer.errors
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    answer = hubmill("plan", copy)
    assert "not a model: it goes with owner/base. Merge it" in answer.errors and "('owner/base')" in answer.errors
    assert "what can be made" not in answer.output  # an empty table


def test_a_pipeline_for_pictures_is_told_as_one(tmp_path: Path, hubmill: Command) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_file({"conv.weight": torch.ones(3, 3)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    answer = hubmill("plan", tmp_path)
    assert answer.code == 3 and "a pipeline (StableDiffusionPipeline) of several models (unet)" in answer.errors


def test_pickled_weights_hide_no_other_problem(small: Path, tmp_path: Path, hubmill: Command) -> None:
    folder = Path(shutil.copytree(small, tmp_path / "model"))
    pickle_weights(folder)
    (folder / "tokenizer.json").write_text("{")
    answer = hubmill("plan", folder)
    assert answer.code == 3
    assert "weights are pickled" in answer.errors and "tokenizer.json: broken" in answer.errors


USUAL = {name: one for name, one in tiny_models().items() if one.family in FAMILIES and one.kind == "causal"}


@pytest.mark.parametrize("name", few(USUAL, ("llama", "qwen3_moe")))
def test_the_usual_tensors_are_those_that_transformers_builds(name: str, tmp_path: Path) -> None:
    USUAL[name].save(tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    config, tensors = dict(snapshot.config), dict(snapshot.tensors)
    usual = is_usual(architecture, config, tensors)
    assert usual or name != USUAL[name].family or any(config.get(key) for key in SWITCHES)  # variants may have more
    for left_out in tensors:
        others = {other: header for other, header in tensors.items() if other != left_out}
        assert not is_usual(architecture, config, others) or left_out == f"{architecture.head}.weight"
    for key, value in config.items():
        if type(value) is int and key.endswith(("size", "heads", "experts", "head_dim", "rank", "layers")):
            idle = IDLE | IDLE_IN.get(architecture.name, set())
            assert not is_usual(architecture, config | {key: 2 * value + 1}, tensors) or key in idle


# Keys that say nothing of a block's tensors; how many blocks there are is the fitted architecture's to say.
IDLE = {"attention_chunk_size", "max_window_layers", "num_hidden_layers", "num_nextn_predict_layers", "pretraining_tp"}
IDLE_IN = {"deepseek_v3": {"head_dim", "num_key_value_heads", "qk_head_dim"}, "qwen3_moe": {"intermediate_size"}}


def test_a_plan_of_a_usual_model_imports_no_transformers(llama: Path) -> None:
    code = (
        "import sys; from converter import cli; sys.argv = ['hubmill', 'plan', sys.argv[1]]\n"
        "try: cli.main()\n"
        "except SystemExit as end: print(end.code, 'transformers' in sys.modules, 'ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(llama)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True)
    assert done.stdout.splitlines()[-1] == "0 False False"
