"""llama.cpp loads what we write, computes what transformers computes with the decoded weights, and tokenizes alike."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import gguf_models as tiny
from converter.containers.gguf import GGUF
from llama_peer import Llama
from tiny_families import few

PROMPT = list(range(300, 420))  # long enough that the first and last position differ in every rotated pair
# What the reader does to activations before each product: nothing, to f16 or bf16 (11 and 8 significant bits: at most
# 2^-11 and 2^-8 of the value, over sqrt(3) in the mean square), or to int8 with one scale per block (half a step of
# amax/127; amax is about 3.5 times the root mean square over 256 values). All relative to the activation's size.
ACTIVATION_ERROR = {
    "F32": 2**-20,
    "F16": 2**-11 / math.sqrt(3),
    "BF16": 2**-8 / math.sqrt(3),
    "Q8_0": 3.5 / 254 / math.sqrt(3),
    "Q4_0": 3.5 / 254 / math.sqrt(3),
    "Q4_K_M": 3.5 / 254 / math.sqrt(3),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


@pytest.fixture(scope="module", params=few(tiny.FAMILIES, ("llama", "qwen3_moe")))
def model(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_model(folder, request.param)
    tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return folder


def decoded_model(folder: Path, artifact: Path) -> PreTrainedModel:
    """The transformers model of `folder` with the weights that the artifact decodes to."""
    _, architecture = tiny.load(folder)
    opened = GGUF.open(artifact, architecture)
    copy = artifact / "decoded"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    save_file({name: opened.read(name) for name in opened.names}, copy / "model.safetensors", {"format": "pt"})
    loaded, report = AutoModelForCausalLM.from_pretrained(
        copy, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"] and set(report["missing_keys"]) <= {"lm_head.weight"}
    return loaded.eval()


def ask_every_expert(model: Path, folder: Path) -> Path:
    """The model with every token going to all experts, where it has any: rounding must not change who is asked."""
    config = json.loads((model / "config.json").read_text("utf-8"))
    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        return model
    shutil.copytree(model, folder)
    tiny.edit_config(folder, num_experts_per_tok=count)
    return folder


def tolerance(type: str, logits: torch.Tensor, config: PretrainedConfig) -> float:
    """Four standard deviations of the noise that activation rounding leaves in a logit.

    Seven products in a layer and the head round their inputs; the errors are independent and add in squares. Gemma's
    GELU is looked up in a table of f16 by an f16, which adds two such errors a layer.
    """
    layers, gelu = config.num_hidden_layers, config.model_type.startswith("gemma")
    error = (7 * layers + 1) * ACTIVATION_ERROR[type] ** 2 + 2 * layers * gelu * ACTIVATION_ERROR["F16"] ** 2
    return 4 * math.sqrt(error) * float(logits.std())


@pytest.mark.parametrize("type", ACTIVATION_ERROR)
def test_llama_cpp_computes_what_transformers_does_with_the_decoded_weights(
    model: Path, type: str, tmp_path: Path
) -> None:
    if ACTIVATION_ERROR[type] > ACTIVATION_ERROR["BF16"]:
        model = ask_every_expert(model, tmp_path / "model")
    tiny.write(model, tiny.target(type), tmp_path)
    reference = decoded_model(model, tmp_path)
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPT])).logits[0, -1]
    expected = logits.log_softmax(-1)
    with Llama(next(tmp_path.glob("*.gguf"))) as reader:
        found = reader.next_logprobs(PROMPT, count=20)
    bound = tolerance(type, logits, reference.config)
    worst = max(abs(value - float(expected[token])) for token, value in found.items())
    assert len(found) == 20
    assert worst < bound, f"{worst} against {bound}"


def test_llama_cpp_does_without_the_window_of_which_the_plan_warns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny.save_model(folder, "mistral", sliding_window=48)
    tiny.save_tokenizer(tokenizer, folder)
    (said,) = tiny.write(folder, tiny.target("F32"), tmp_path / "out").notes
    assert "the last 48 only" in said
    with Llama(next((tmp_path / "out").glob("*.gguf"))) as reader:
        found = reader.next_logprobs(PROMPT, count=20)
    worst = {}
    for window in (None, 48):
        tiny.edit_config(folder, sliding_window=window)
        reference = decoded_model(folder, tmp_path / "out")
        with torch.no_grad():
            logits = reference(torch.tensor([PROMPT])).logits[0, -1]
        expected = logits.log_softmax(-1)
        worst[window] = max(abs(value - float(expected[token])) for token, value in found.items())
    bound = tolerance("F32", logits, reference.config)
    assert worst[None] < bound < 1000 * bound < worst[48]


def test_the_file_tokenizes_as_transformers_does(model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tiny.write(model, tiny.target("Q8_0"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf"))) as reader:
        assert reader.tokenize(tiny.HARD_TEXT) == tokenizer.encode(tiny.HARD_TEXT).ids


@pytest.mark.parametrize("scheme", ["always", "first", "never", "normalizer"])
def test_a_sentencepiece_tokenizer_tokenizes_as_transformers_does(scheme: str, tmp_path: Path) -> None:
    tokenizer = tiny.sentencepiece()
    if scheme != "normalizer":
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    folder = tmp_path / "model"
    tiny.save_model(folder, "llama", width=64, middle=64)
    tiny.save_tokenizer(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    notes = tiny.write(folder, tiny.target("F32"), tmp_path / "out").notes
    text = tiny.HARD_TEXT
    assert ["begins with one" in note for note in notes] == [True] * (scheme in ("always", "first"))
    assert ["follows a special" in note for note in notes] == [True] * (scheme == "first") + [False] * (
        scheme == "always"
    )
    if scheme in ("always", "first"):
        # SentencePiece, and llama.cpp, put a space before every stretch of text; Metaspace not where there is one
        # already, and with "first" not behind special tokens.
        text = text.replace("</s>", "").replace("<unk>", "")
    with Llama(next((tmp_path / "out").glob("*.gguf"))) as reader:
        assert reader.tokenize(text) == tokenizer.encode(text).ids


def test_a_tokenizer_like_gemmas_tokenizes_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = tiny.like_gemma()
    folder = tmp_path / "model"
    tiny.save_model(folder, "gemma2", width=64, middle=64, head_dim=8, query_pre_attn_scalar=8)
    tiny.save_tokenizer(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tiny.write(folder, tiny.target("F32"), tmp_path / "out")
    with Llama(next((tmp_path / "out").glob("*.gguf"))) as reader:
        for text in (tiny.HARD_TEXT, "a  b   c    d\n\ne\n\n\nf \n\n g", "  lead", "\n\nlead"):
            assert reader.tokenize(text) == tokenizer.encode(text).ids, text
