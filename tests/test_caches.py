"""Scales of keys and values: what calibration sees, what lies in the files, and what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny_families
from converter import manifest as manifests
from converter.adapt import adapt
from converter.architecture import find
from converter.blocks import Decoder
from converter.caches import KEYS, VALUES, CacheRounding
from converter.calibrate import calibrate_block
from converter.containers.compressed_tensors import CompressedTensors
from converter.containers.safetensors_file import read_headers, read_tensor
from converter.errors import UnsupportedError
from converter.manifest import Target
from converter.progress import JsonLines
from converter.schemes import CACHES
from converter.source import open_folder
from jobs.convert import Run, convert
from jobs.texts import text_rows
from small_run import write_manifest, write_model
from tiny_models import round_to_nearest, write_llama

TOKENS = torch.arange(48).reshape(2, 24)
LARGEST = {KEYS: torch.tensor([3.0, 1.5]), VALUES: torch.tensor([0.25, 2.0])}  # of two heads, as if they had been seen


def a_target(kv_cache: str, scheme: str = "W8A16", **fields: object) -> Target:
    return Target.model_validate(
        {"name": "t", "format": "compressed-tensors", "scheme": scheme, "kv_cache": kv_cache} | fields
    )


def written(model: Path, out: Path, target: Target) -> CompressedTensors:
    snapshot = open_folder(model, "test")
    architecture = find(snapshot.config, "test").fitted(snapshot.config, snapshot.tensors, "test")
    container = CompressedTensors()
    plan = container.plan(snapshot, architecture, target)
    out.mkdir()
    rounded = round_to_nearest(plan, snapshot)
    cached = {tensor.name: tensor.cached for tensor in plan.tensors}

    def parts(name: str) -> Mapping[str, Tensor]:
        one = cached[name]
        seen = (
            {tap: LARGEST[tap] if one.heads > 1 else LARGEST[tap].amax(0, keepdim=True) for tap in one.of}
            if one
            else {}
        )
        return {**rounded(name), **seen}

    container.write(plan, snapshot, architecture, target, parts, out)
    assert plan.files == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    opened = container.open(out, architecture)
    assert {tensor.name: tensor.size_bytes for tensor in plan.tensors} == {
        name: opened.stored(name)[1] for name in opened.names
    }
    return container


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, torch.float32)
    return folder


@pytest.mark.parametrize("kv_cache", CACHES)
def test_transformers_keeps_keys_and_values_as_our_simulation_does(kv_cache: str, llama: Path, tmp_path: Path) -> None:
    container = written(llama, tmp_path / "out", a_target(kv_cache))
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    said = QuantizationConfig.model_validate(settings).kv_cache_scheme
    assert said is not None and (said.num_bits, said.dynamic, said.symmetric) == (8, False, True)
    assert said.strategy == ("attn_head" if CACHES[kv_cache].by_head else "tensor")

    snapshot = open_folder(llama, "test")
    architecture = find(snapshot.config, "test").fitted(snapshot.config, snapshot.tensors, "test")
    opened = container.open(tmp_path / "out", architecture)
    decoder = Decoder(llama, architecture, "test", stored=snapshot.tensors)
    names = list(snapshot.tensors)
    hidden = plain = decoder.embed(TOKENS, {name: opened.read(name) for name in decoder.input_names})
    for block in range(decoder.blocks):
        prefix = architecture.prefix(block)
        tensors = {name.removeprefix(prefix): opened.read(name) for name in names if name.startswith(prefix)}
        rounding = opened.keeps(prefix)
        assert rounding is not None and len(rounding.keys) == len(rounding.values) == (
            2 if CACHES[kv_cache].by_head else 1
        )
        hidden = decoder.run_block(block, tensors, hidden, rounding=rounding)
        plain = decoder.run_block(block, tensors, plain)
    outer = {name: opened.read(name) for name in decoder.output_names}
    ours, without = decoder.logits(hidden, outer), decoder.logits(plain, outer)
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    # f32 on both sides; a key within an ulp of the middle between two codes may go to the other.
    assert (loaded - ours).norm() < 0.02 * (ours - without).norm()
    assert (ours - without).norm() > 1e-3 * without.norm()


def test_linears_that_keep_their_type_have_scales_beside_them_too(llama: Path, tmp_path: Path) -> None:
    target = a_target("FP8", rules={"self_attn": "F32"})
    container = written(llama, tmp_path / "out", target)
    headers = read_headers(tmp_path / "out")
    assert headers["model.layers.1.self_attn.v_scale"].shape == (1,)
    assert container.open(tmp_path / "out", None).keeps("model.layers.1.") is not None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.model.layers[0].self_attn.k_scale.item() == pytest.approx(3 / 448)


def test_artifacts_without_such_scales_say_so(llama: Path, tmp_path: Path) -> None:
    container = written(llama, tmp_path / "out", a_target("FP8").model_copy(update={"kv_cache": None}))
    assert container.open(tmp_path / "out", None).keeps("model.layers.0.") is None


def decoders() -> list[object]:
    quick = ("llama", "phi3", "gemma3", "lfm2", "gpt2", "deepseek_v3")
    return tiny_families.names_of("causal", quick=quick)


@pytest.mark.parametrize("name", decoders())
def test_keys_and_values_of_any_family_are_those_that_attention_hands_to_its_cache(name: str, tmp_path: Path) -> None:
    tiny = tiny_families.tiny_models()[name]
    model = tiny.save(tmp_path)
    rows = torch.arange(40).reshape(2, 20) + 5
    with torch.no_grad():
        layers = model(rows, use_cache=True).get("past_key_values")  # Mamba keeps something else
    snapshot = open_folder(tmp_path, name)
    snapshot, architecture = adapt(snapshot, find(snapshot.config, name), name)
    decoder = Decoder(tmp_path, architecture, name, stored=snapshot.tensors)

    def read(tensor: str) -> Tensor:
        return snapshot.read(tensor).float()

    hidden = decoder.embed(rows, {one: read(one) for one in decoder.input_names})
    seen_in = []
    for block in range(decoder.blocks):
        prefix = architecture.prefix(block)
        tensors = {one.removeprefix(prefix): read(one) for one in snapshot.tensors if one.startswith(prefix)}
        done = calibrate_block(decoder, block, tensors, hidden, watch_cache=True)
        hidden = done.hidden
        if KEYS in done.stats:
            seen_in.append(block)
            for tap, kept in ((KEYS, layers.layers[block].keys), (VALUES, layers.layers[block].values)):
                own = done.stats[tap].abs_max.reshape(kept.shape[1], kept.shape[3])
                torch.testing.assert_close(own, kept.abs().amax((0, 2)), rtol=1e-4, atol=1e-5)
    if name.partition("-")[0] in ("gpt2", "gpt_neox", "falcon", "mamba", "deepseek_v2", "deepseek_v3"):
        assert not seen_in  # readers look for other modules
        with pytest.raises(UnsupportedError, match="latent" if "deepseek" in name else "no module with k_proj"):
            CompressedTensors().plan(snapshot, architecture, a_target("FP8"))
    else:
        plan = CompressedTensors().plan(snapshot, architecture, a_target("FP8"))
        assert sorted({tensor.block for tensor in plan.tensors if tensor.cached}) == seen_in
        if len(seen_in) < decoder.blocks:
            assert any("keep no keys and values" in note for note in plan.notes)


def test_rounding_is_of_each_head_by_its_own_range() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    how = CACHES["INT8_HEAD"].how
    both = tuple(replace(how, lowest=-one, largest=one) for one in (0.5, 4.0))
    rounded, _ = CacheRounding(keys=both, values=both)(keys, values)
    assert (
        float(rounded[:, 0].abs().max()) <= 0.502 and float((rounded[:, 1] - keys[:, 1]).abs().max()) <= 4 / 127.5 / 2
    )
    assert torch.equal(values, values.clone())


def test_a_model_whose_heads_do_not_divide_its_rows_is_refused(llama: Path) -> None:
    snapshot = open_folder(llama, "test")
    architecture = find(snapshot.config, "test").fitted(snapshot.config, snapshot.tensors, "test")
    odd = replace(snapshot, config=dict(snapshot.config) | {"num_key_value_heads": 3})
    with pytest.raises(UnsupportedError, match="not those of 3 heads"):
        CompressedTensors().plan(odd, architecture, a_target("FP8_HEAD"))
    none = replace(snapshot, config=dict(snapshot.config) | {"num_key_value_heads": "two"})
    with pytest.raises(UnsupportedError, match="not a number of heads"):
        CompressedTensors().plan(none, architecture, a_target("FP8_HEAD"))
    with pytest.raises(UnsupportedError, match="readers have no scale"):
        CompressedTensors().plan(snapshot, None, a_target("FP8"))


TARGETS = {
    "plain": "{format: compressed-tensors, scheme: W8A16}",
    "fp8": "{format: compressed-tensors, scheme: W8A16, kv_cache: FP8}",
    "head": "{format: compressed-tensors, scheme: W8A16, kv_cache: FP8_HEAD, method: [awq, rtn]}",
    "chained": "{format: compressed-tensors, scheme: W8A16, kv_cache: INT8, method: gptq, propagate: quantized}",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Mapping[str, Mapping[str, object]]]:
    folder = tmp_path_factory.mktemp("kept")
    write_model(folder / "model")
    write_manifest(folder, TARGETS)
    run = Run(manifest=manifests.load(folder / "small.yaml"), out=folder / "out", executor="inprocess")
    result = convert(run, JsonLines())
    assert result.exit_code == 0
    return run, {row["target"]: row for row in result.rows}


def stored(run: Run, target: str, name: str) -> Tensor:
    folder = run.store.run / "model" / target
    return read_tensor(folder, read_headers(folder)[f"model.layers.0.self_attn.{name}"]).float()


def test_figures_show_what_rounded_keys_and_values_cost(
    finished: tuple[Run, Mapping[str, Mapping[str, dict[str, float]]]],
) -> None:
    rows = finished[1]
    assert rows["fp8"]["weight"] == rows["plain"]["weight"]
    assert rows["fp8"]["output"]["kl_mean"] > rows["plain"]["output"]["kl_mean"]


def test_values_follow_what_awq_folds_into_the_linear_that_makes_them(finished: tuple[Run, object]) -> None:
    run = finished[0]
    one, each = stored(run, "fp8", "v_scale"), stored(run, "head", "v_scale")
    assert one.shape == (1,) and each.shape == (2, 1, 1)
    assert torch.equal(stored(run, "head", "k_scale").amax(), stored(run, "fp8", "k_scale")[0])  # keys are not folded
    folder = run.store.run / "model" / "head"
    opened = CompressedTensors().open(folder, None)
    model = run.manifest.models[0].folder
    assert model is not None
    original = open_folder(model, "test")
    name = "model.layers.0.self_attn.v_proj.weight"
    norm = "model.layers.0.input_layernorm.weight"
    columns = opened.read(norm).float() / original.read(norm).float()  # the norm takes up what they give
    ratio = (opened.read(name) * columns).norm(dim=1) / original.read(name).float().norm(dim=1)
    assert float((ratio - 1).abs().max()) > 0.05  # it folded something
    architecture = find(original.config, "test").fitted(original.config, original.tensors, "test")
    decoder = Decoder(model, architecture, "test", stored=original.tensors)
    rows = text_rows(run.manifest.calibration, model, "model", run.store.downloads)
    hidden = decoder.embed(rows, {one: original.read(one).float() for one in decoder.input_names})
    tensors = block_tensors_of(original, list(original.tensors), "model.layers.0.")
    seen = calibrate_block(decoder, 0, tensors, hidden, watch_cache=True).stats[VALUES].abs_max
    expected = (seen * ratio).reshape(2, -1).amax(1) / 448
    torch.testing.assert_close(each.flatten(), expected, rtol=0.02, atol=0)  # ratios are of weights in 8 bits, and bf16
    assert not torch.allclose(each.flatten(), seen.reshape(2, -1).amax(1) / 448, rtol=0.02)


def block_tensors_of(opened: object, names: list[str], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): opened.read(name).float() for name in names if name.startswith(prefix)}  # type: ignore[attr-defined]
