"""Reordering: in every family blocks compute the same, ranges of groups fall, and evaluation finds the order again."""

# N rows, I in, O out.
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig

import gguf_models as tiny
from command import Command, hubmill
from converter import manifest as manifests
from converter.activations import quantize_inputs
from converter.architecture import Tap
from converter.blocks import Decoder
from converter.errors import NumericsError
from converter.methods import Block, Options
from converter.methods.reorder import reorder, restored
from converter.schemes import COMPRESSED_TENSORS_SCHEMES
from converter.stats import observe
from jobs.convert import Run, convert
from jobs.store import Store
from small_run import TOKENIZER, write_manifest, write_model
from test_run import Quiet
from tiny_families import names_of, tiny_models

__all__ = ["hubmill"]  # a fixture

TINY = tiny_models()
PROMPT = torch.arange(300, 364)[None]
# Those of the default suite: each is made otherwise.
QUICK = ("llama", "gpt2", "phi3", "mixtral", "deepseek_v3", "granitemoe", "lfm2", "bert", "apertus", "gpt_oss")
MIDDLES = {"middle": ("gate", "up")}
TAPS = (Tap(name="input", linears=("gate", "up")), Tap(name="middle", linears=("down",)))


@pytest.mark.parametrize("name", names_of("causal", "encoder", quick=QUICK))
def test_blocks_compute_the_same_and_the_order_is_found_again(name: str, tmp_path: Path) -> None:
    TINY[name].save(tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    if not architecture.middles:
        pytest.skip("no columns of this family can change places")
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    hidden = decoder.embed(PROMPT, {name: snapshot.read(name) for name in decoder.input_names})
    moved: set[str] = set()
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}
        readers = {
            tap.name: [name for one in tap.linears if (name := f"{one}.weight") in own] for tap in architecture.taps
        }
        widths = {tap: own[readers[tap][0]].shape[1] for tap in architecture.middles if readers[tap]}
        stats = {tap: observe(torch.randn(8, width), gram=False) for tap, width in widths.items()}
        given = Block(where="test", tensors=own, stats=stats, taps=architecture.taps, middles=architecture.middles)
        behind = decoder.run_block(b, own, hidden)
        ordered = reorder(given, {}, Options()).tensors
        changed = {name for name in own if not torch.equal(ordered[name], own[name])}
        moved |= {tap for tap in widths if changed & set(readers[tap])}
        change = decoder.run_block(b, ordered, hidden) - behind
        assert float(change.norm()) < 1e-5 * float((behind - hidden).norm())
        noisy = {
            name: value + 0.3 * value.std() * torch.randn_like(value)
            for name, value in ordered.items()
            if value.ndim == 2 and not name.endswith("norm.weight")
        }
        found = restored(given, ordered | noisy)
        assert all(torch.equal(found[name], own[name]) for name in own if name not in noisy)
        assert all(float((found[name] - own[name]).std()) < 0.35 * float(own[name].std()) for name in noisy)
        hidden = behind
    present = {tap.name for name in snapshot.tensors if (tap := architecture.tap_of(name))}
    assert moved == {tap for tap in architecture.middles if tap in present}


def gated(width: int = 256) -> tuple[Block, Tensor]:
    """A gated MLP whose middle has columns of very different size, and rows of it [N, I]."""
    random = torch.Generator().manual_seed(1)
    tensors = {f"{name}.weight": torch.randn(width, 64, generator=random) for name in ("gate", "up")}
    tensors["down.weight"] = torch.randn(64, width, generator=random)
    middle_NI = torch.randn(200, width, generator=random) * torch.randn(width, generator=random).exp()
    stats = {"middle": observe(middle_NI, gram=True)}
    return Block(where="block 0", tensors=tensors, stats=stats, taps=TAPS, middles=MIDDLES), middle_NI


def test_groups_hold_columns_of_like_range() -> None:
    block, middle_NI = gated()
    ordered = reorder(block, {}, Options())
    largest_I = ordered.stats["middle"].abs_max
    assert torch.equal(largest_I, middle_NI.abs().amax(0).sort(descending=True).values)
    order_I = middle_NI.abs().amax(0).argsort(descending=True, stable=True)
    again = observe(middle_NI[:, order_I], gram=True)
    assert ordered.stats["middle"].gram is not None and again.gram is not None
    torch.testing.assert_close(ordered.stats["middle"].gram, again.gram)
    inputs = COMPRESSED_TENSORS_SCHEMES["W8A8_GROUP"].activations
    assert inputs is not None

    def error(rows_NI: Tensor, weight_OI: Tensor) -> float:
        rounded_NI = quantize_inputs(rows_NI, replace(inputs, group_size=32))
        return float(((rounded_NI - rows_NI) @ weight_OI.T).square().mean())

    before = error(middle_NI, block.tensors["down.weight"])
    after = error(middle_NI[:, order_I], ordered.tensors["down.weight"])
    assert after < 0.7 * before
    given_NO = middle_NI.double() @ block.tensors["down.weight"].T.double()
    torch.testing.assert_close(middle_NI[:, order_I].double() @ ordered.tensors["down.weight"].T.double(), given_NO)


def test_without_statistics_it_is_refused() -> None:
    block, _ = gated()
    with pytest.raises(NumericsError, match=r"block 0 middle.*reorder needs activation statistics"):
        reorder(replace(block, stats={}), {}, Options())


def test_rows_that_are_not_to_be_told_apart_stay_where_they_are() -> None:
    block, _ = gated()
    alike = dict(block.tensors) | {"gate.weight": torch.ones(256, 64), "up.weight": torch.ones(256, 64)}
    same = replace(block, tensors=alike)
    found = restored(same, alike)
    assert all(torch.equal(found[name], alike[name]) for name in alike)


TARGETS = {
    "f32": "{format: gguf, type: F32, method: reorder}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8_GROUP, group_size: 32, method: [reorder, gptq]}",
    "turned": "{format: parquet, scheme: INT8, method: [rotation, reorder, gptq]}",
    "chain": "{format: parquet, scheme: INT8, method: [reorder, awq, gptq], propagate: quantized}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reordered")
    write_model(folder / "model")
    write_manifest(folder, TARGETS)
    run = Run(manifest=manifests.load(folder / "small.yaml"), out=folder, executor="inprocess")
    assert convert(run, Quiet()).exit_code == 0
    return folder


def test_runs_find_next_to_no_error_where_next_to_nothing_is_rounded(place: Path) -> None:
    store = Store(run=place / "small")
    records = [store.record(key) for key in store.done() if key.startswith("evaluate-")]
    assert len(records) == len(TARGETS)
    for record in records:
        # int8 errs by 1 % of a weight; in another order it would be more than all of it.
        assert all(tensor["relative_mse"] < 1e-3 for tensor in record["tensors"] if len(tensor["shape"]) == 2)
        assert all(
            tensor["output_relative_mse"] < 1e-3 for tensor in record["tensors"] if tensor["output_relative_mse"]
        )
    assert min(record["output"]["kl_mean"] for record in records) < 1e-6


def test_rows_and_columns_of_the_file_changed_places(place: Path) -> None:
    original = load_file(place / "model" / "model.safetensors")
    stored = load_file(place / "small" / "model" / "w8a8" / "model.safetensors")
    settings = json.loads((place / "small" / "model" / "w8a8" / "config.json").read_text())["quantization_config"]
    inputs = settings["config_groups"]["group_0"]["input_activations"]
    assert (inputs["strategy"], inputs["group_size"], inputs["dynamic"]) == ("group", 32, True)
    name = "model.layers.0.mlp.up_proj.weight"
    scales_OG = stored[f"{name}_scale"].float()
    first_OG = original[name].float().reshape(len(scales_OG), -1, 32).abs().amax(-1)
    same, sorted_too = (
        torch.corrcoef(torch.stack(pair))[0, 1]
        for pair in (
            (scales_OG.flatten(), first_OG.flatten()),
            (scales_OG.sort(0).values.flatten(), first_OG.sort(0).values.flatten()),
        )
    )
    assert float(same) < 0.5 and float(sorted_too) > 0.9


def test_what_cannot_be_reordered_is_refused_in_the_plan(tmp_path: Path, hubmill: Command) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=4096, hidden_size=64, state_size=8, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, tmp_path / "model" / name)
    write_manifest(tmp_path, {"int8": "{format: parquet, scheme: INT8, method: reorder}"})
    answer = hubmill("plan", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert answer.code == 3 and "no columns of the family mamba can change places. Leave reorder out" in answer.errors
    write_manifest(tmp_path, {"q4": "{format: gguf, type: Q4_0, method: reorder, imatrix: x.gguf}"})
    answer = hubmill("plan", tmp_path / "small.yaml", "--out", tmp_path / "out")
    assert answer.code == 2 and "imatrix file is of the model's own columns, and reorder moves them" in answer.errors
