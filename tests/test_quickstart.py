"""The quickstart as a user runs it, on embedded Ray; then every artifact in the hands of its real reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from converter.activations import quantize_inputs
from converter.containers.tables import CONTAINERS
from converter.schemes import TOKEN_INT8, Activations
from gguf_models import load
from llama_peer import Llama
from patience import PATIENCE_SECONDS
from small_run import ROOT

pytestmark = pytest.mark.ray
MODEL = ROOT / "manifests" / "quickstart" / "model"
TEXT = "def read(path: str) -> bytes:\n    with open(path, 'rb') as file:\n        return"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quickstart")
    folder = out / "manifests"
    folder.mkdir()
    (folder / "quickstart").symlink_to(ROOT / "manifests" / "quickstart")  # so that publishing stays in `out`
    (folder / "quickstart.yaml").write_bytes((ROOT / "manifests" / "quickstart.yaml").read_bytes())
    already = ("--assume-old", f"{sys.prefix}/.ready", f"VENV={sys.prefix}")  # the environment that runs this test
    command = ["make", *already, "convert", f"MANIFEST={folder / 'quickstart.yaml'}", f"ARGS=--out {out / 'out'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "out" / "quickstart"


@pytest.fixture(scope="module")
def rows(run: Path) -> dict[str, dict[str, Any]]:
    return {row["target"]: row for row in json.loads((run / "comparison.json").read_text())["artifacts"]}


def decoded_logits(run: Path, target: str, format: str, ids: Tensor, activations: Activations | None = None) -> Tensor:
    """transformers' logits [T, V] with the weights that our decoder reads from the artifact, in f32.

    activations rounds what every linear reads.
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    architecture = load(MODEL)[1]
    opened = CONTAINERS[format].open(run / "model" / target, architecture)
    state = {name: opened.read(name) for name in opened.names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    for module in model.modules():
        if activations and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (quantize_inputs(inputs[0], activations),))
    with torch.no_grad():
        logits: Tensor = model(ids).logits[0]
    return logits


@pytest.fixture(scope="module")
def ids() -> Tensor:
    found: Tensor = AutoTokenizer.from_pretrained(MODEL)(TEXT, return_tensors="pt")["input_ids"]
    return found


@pytest.mark.parametrize("target", ["q4-k-m", "q8-0"])
def test_llama_cpp_agrees_with_transformers_on_the_decoded_weights(run: Path, target: str, ids: Tensor) -> None:
    expected = torch.log_softmax(decoded_logits(run, target, "gguf", ids)[-1], -1)
    rounded = torch.log_softmax(decoded_logits(run, target, "gguf", ids, TOKEN_INT8)[-1], -1)
    with Llama(next((run / "model" / target).glob("*.gguf"))) as llama:
        assert llama.tokenize(TEXT) == ids[0].tolist()
        found = llama.next_logprobs(ids[0].tolist())
    tokens = list(found)
    # llama.cpp rounds what meets quantized weights to 8 bits, in blocks of 32 or 256 where we do it per token: two
    # samples of one noise, whose largest of 20 differ by less than three times. A wrong tensor moves whole nats.
    noise = (rounded - expected)[tokens].abs().max().item()
    assert noise < 0.5
    difference = max(abs(expected[token].item() - logprob) for token, logprob in found.items())
    assert difference < 3 * noise, (difference, noise)


@pytest.mark.parametrize("target", ["w4a16", "w8a8"])
def test_transformers_loads_the_safetensors_and_agrees_with_our_decoder(run: Path, target: str, ids: Tensor) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(run / "model" / target)
    with torch.no_grad():
        theirs = torch.log_softmax(loaded(ids).logits[0].float(), -1)
    ours = torch.log_softmax(decoded_logits(run, target, "compressed-tensors", ids), -1)
    kl = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    # The reader computes in bf16 (8 bits of mantissa), and rounds activations to int8 for w8a8; both were measured
    # below 1e-3 nats, while a swapped tensor gives whole nats.
    assert kl < 5e-3


def test_duckdb_reads_the_parquet(run: Path, rows: dict[str, dict[str, Any]]) -> None:
    path = str(run / "model" / "int8" / "model.parquet")
    [(parameters,)] = duckdb.sql(f"SELECT sum(num_params) FROM read_parquet('{path}')").fetchall()
    assert 8 * rows["int8"]["size_bytes"] / parameters == pytest.approx(rows["int8"]["bits_per_weight"])
    found = duckdb.sql(f"SELECT name, cosine FROM '{run}/tensors.parquet' WHERE target = 'int8'").fetchall()
    assert len(found) == 46, "4 blocks of 11 tensors, embedding and final norm"
    assert min(cosine for _, cosine in found) > 0.9999


def test_the_figures_are_plausible_and_in_order(rows: dict[str, dict[str, Any]]) -> None:
    assert {row["status"] for row in rows.values()} == {"done"}
    kl = {name: row["output"]["kl_mean"] for name, row in rows.items()}
    assert kl["q8-0"] < kl["q4-k-m"] < kl["int2"]
    assert kl["w8a8"] < kl["w4a16"] < kl["int2"]
    assert rows["int8"]["weight"]["cosine"] > 0.9999
    assert rows["int2"]["compression_ratio"] > 6


def test_the_published_folder_hub_holds_what_the_run_holds(run: Path, rows: dict[str, dict[str, Any]]) -> None:
    hub = run.parent / "hub"
    for target, row in rows.items():
        for item in row["files"]:
            published = hub / f"model-{target}" / item["path"]
            assert published.read_bytes() == (run / "model" / target / item["path"]).read_bytes()
