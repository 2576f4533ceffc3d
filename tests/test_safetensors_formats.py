"""GPTQ, AWQ, AutoRound, bitsandbytes, fp8 and torchao artifacts: what is planned is written, read and run (torchao's:
test_torchao.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from converter.architecture import find
from converter.containers import ArtifactPlan
from converter.containers.safetensors_open import OpenedSafetensors
from converter.containers.tables import CONTAINERS
from converter.errors import UnsupportedError
from converter.manifest import Rule, Target
from converter.schemes import SCHEMES
from converter.source import open_folder
from tiny_models import round_to_nearest, write_llama

FORMATS = [
    (format, scheme)
    for format in ("gptq", "gptq_v2", "auto-round", "awq", "bitsandbytes", "fp8", "torchao")
    for scheme in SCHEMES[format]
]
TOKENS = torch.arange(48).reshape(2, 24)
Q_PROJ = "model.layers.0.self_attn.q_proj"


def make_target(format: str, scheme: str, *rules: tuple[str, str], **fields: Any) -> Target:
    listed = tuple(Rule(pattern=pattern, type=type) for pattern, type in rules)
    known = Target(name="t", format=format, scheme=scheme).__dict__  # type: ignore[arg-type]
    return Target.model_construct(**{**known, "rules": listed, **fields})


def convert(model: Path, out: Path, target: Target) -> tuple[ArtifactPlan, dict[str, Tensor], OpenedSafetensors]:
    """The plan, what each tensor of the artifact was meant to be, and the artifact."""
    snapshot = open_folder(model, "test")
    architecture = find(snapshot.config, "test")
    container = CONTAINERS[target.format]
    plan = container.plan(snapshot, architecture, target)
    out.mkdir()
    parts = round_to_nearest(plan, snapshot)
    container.write(plan, snapshot, architecture, target, parts, out)
    meant = {tensor.name: tensor.grid.decode(parts(tensor.name)) for tensor in plan.tensors}
    opened = container.open(out, architecture)
    assert isinstance(opened, OpenedSafetensors)
    return plan, meant, opened


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


@pytest.mark.parametrize(("format", "scheme"), FORMATS)
def test_what_is_written_is_what_was_planned_and_meant(format: str, scheme: str, llama: Path, tmp_path: Path) -> None:
    plan, meant, opened = convert(llama, tmp_path / "out", make_target(format, scheme))
    assert plan.files == {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {t.name: (t.grid.name, t.size_bytes) for t in plan.tensors} == {n: opened.stored(n) for n in opened.names}
    for name, weight in meant.items():
        assert torch.equal(opened.read(name), weight), name
    assert sum(tensor.quantized for tensor in plan.tensors) == 14
    assert opened.activations(f"{Q_PROJ}.weight") == SCHEMES[format][scheme].activations


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def run(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits.float()


def decoded(model: Path, opened: OpenedSafetensors) -> Tensor:
    """What transformers computes with the weights that our reader decodes, in the model's type."""
    plain = AutoModelForCausalLM.from_pretrained(model)
    plain.load_state_dict({name: opened.read(name).to(plain.dtype) for name in opened.names})
    with torch.no_grad():
        return plain(TOKENS).logits.float()


@pytest.mark.parametrize("scheme", ["NF4", "FP4"])
def test_bitsandbytes_decodes_and_runs_its_artifacts(scheme: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_llama(model, torch.float32)
    _, _, opened = convert(model, tmp_path / "out", make_target("bitsandbytes", scheme))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weight = stored.pop(f"{Q_PROJ}.weight")
    beside = {name.removeprefix(f"{Q_PROJ}.weight."): stored[name] for name in stored if name.startswith(Q_PROJ)}
    state = functional.QuantState.from_dict(beside, device=torch.device("cpu"))
    theirs = functional.dequantize_4bit(weight, state)
    assert theirs.dtype == torch.float32
    torch.testing.assert_close(theirs, opened.read(f"{Q_PROJ}.weight"), rtol=1e-6, atol=1e-8)
    # Its kernel for CPUs multiplies in BF16, of inputs, too.
    loaded, ours = run(tmp_path / "out"), decoded(model, opened)
    assert (loaded - ours).norm() < 0.02 * ours.norm() < (loaded - run(model)).norm()


def test_transformers_runs_native_fp8(llama: Path, tmp_path: Path) -> None:
    _, _, opened = convert(llama, tmp_path / "out", make_target("fp8", "FP8_BLOCK"))
    loaded, ours = run(tmp_path / "out"), decoded(llama, opened)
    assert (loaded - ours).norm() < 0.01 * ours.norm()
    assert (loaded - run(llama)).norm() > 0.005 * ours.norm()


def test_gptq_names_what_differs_from_most(llama: Path, tmp_path: Path) -> None:
    rules = (("layers.0.mlp.(gate|up)", "W8A16"), ("layers.1.mlp.down", "BF16"), ("lm_head", "W4A16"))
    convert(llama, tmp_path / "out", make_target("gptq", "W4A16", *rules, group_size=64))
    said = settings_of(tmp_path / "out")
    assert (said["bits"], said["group_size"], said["sym"], said["lm_head"]) == (4, 64, True, True)
    assert said["dynamic"][r"+:^model\.layers\.0\.mlp\.gate_proj$"] == {"bits": 8, "group_size": -1, "sym": True}
    assert said["dynamic"][r"-:^model\.layers\.1\.mlp\.down_proj$"] == {}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == said
    convert(llama, tmp_path / "auto", make_target("auto-round", "W4A16", *rules[:2], group_size=64))
    extra = settings_of(tmp_path / "auto")["extra_config"]
    assert extra["model.layers.0.mlp.up_proj"]["bits"] == 8 and extra["model.layers.1.mlp.down_proj"]["bits"] == 16


@pytest.mark.parametrize("format", ["awq", "bitsandbytes", "fp8"])
def test_kept_linears_are_named(format: str, llama: Path, tmp_path: Path) -> None:
    [scheme] = list(SCHEMES[format])[:1]
    convert(llama, tmp_path / "out", make_target(format, scheme, (r"layers\.1\.mlp\.down", "BF16")))
    key = "llm_int8_skip_modules" if format == "bitsandbytes" else "modules_to_not_convert"
    assert settings_of(tmp_path / "out")[key] == ["lm_head", "model.layers.1.mlp.down_proj"]


def test_zero_points_lie_as_each_layout_keeps_them(llama: Path, tmp_path: Path) -> None:
    for format, stored in (("gptq", 0x77777777), ("gptq_v2", -0x77777778)):
        _, _, opened = convert(llama, tmp_path / format, make_target(format, "W4A16"))
        words = opened._load(f"{Q_PROJ}.qzeros")
        assert (words == stored).all()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (make_target("gptq", "W4A16", symmetric=False), "Write format: gptq_v2"),
        (make_target("gptq", "W4A16", granularity="tensor"), "no place for one scale per tensor"),
        (make_target("awq", "W4A16_ASYM", granularity="channel"), "a zero point for each group"),
        (make_target("fp8", "FP8_BLOCK", granularity="channel"), "no place for scales of granularity channel"),
        (make_target("gptq", "W4A16", ("q_proj", "W8A16")), "let rules cover all of"),
        (make_target("torchao", "W8A16", granularity="tensor"), "one scale for each row and no zero points"),
        (make_target("torchao", "W8A16", symmetric=False), "not with asymmetric codes"),
        (make_target("torchao", "W8A16", ("mlp", "W8A8")), "one word for the inputs of all linears"),
    ],
)
def test_what_a_layout_cannot_say_is_refused_in_the_plan(target: Target, message: str, llama: Path) -> None:
    snapshot = open_folder(llama, "test")
    with pytest.raises(UnsupportedError, match=message):
        CONTAINERS[target.format].plan(snapshot, find(snapshot.config, "test"), target)
