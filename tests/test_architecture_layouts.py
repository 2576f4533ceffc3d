"""Checkpoints as hubs hold them: other names of tensors, older config.json, and what readers would compute wrongly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import gguf_models as tiny
from converter.containers.gguf import GGUF
from converter.errors import SourceError, UnsupportedError
from jobs.agreement import check_agreement
from llama_peer import Llama
from test_architectures import PROMPT, logits_of, tolerance
from tiny_families import few, tiny_models

TINY = tiny_models()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


@pytest.fixture(scope="module")
def made(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny models by name, each made once; nobody changes them."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            TINY[name].save(folders[name])
            tiny.save_tokenizer(tokenizer, folders[name], bos_token="<|endoftext|>", eos_token="<|im_end|>")
        return folders[name]

    return folder_of


@pytest.fixture
def save(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A folder of one's own with the tiny model of a name."""
    return lambda name: Path(shutil.copytree(made(name), tmp_path / "model"))


def gguf_of(folder: Path, out: Path) -> bytes:
    """The F32 file, without the commit that it says the model is from: a digest over files that tests rewrite."""
    tiny.write(folder, tiny.target("F32"), out)
    snapshot, _ = tiny.load(folder)
    return next(out.glob("*.gguf")).read_bytes().replace(snapshot.commit.encode(), b"")


def rename_tensors(folder: Path, renamed: Mapping[str, str]) -> None:
    """Let names that begin with a key begin with its value; what matches no key keeps its name."""
    path = folder / "model.safetensors"
    found = {}
    for name, tensor in load_file(path).items():
        start = next((start for start in renamed if name.startswith(start)), "")
        found[renamed.get(start, "") + name.removeprefix(start)] = tensor
    assert found.keys() != load_file(path).keys()
    save_file(found, path, metadata={"format": "pt"})


# A tiny model, and how names of its tensors begin as transformers saves them and as others do.
SPELLINGS: list[tuple[str, dict[str, str]]] = [
    ("gpt2", {"transformer.": ""}),  # the original GPT-2
    ("gpt2-untied", {"transformer.": ""}),
    ("gpt_neox", {"embed_out.": "lm_head."}),
    ("ernie4_5", {"model.": "ernie."}),
    ("qwen3", {"model.": ""}),  # Qwen3-Embedding, saved as the model inside
]


@pytest.mark.parametrize(("name", "renamed"), few(SPELLINGS, ("gpt_neox", "qwen3")))
def test_other_names_of_tensors_give_the_same_file(
    save: Callable[[str], Path], tmp_path: Path, name: str, renamed: dict[str, str]
) -> None:
    folder = save(name)
    expected = gguf_of(folder, tmp_path / "as-saved")
    rename_tensors(folder, renamed)
    assert gguf_of(folder, tmp_path / "renamed") == expected
    check_agreement(*tiny.load(folder), "renamed")


FALCON = ("num_attention_heads", "num_hidden_layers", "num_kv_heads", "new_decoder_architecture", "ffn_hidden_size")
RW = {
    "architectures": ["RWForCausalLM"],
    "n_head": 8,
    "n_layer": 2,
    "auto_map": {"AutoConfig": "modelling_RW.RWConfig"},
}

LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
YARN = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
OLMO3 = {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}

# A tiny model, and its config.json as older releases wrote it: keys that go, and keys that come in their place.
OLDER: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("gemma", ("rope_parameters",), {"hidden_act": "gelu", "hidden_activation": None, "rope_theta": 10000.0}),
    ("phi", ("rope_parameters",), {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_scaling": None}),
    (
        "phi3-long",
        ("rope_parameters",),
        {"rope_theta": 10000.0, "rope_scaling": {"type": "su", "short_factor": ..., "long_factor": ...}},
    ),
    ("starcoder2", ("rope_parameters",), {"rope_theta": 10000.0}),
    ("gpt2", (), {"n_ctx": 512}),
    ("gpt_neox", ("rope_parameters", "attention_bias"), {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    ("falcon-40b", (*FALCON, "multi_query"), {**RW, "model_type": "RefinedWeb", "n_head_kv": 2}),
    ("falcon", FALCON, {**RW, "model_type": "RefinedWebModel", "multi_query": True}),
    (
        "stablelm",
        ("rope_parameters", "layer_norm_eps"),
        {
            "architectures": ["StableLMEpochForCausalLM"],
            "model_type": "stablelm_epoch",
            "rope_pct": 0.25,
            "norm_eps": 1e-5,
            "rope_theta": 10000,
        },
    ),
    ("nemotron", ("rope_parameters", "head_dim"), {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
    ("olmo", ("rope_parameters",), {"rope_theta": 10000.0, "rope_scaling": None}),
    ("granite", ("rope_parameters",), {"rope_theta": 10000.0, "rope_scaling": None}),
    ("cohere", ("rope_parameters",), {"rope_theta": 500000.0}),
    ("cohere2", ("rope_parameters", "layer_types"), {"rope_theta": 10000.0, "sliding_window_pattern": 4}),
    ("glm", ("rope_parameters",), {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ("glm4", ("rope_parameters",), {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    ("smollm3", ("rope_parameters", "layer_types", "no_rope_layers"), {"rope_theta": 2000000.0}),
    (
        "exaone4",
        ("rope_parameters", "layer_types"),
        {"rope_theta": 1000000.0, "rope_scaling": {"rope_type": "llama3", **dict.fromkeys(LLAMA3, ...)}},
    ),
    ("exaone4-window", ("layer_types",), {"sliding_window_pattern": "LLLG"}),
    ("ernie4_5", ("rope_parameters",), {"rope_theta": 500000.0}),
    (
        "hunyuan_v1_dense",
        ("rope_parameters",),
        {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "alpha": ..., "factor": ...}},
    ),
    ("seed_oss", ("rope_parameters",), {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "default"}}),
    (
        "apertus",
        ("rope_parameters",),
        {"rope_theta": 12000000.0, "rope_scaling": {"rope_type": "llama3", **dict.fromkeys(LLAMA3, ...)}},
    ),
    (
        "arcee",
        ("rope_parameters",),
        {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **dict.fromkeys(YARN, ...)}},
    ),
    (
        "olmo2-olmo3",
        ("rope_parameters", "layer_types"),
        {"rope_theta": 500000.0, "rope_scaling": {"type": "yarn", "attention_factor": 1.2079441541679836, **OLMO3}},
    ),
]


@pytest.mark.parametrize(("name", "gone", "come"), few(OLDER, ("gemma", "cohere2")), ids=[name for name, _, _ in OLDER])
def test_an_older_config_gives_the_same_file(
    save: Callable[[str], Path], tmp_path: Path, name: str, gone: tuple[str, ...], come: dict[str, Any]
) -> None:
    folder = save(name)
    expected = gguf_of(folder, tmp_path / "as-saved")
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    kept = {key: value for key, value in config.items() if key not in gone}
    scaling = come.get("rope_scaling")
    if scaling:  # its lists are those of the config as saved
        come = come | {
            "rope_scaling": {
                key: config["rope_parameters"][key] if value is ... else value for key, value in scaling.items()
            }
        }
    path.write_text(json.dumps(kept | come), "utf-8")
    assert gguf_of(folder, tmp_path / "older") == expected
    if "layer_types" in config.keys() - gone or not name.startswith("exaone4"):
        check_agreement(*tiny.load(folder), "older")  # transformers reads it, too


# A tiny model, and a config value that readers of GGUF do not compute with.
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("gemma", {"hidden_act": "silu"}),
    ("gemma", {"tie_word_embeddings": False}),
    ("gemma", {"use_bidirectional_attention": True}),
    ("phi", {"hidden_act": "gelu"}),
    ("phi", {"qk_layernorm": True}),
    ("phi", {"tie_word_embeddings": True}),
    ("phi3", {"hidden_act": "gelu"}),
    ("phi3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("starcoder2", {"use_bias": False}),
    ("starcoder2", {"hidden_act": "gelu"}),
    ("gpt2", {"activation_function": "relu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt_neox", {"hidden_act": "relu"}),
    ("gpt_neox", {"attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True}),
    ("falcon", {"alibi": True}),
    ("falcon", {"bias": True}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"activation": "relu"}),
    ("stablelm", {"hidden_act": "gelu"}),
    ("stablelm", {"tie_word_embeddings": True}),
    ("nemotron", {"hidden_act": "relu"}),
    ("nemotron", {"tie_word_embeddings": True}),
    ("nemotron", {"head_dim": 64}),
    ("olmo", {"hidden_act": "gelu"}),
    ("olmo", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0}}),
    ("olmo2", {"hidden_act": "gelu"}),
    ("olmo2", {"attention_bias": True}),
    ("olmo2", {"tie_word_embeddings": True}),
    (
        "olmo2-olmo3",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
    ),
    ("granite", {"hidden_act": "gelu"}),
    ("granite", {"position_embedding_type": "nope"}),
    ("cohere", {"hidden_act": "gelu"}),
    ("cohere", {"attention_bias": True}),
    ("cohere", {"tie_word_embeddings": False}),
    ("cohere", {"use_qk_norm": True}),
    ("cohere", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    ("cohere2", {"layer_types": ["full_attention"] * 4}),
    ("cohere2", {"layer_types": None, "sliding_window_pattern": 2}),
    ("cohere2", {"use_qk_norm": True}),
    ("glm", {"hidden_act": "gelu"}),
    ("glm", {"head_dim": 64}),
    ("glm4", {"hidden_act": "gelu"}),
    ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("smollm3", {"use_sliding_window": True}),
    ("smollm3", {"mlp_bias": True}),
    ("smollm3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 2.0}}),
    ("exaone4", {"hidden_act": "gelu"}),
    ("exaone4", {"sliding_window": 48}),
    ("exaone4-window", {"sliding_window": None}),
    ("ernie4_5", {"use_bias": True}),
    ("hunyuan_v1_dense", {"use_qk_norm": False}),
    ("hunyuan_v1_dense", {"attention_bias": True}),
    ("seed_oss", {"attention_out_bias": True}),
    ("seed_oss", {"mlp_bias": True}),
    ("apertus", {"hidden_act": "silu"}),
    ("apertus", {"tie_word_embeddings": True}),
    ("arcee", {"hidden_act": "silu"}),
    ("arcee", {"mlp_bias": True}),
    ("qwen2", {"use_sliding_window": True}),
    ("qwen2", {"head_dim": 64}),
    ("qwen2_moe", {"head_dim": 64}),
    ("qwen2_moe", {"tie_word_embeddings": True}),
    ("olmo2", {"head_dim": 64}),
    ("lfm2", {"head_dim": 64}),
    ("cohere", {"head_dim": 64}),
    ("cohere2", {"head_dim": 64}),
    ("olmoe", {"head_dim": 64}),
    ("olmoe", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(
    ("name", "changes"),
    few(REFUSED, ("gemma", "gpt2", "cohere2")),
    ids=[f"{name}-{'-'.join(changes)}" for name, changes in REFUSED],
)
def test_what_readers_compute_otherwise_is_refused(
    save: Callable[[str], Path], name: str, changes: dict[str, Any]
) -> None:
    folder = save(name)
    snapshot, architecture = tiny.load(folder)
    GGUF.plan(snapshot, architecture, tiny.target("F32"))
    tiny.edit_config(folder, **changes)
    snapshot, architecture = tiny.load(folder)
    with pytest.raises(UnsupportedError, match=r"readers of GGUF compute|GGUF stores for"):
        GGUF.plan(snapshot, architecture, tiny.target("F32"))


# A tiny model, and what the plan says of it.
NOTED: list[tuple[str, str]] = [
    ("gpt_neox", "GELU with tanh"),
    ("falcon", "GELU with tanh"),
    ("phi3", "not the last 300 only"),
    ("starcoder2", "not the last 300 only"),
    ("phi3-long", "factors for long contexts"),
]


@pytest.mark.parametrize(("name", "said"), few(NOTED, ("falcon", "starcoder2")))
def test_what_readers_do_otherwise_is_said_in_the_plan(made: Callable[[str], Path], name: str, said: str) -> None:
    snapshot, architecture = tiny.load(made(name))
    notes = GGUF.plan(snapshot, architecture, tiny.target("F32")).notes
    assert sum(said in note for note in notes) == 1


def test_a_window_that_olmo2_knows_nothing_of_is_no_window(save: Callable[[str], Path], tmp_path: Path) -> None:
    folder = save("olmo2")
    expected = gguf_of(folder, tmp_path / "as-saved")
    tiny.edit_config(folder, sliding_window=48)
    assert gguf_of(folder, tmp_path / "stray") == expected


@pytest.mark.parametrize("name", few(["gpt_oss", "mistral-yarn", "deepseek_v3-yarn"], ("gpt_oss",)))
@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_bounds_of_yarns_ramp_that_are_not_whole_are_told(save: Callable[[str], Path], name: str, key: str) -> None:
    folder = save(name)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    tiny.edit_config(
        folder, **{"rope_parameters": None, "rope_theta": rope["rope_theta"], key: rope | {"truncate": False}}
    )
    snapshot, architecture = tiny.load(folder)
    (note,) = GGUF.plan(snapshot, architecture, tiny.target("F32")).notes
    assert "whole pairs" in note


@pytest.mark.parametrize(
    ("name", "fast", "slow"), few([("mistral-yarn", 8, 2), ("deepseek_v3-yarn", 1, 1)], ("mistral-yarn",))
)  # the latter are Kimi K2's
def test_readers_that_are_told_bounds_of_yarns_ramp_compute_with_them(
    save: Callable[[str], Path], tmp_path: Path, name: str, fast: int, slow: int
) -> None:
    folder = save(name)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    tiny.edit_config(folder, rope_parameters=rope | {"beta_fast": fast, "beta_slow": slow})
    plan = tiny.write(folder, tiny.target("F32"), tmp_path / "out")
    told = [f"--yarn-beta-fast {fast}"] + [f"--yarn-beta-slow {slow}"] * (slow != 1)
    assert [option in note for option, note in zip(told, plan.notes, strict=True)] == [True] * len(told)
    logits = logits_of(TINY[name].load(folder))[-1]
    expected = logits.log_softmax(-1)
    with Llama(next((tmp_path / "out").glob("*.gguf")), ramp=(fast, slow)) as reader:
        found = reader.next_logprobs(PROMPT)
    worst = max(abs(value - float(expected[token])) for token, value in found.items())
    assert worst < tolerance(TINY[name], logits)


INTERNLM2 = {
    "model.embed_tokens.": "model.tok_embeddings.",
    "lm_head.": "output.",
    ".self_attn.o_proj.": ".attention.wo.",
    ".mlp.gate_proj.": ".feed_forward.w1.",
    ".mlp.down_proj.": ".feed_forward.w2.",
    ".mlp.up_proj.": ".feed_forward.w3.",
    ".input_layernorm.": ".attention_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


def lay_out_as_internlm2(folder: Path) -> None:
    """Turn a Llama into the same model as InternLM2 stores it: by group its queries, its key, its value."""
    path, size = folder / "model.safetensors", 32  # rows of a head
    found = {}
    llama = load_file(path)
    for name, tensor in llama.items():
        ours = next((name.replace(old, new) for old, new in INTERNLM2.items() if old in name), name)
        if "q_proj" in name:
            rows = [llama[name.replace("q_proj", f"{part}_proj")].unflatten(0, (2, -1, size)) for part in "qkv"]
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(rows, 1).flatten(0, 2)
        elif "k_proj" not in name and "v_proj" not in name:
            found[ours] = tensor
    save_file(found, path, metadata={"format": "pt"})
    tiny.edit_config(folder, architectures=["InternLM2ForCausalLM"], model_type="internlm2", rope_theta=1e6, bias=False)
    scaling = {"type": "dynamic", "factor": 2.0}
    tiny.edit_json(folder / "config.json", rope_parameters=None, rope_scaling=scaling, attention_bias=None)


def test_llama_cpp_computes_from_internlm2_what_it_does_from_the_same_llama(
    save: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = save("internlm2")
    found = []
    for out in (tmp_path / "llama", tmp_path / "internlm2"):
        tiny.write(folder, tiny.target("F32"), out)
        with Llama(next(out.glob("*.gguf"))) as reader:
            found.append(reader.next_logprobs(list(range(300, 420))))
        if out.name == "llama":
            lay_out_as_internlm2(folder)
    assert found[0] == found[1]


@pytest.mark.parametrize("name", few(["internlm2", "apertus"], ("internlm2",)))
def test_a_file_read_back_gives_every_tensor_of_the_checkpoint(
    save: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder = save(name)
    if name == "internlm2":
        lay_out_as_internlm2(folder)
    snapshot, architecture = tiny.load(folder)
    plan = tiny.write(folder, tiny.target("F32"), tmp_path / "out")
    opened = GGUF.open(tmp_path / "out", architecture)
    assert set(opened.names) == set(snapshot.tensors)
    for tensor in opened.names:
        assert opened.read(tensor).equal(snapshot.read(tensor)), tensor
    assert {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()} == plan.files


def test_a_number_that_is_missing_is_said_in_the_plan(save: Callable[[str], Path]) -> None:
    folder = save("apertus")
    rename_tensors(folder, {"model.layers.1.mlp.act_fn.beta": "model.layers.1.mlp.act_fn.gamma"})
    snapshot, architecture = tiny.load(folder)
    with pytest.raises(SourceError, match=r"no tensor for model\.layers\.1\.mlp\.act_fn\.beta"):
        GGUF.plan(snapshot, architecture, tiny.target("F32"))
