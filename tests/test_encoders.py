"""Encoders, alone and with a decoder behind: their blocks, their files in llama.cpp, the quirks of checkpoints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, PreTrainedModel, RobertaConfig

import gguf_models as tiny
from converter.blocks import Decoder
from converter.containers.gguf import GGUF
from converter.errors import SourceError, UnsupportedError
from llama_peer import Llama
from seq2seq_peer import next_logits
from tiny_families import SHAPE, Tiny, disturb, names_of, tiny_models

TINY = tiny_models()
PROMPT = list(range(300, 420))
BEGUN = [2, *range(500, 530)]  # what the decoder has said when it is asked for more
F32_ERROR = 2**-20  # of a product, relative: f32 sums of some hundred values in another order
F16_ERROR = 2**-11 / math.sqrt(3)  # of a value looked up in a table of f16 by an f16, which are two such errors
ERF_ERROR = 4.8e-4  # the most that GELU by tanh, which llama.cpp computes, is from GELU by erf
Saved = tuple[Tiny, Path, PreTrainedModel]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


def save(name: str, tokenizer: Tokenizer, folder: Path) -> Saved:
    model = TINY[name].save(folder)
    tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return TINY[name], folder, model


@pytest.fixture(scope="module", params=names_of("encoder"))
def encoder(request: pytest.FixtureRequest, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(request.param, tokenizer, tmp_path_factory.mktemp(request.param))


def final_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        hidden: Tensor = model(torch.tensor([PROMPT])).last_hidden_state
    return hidden[0]


def tolerance(one: Tiny, values: Tensor) -> float:
    """Six standard deviations of the noise that rounding leaves in a value, so that none of 30 720 lies outside.

    At most sixteen products in a layer round what they read, and two activations are looked up; errors add in squares.
    Each layer of a decoder reads what the encoder ends with once more.
    """
    more = getattr(one.config, "num_decoder_layers", 0)
    layers = one.config.num_hidden_layers * max(1, more) + more
    erf = getattr(one.config, "hidden_act", "") == "gelu"
    error = 16 * layers * F32_ERROR**2 + layers * (2 * one.table_gelu * F16_ERROR**2 + erf * ERF_ERROR**2)
    return 6 * math.sqrt(error) * float(values.std())


def test_blocks_end_in_the_hidden_state_that_transformers_ends_with(encoder: Saved) -> None:
    _, folder, model = encoder
    snapshot, architecture = tiny.load(folder)
    decoder = Decoder(folder, architecture, "test", stored=snapshot.tensors)
    decoder.check({name: header.shape for name, header in snapshot.tensors.items()})
    rows = torch.tensor([PROMPT, PROMPT[::-1]])
    hidden = decoder.embed(rows, {name: snapshot.read(name) for name in decoder.input_names})
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}
        seen: list[Mapping[str, Tensor]] = []
        hidden = decoder.run_block(b, own, hidden, observe=partial(lambda all, _, taps: all.append(taps), seen))
        assert set(seen[0]) == {tap.name for tap in architecture.taps}
    final = decoder.final(hidden, {name: snapshot.read(name) for name in decoder.output_names})
    expected = final_of(model)
    assert final.shape == (2, *expected.shape)
    # transformers computes all of it by the same f32 operations, some of them in another order
    assert float((final[0] - expected).abs().max()) < 6 * math.sqrt(16 * decoder.blocks) * F32_ERROR


def test_llama_cpp_ends_with_the_hidden_state_of_transformers(encoder: Saved, tmp_path: Path) -> None:
    one, folder, model = encoder
    tiny.write(folder, tiny.target("F32"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf")), pooling="NONE") as reader:
        found = torch.tensor(reader.embeddings(PROMPT))
    expected = final_of(model)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < tolerance(one, expected)


@pytest.mark.parametrize("name", names_of("text"))
def test_an_encoder_cut_from_t5_ends_with_the_same_in_llama_cpp(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    one, folder, model = save(name, tokenizer, tmp_path / "model")
    tiny.write(folder, tiny.target("F32"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf")), pooling="NONE") as reader:
        found = torch.tensor(reader.embeddings(PROMPT))
    expected = final_of(model)
    assert float((found - expected).abs().max()) < tolerance(one, expected)


@pytest.mark.parametrize("name", names_of("seq2seq"))
def test_llama_cpp_continues_as_encoder_and_decoder_do(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    one, folder, model = save(name, tokenizer, tmp_path / "model")
    tiny.write(folder, tiny.target("F32"), tmp_path)
    with torch.no_grad():
        outcome = model(input_ids=torch.tensor([PROMPT]), decoder_input_ids=torch.tensor([BEGUN]))
    expected: Tensor = outcome.logits[0, -1]
    found = torch.tensor(next_logits(next(tmp_path.glob("*.gguf")), PROMPT, BEGUN))
    assert float((found - expected).abs().max()) < tolerance(one, expected)


@pytest.mark.parametrize("name", names_of("seq2seq"))
def test_a_file_of_two_stacks_gives_every_tensor_back(name: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    _, folder, _ = save(name, tokenizer, tmp_path / "model")
    tiny.write(folder, tiny.target("F32"), tmp_path)
    snapshot, architecture = tiny.load(folder)
    opened = GGUF.open(tmp_path, architecture)
    assert set(opened.names) == set(snapshot.tensors)
    assert {architecture.block_of(name) for name in snapshot.tensors} == {None, *range(architecture.blocks)}
    for tensor in opened.names:  # a norm that was scaled may be half a step off
        torch.testing.assert_close(opened.read(tensor), snapshot.read(tensor), rtol=2**-23, atol=0)


@pytest.fixture(scope="module")
def bert(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save("bert", tokenizer, tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("pooling", ["MEAN", "CLS", "LAST"])
def test_a_file_pools_as_the_model_says(bert: Saved, tmp_path: Path, pooling: str) -> None:
    _, folder, model = bert
    key = {"MEAN": "mean_tokens", "CLS": "cls_token", "LAST": "lasttoken"}[pooling]
    write_pooling(folder, {f"pooling_mode_{key}": True})
    tiny.write(folder, tiny.target("F32"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf")), pooling="UNSPECIFIED") as reader:
        found = torch.tensor(reader.embeddings(PROMPT))[0]
    hidden = final_of(model)
    expected = {"MEAN": hidden.mean(0), "CLS": hidden[0], "LAST": hidden[-1]}[pooling]
    assert float((found - expected).abs().max()) < tolerance(bert[0], hidden)


def write_pooling(folder: Path, settings: Mapping[str, Any]) -> None:
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_pooling_that_readers_lack_is_told(bert: Saved) -> None:
    _, folder, _ = bert
    write_pooling(folder, {"pooling_mode_max_tokens": True})
    snapshot, architecture = tiny.load(folder)
    assert any("do not pool by max" in note for note in GGUF.plan(snapshot, architecture, tiny.target("F32")).notes)
    write_pooling(folder, {"pooling_mode": "by_ear"})
    with pytest.raises(SourceError, match="pooling by_ear is not known"):
        GGUF.plan(snapshot, architecture, tiny.target("F32"))


def written(folder: Path, out: Path) -> list[tuple[str, bytes]]:
    """Name and bytes of every tensor that the model in `folder` becomes."""
    tiny.write(folder, tiny.target("Q8_0"), out)
    return [(tensor.name, tensor.data.tobytes()) for tensor in GGUFReader(next(out.glob("*.gguf"))).tensors]


def respelled(tensors: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        yield name, tensor


@pytest.mark.parametrize(
    "pairs",
    [
        [("^", "bert.")],
        [(r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")],
    ],
)
def test_older_names_of_the_same_tensors_give_the_same_bytes(
    tokenizer: Tokenizer, tmp_path: Path, pairs: list[tuple[str, str]]
) -> None:
    _, folder, _ = save("bert", tokenizer, tmp_path / "model")
    expected = written(folder, tmp_path / "first")
    renamed = dict(respelled(load_file(folder / "model.safetensors"), pairs))
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    assert written(folder, tmp_path / "second") == expected


def test_the_head_that_guesses_masked_words_is_left_out(tokenizer: Tokenizer, tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(**SHAPE)).save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tokenizer, tmp_path / "model")
    plan = tiny.write(tmp_path / "model", tiny.target("Q4_K_M"), tmp_path)
    assert plan.dropped
    assert {name.split(".")[0] for name in plan.dropped} == {"cls"}
    with Llama(next(tmp_path.glob("*.gguf")), pooling="NONE") as reader:
        assert len(reader.embeddings(PROMPT)) == len(PROMPT)


def test_a_reranker_scores_as_in_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = SHAPE | {"pad_token_id": 1, "type_vocab_size": 1, "num_labels": 1, "hidden_act": "gelu_new"}
    model = AutoModelForSequenceClassification.from_config(RobertaConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            disturb(parameter)
        expected = float(model(torch.tensor([PROMPT])).logits[0, 0])
    model.save_pretrained(tmp_path / "model")
    tiny.save_tokenizer(tokenizer, tmp_path / "model")
    tiny.write(tmp_path / "model", tiny.target("F32"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf")), pooling="RANK") as reader:
        found = reader.embeddings(PROMPT)[0][0]
    # as in `tolerance`: two layers, whose activations are looked up, and a head of one, on values of about 1
    assert abs(found - expected) < 6 * math.sqrt(4 * F16_ERROR**2 + 33 * F32_ERROR**2)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"position_embedding_type": "relative_key"}),
        ("bert", {"is_decoder": True}),
        ("roberta", {"pad_token_id": 0}),
        ("t5", {"feed_forward_proj": "gated-silu"}),
        ("t5", {"relative_attention_max_distance": 64}),
        ("t5", {"num_layers": 1, "num_decoder_layers": 2}),
    ],
)
def test_what_readers_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    _, folder, _ = save(name, tokenizer, tmp_path)
    tiny.edit_config(folder, **changes)
    snapshot, architecture = tiny.load(folder)
    with pytest.raises(UnsupportedError, match="readers of GGUF compute"):
        GGUF.plan(snapshot, architecture, tiny.target("F32"))


def test_a_classifier_over_the_pooler_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_config(BertConfig(**SHAPE))
    model.save_pretrained(tmp_path)
    tiny.save_tokenizer(tokenizer, tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    with pytest.raises(UnsupportedError, match=r"classifier\.(bias|weight), which has no place in GGUF's bert"):
        GGUF.plan(snapshot, architecture, tiny.target("F32"))
