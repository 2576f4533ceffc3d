"""Whole models that are quantized already, to GGUF: what the file holds is what the checkpoint's parts say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from converter import manifest as manifests
from converter.containers.gguf import GGUF
from converter.containers.packing import pack_bytes, pack_words
from gguf_models import byte_level, load, save_model, save_tokenizer, target, write
from jobs.convert import Run, convert, plan
from small_run import write_manifest, write_model

Store = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


def words(unsigned: Tensor, bits: int) -> Tensor:
    """Rows of codes as a stream in int32, low bits first."""
    return pack_bytes(unsigned, bits).view(torch.int32)


def symmetric(weight: Tensor, group: int, levels: int = 7) -> tuple[Tensor, Tensor]:
    """Codes [O, I] int8 in -levels to levels, and BF16 scales [O, G]."""
    grouped = weight.reshape(len(weight), -1, group)
    scale = (grouped.abs().amax(-1) / levels).bfloat16()
    codes = (grouped / scale.float()[:, :, None]).round().clamp(-levels, levels)
    return codes.reshape(weight.shape).to(torch.int8), scale


def as_words(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = symmetric(weight, 64)
    parts = {"weight_packed": pack_words(codes, 4), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    return parts, codes.float() * scale.float().repeat_interleave(64, 1)


def as_gptq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = symmetric(weight, 64)
    stored = words((codes + 8).to(torch.uint8), 4).T.contiguous()
    half = scale.half().T.contiguous()
    zero = words(torch.full(half.shape, 7, dtype=torch.uint8), 4)  # 8, less one
    parts = {"qweight": stored, "qzeros": zero, "scales": half}
    return parts, codes.float() * half.T.float().repeat_interleave(64, 1)


def as_int8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    codes, scale = symmetric(weight, weight.shape[1], 127)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def as_mxfp4(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    grouped = weight.reshape(len(weight), -1, 32)
    exponent = grouped.abs().amax(-1).log2().floor() - 2
    scaled = grouped / 2 ** exponent[:, :, None]
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    index = (scaled.abs()[..., None] - levels).abs().argmin(-1)
    codes = (index + 8 * (scaled < 0)).to(torch.uint8).reshape(weight.shape)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    parts = {"weight_packed": packed, "weight_scale": (exponent + 127).to(torch.uint8)}
    return parts, (levels[index] * scaled.sign() * 2 ** exponent[:, :, None]).reshape(weight.shape)


GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
ROW = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}


def compressed(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups, "ignore": ["lm_head"]}


KINDS: dict[str, tuple[Store, dict[str, Any], str]] = {
    "pack-quantized": (as_words, compressed("pack-quantized", GROUP), "Q4_0"),
    "gptq": (as_gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}, "Q4_0"),
    "int8": (as_int8, compressed("int-quantized", ROW), "Q8_0"),
    "mxfp4": (as_mxfp4, compressed("mxfp4-pack-quantized", GROUP | {"group_size": 32, "type": "float"}), "MXFP4"),
}


def quantize(folder: Path, kind: str) -> dict[str, Tensor]:
    """Store the linears of the model in `folder` in parts; the weights that these mean, by name."""
    store, settings, _ = KINDS[kind]
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix("weight")
        parts, meant[name] = store(name, tensors.pop(name).float())
        tensors |= {module + part: value.contiguous() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_of_floats_holds_the_decoded_weights(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, width=128, middle=128)
    save_tokenizer(byte_level(), folder)
    meant = quantize(folder, kind)
    for type in ("F32", "BF16"):
        write(folder, target(type), tmp_path / type)
        opened = GGUF.open(tmp_path / type, load(folder)[1])
        for name, weight in meant.items():
            assert torch.equal(opened.read(name), weight if type == "F32" else weight.bfloat16().float())


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Any) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_run_moves_codes_to_the_type_that_has_their_grid(kind: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    meant = quantize(folder, kind)
    type = KINDS[kind][2]
    targets = {"same": f"{{format: gguf, type: {type}, pure: true}}", "int8": "{format: parquet, scheme: INT8}"}
    run = Run(manifest=manifests.load(write_manifest(tmp_path, targets)), out=tmp_path / "out", executor="inprocess")
    rows = {row["target"]: row for row in convert(run, Quiet()).rows}
    assert [row["status"] for row in rows.values()] == ["done", "done"], [row.get("error") for row in rows.values()]
    said = "; ".join(rows["same"]["warnings"])
    assert "quantized already (14 x " in said and f"the codes of 14 tensors go over to {type}" in said
    assert "go over" not in "; ".join(rows["int8"]["warnings"])
    results = tmp_path / "out" / "small" / "model"
    opened = GGUF.open(results / "same", load(folder)[1])
    for name, weight in meant.items():
        assert opened.stored(name)[0] == type and torch.equal(opened.read(name), weight)
    assert "quantization_config" not in json.loads((results / "int8" / "config.json").read_text())


def test_a_config_that_speaks_of_codes_over_plain_weights_is_told_in_the_plan(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": KINDS["gptq"][1]}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = manifests.load(write_manifest(tmp_path, {"int8": "{format: parquet, scheme: INT8}"}))
    ready = plan(Run(manifest=manifest, out=tmp_path / "out", executor="inprocess"))
    (planned,) = ready.prepared.plan.jobs
    assert any("quantized by 'gptq' and none is" in note for note in planned.artifact.notes)
