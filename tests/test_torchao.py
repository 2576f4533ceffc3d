"""torchao's int8: transformers loads what is written of every family with torchao, and both compute what we say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gguf_models as tiny
from converter.activations import quantize_inputs
from converter.containers.tables import CONTAINERS
from converter.errors import UnsupportedError
from converter.manifest import Target
from converter.schemes import SCHEMES
from test_safetensors_formats import TOKENS, convert, decoded, make_target, settings_of
from tiny_families import MODELS, few, tiny_models
from tiny_models import round_to_nearest, write_llama

READER = Path(__file__).parent / "torchao_reader.py"
TINY = {name: one for name, one in tiny_models().items() if one.kind in ("causal", "encoder")}


def read(loader: str, artifact: Path) -> dict[str, Tensor]:
    """What torchao_reader.py finds."""
    tokens, found = artifact.parent / "tokens.safetensors", artifact.parent / "found.safetensors"
    save_file({"tokens": TOKENS}, tokens)
    path = os.pathsep.join([str(Path(sys.prefix) / "readers"), str(READER.parent)])
    told = subprocess.run(
        [sys.executable, READER, loader, artifact, tokens, found],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return load_file(found)


@pytest.mark.parametrize("scheme", list(SCHEMES["torchao"]))
def test_torchao_decodes_and_runs_what_is_written(scheme: str, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    write_llama(model, torch.float32)
    _, _, opened = convert(model, out, make_target("torchao", scheme, ("layers.1.mlp.down", "F32")))
    assert settings_of(out)["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp.down_proj"]
    found, ours = read("AutoModelForCausalLM", out), decoded(model, opened)
    names = [name for name in opened.names if f"{name}/read" in found]
    assert len(names) == 13
    for name in names:
        weight, given, made = opened.read(name), found[f"{name}/read"], found[f"{name}/made"]
        assert torch.equal(found[name], weight), name
        how = opened.activations(name)
        rounded = given if how is None else quantize_inputs(given, how)
        off, plain = ((made - one @ weight.T).norm() for one in (rounded, given))
        # A largest input that is negative lies halfway between the codes -127 and -128, and f32 decides.
        assert off < (1e-5 * made.norm() if how is None else 0.25 * plain), name
    assert (found["output"] - ours).norm() < (1e-5 if scheme == "W8A16" else 0.05) * ours.norm()


@pytest.mark.parametrize("name", few(TINY, ("llama", "bert", "gpt2", "mixtral")))
def test_every_family_is_loaded_or_refused(name: str, tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    TINY[name].save(model)
    snapshot, architecture = tiny.load(model)
    container, target = CONTAINERS["torchao"], Target(name="t", format="torchao", scheme="W8A16")
    if architecture.experts or architecture.transposed or architecture.name == "falcon":
        with pytest.raises(UnsupportedError, match=r"in a form that is none of torchao's|cannot run with weights of"):
            container.plan(snapshot, architecture, target)
        return
    plan = container.plan(snapshot, architecture, target)
    out.mkdir()
    parts = round_to_nearest(plan, snapshot)
    container.write(plan, snapshot, architecture, target, parts, out)
    found, opened = read(MODELS[TINY[name].kind].__name__, out), container.open(out, architecture)
    quantized = {tensor.name for tensor in plan.tensors if tensor.quantized}
    loaded = {one for one in found if one.endswith(".weight")}
    assert {architecture.canonical(one) for one in quantized} == {architecture.canonical(one) for one in loaded}
    for one in loaded:
        assert torch.equal(found[one], opened.read(architecture.spelled(architecture.canonical(one)))), one


def test_every_file_names_all_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("converter.containers.safetensors_file.plan_files.__defaults__", (200_000,))
    write_llama(tmp_path / "model", torch.float32)
    convert(tmp_path / "model", tmp_path / "out", make_target("torchao", "W8A16"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    found = read("AutoModelForCausalLM", tmp_path / "out")
    assert sum(name.endswith(".weight") for name in found) == 14
