"""Checkpoints that other libraries wrote, decoded to the values that those libraries compute with.

tests/data/packed holds one linear a case, as "<case>/<what the library saves of it>", with `expected`, the weight as
the library itself decodes it, in the type it does so. Ours is f32, and rounded to that type it has to be equal.
`library` in the files' metadata says the version.

- gptqmodel: TorchLinear.pack_original of a random linear, for the first layout then
  convert_gptq_v2_to_v1_format_module; expected is dequantize_weight(). "order" has a random g_idx, and in the first
  layout a zero point of 0.
- autoawq: WQLinear_GEMM.from_linear; expected is dequantize_gemm (its own modules, imported without the rest).
- bitsandbytes: state_dict of Linear4bit and Linear8bitLt on the CPU; expected is dequantize_4bit and
  int8_vectorwise_dequant. Rows of the NF4 cases are no whole number of blocks: there expected is what backends/default
  makes of them, since the kernel for CPUs restarts its blocks in every row, which the quantizer does not do.
- torchao: flatten_tensor_state_dict of a linear behind quantize_; expected is dequantize().
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converter.errors import SourceError, UnsupportedError
from converter.source import Snapshot, open_folder
from converter.tensor_file import TensorFile

OPTIONAL = {"g_idx", "weight_format", "_weight_zero_point"}  # what a reader cannot know to be missing
DATA = Path(__file__).parent / "data" / "packed"
CASES = {
    (path.stem, name): settings
    for path in sorted(DATA.glob("*.safetensors"))
    for name, settings in json.loads(TensorFile(path).metadata["cases"]).items()
}


def stored(library: str, case: str) -> dict[str, torch.Tensor]:
    """What the library saved of a linear, and `expected`."""
    names = TensorFile(DATA / f"{library}.safetensors")
    return {name.removeprefix(f"{case}/"): names[name].clone() for name in names if name.startswith(f"{case}/")}


def opened(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Snapshot:
    save_file({f"layer.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = {"dtype": "float16", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return open_folder(folder, "test")


@pytest.mark.parametrize(("library", "case"), CASES)
def test_values_are_those_of_the_library_that_wrote_them(library: str, case: str, tmp_path: Path) -> None:
    tensors = stored(library, case)
    expected = tensors.pop("expected")
    snapshot = opened(tmp_path, tensors, CASES[library, case])
    assert list(snapshot.tensors) == ["layer.weight"]
    header, weight = snapshot.tensors["layer.weight"], snapshot.read("layer.weight")
    assert (header.dtype, header.shape) == ("F16", tuple(expected.shape)) and weight.dtype == torch.float32
    assert snapshot.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(weight.to(expected.dtype), expected)


@pytest.mark.parametrize(("library", "case"), CASES)
def test_slabs_of_any_height_give_the_same_values(library: str, case: str, tmp_path: Path) -> None:
    tensors = stored(library, case)
    rows, columns = tensors.pop("expected").shape
    snapshot = opened(tmp_path, tensors, CASES[library, case])
    whole = snapshot.read("layer.weight")
    for height in (1, 5, 8, rows):
        slabs = list(snapshot.slabs("layer.weight", height * columns))
        assert [len(slab) for slab in slabs[:-1]] == [height] * (len(slabs) - 1)
        assert torch.equal(torch.cat(slabs), whole)


@pytest.mark.parametrize(("library", "case"), CASES)
def test_a_missing_part_is_named_in_the_plan(library: str, case: str, tmp_path: Path) -> None:
    tensors = stored(library, case)
    del tensors["expected"]
    for part in sorted(tensors.keys() - OPTIONAL):
        left = {name: tensor for name, tensor in tensors.items() if name != part}
        with pytest.raises(SourceError, match=r"layer\.") as caught:
            opened(tmp_path, left, CASES[library, case])
        assert caught.value.remedy


def test_gptq_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    settings = CASES["gptqmodel", "v1-asym-order-4"]
    tensors = stored("gptqmodel", "v1-asym-order-4")
    del tensors["expected"]
    changed = {
        "of 4 bits, config.json says 8": (tensors, settings | {"bits": 8}),
        "of no layout of 2, 3, 4, 8 bits": (tensors | {"scales": tensors["scales"][:, 1:].contiguous()}, settings),
        "qzeros": (tensors | {"qzeros": tensors["qzeros"][:1].contiguous()}, settings),
        "zero I64": (tensors | {"qzeros": tensors["qzeros"].long()}, settings),
    }
    for what, (wrong, said) in changed.items():
        if what == "qzeros":
            what = r"zero I32 \[1, 4\], scale F16 \[2, 32\]"
        with pytest.raises(SourceError, match=what):
            opened(tmp_path, wrong, said)
    for g_idx, what in (
        (tensors["g_idx"] + 1, "from 1 to 2, and there are 2"),
        (tensors["g_idx"][1:].contiguous(), "63"),
    ):
        with pytest.raises(SourceError, match=what):
            opened(tmp_path, tensors | {"g_idx": g_idx}, settings).read("layer.weight")


def test_mixed_bits_are_read_from_the_shapes(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for case in ("v1-sym-4", "v1-sym-8"):
        tensors |= {f"{case}.{name}": tensor for name, tensor in stored("gptqmodel", case).items()}
    expected = {case: tensors.pop(f"{case}.expected") for case in ("v1-sym-4", "v1-sym-8")}
    settings = CASES["gptqmodel", "v1-sym-4"] | {"dynamic": {"+:.*-8$": {"bits": 8}}}
    snapshot = opened(tmp_path, tensors, settings)
    for case, weight in expected.items():
        assert torch.equal(snapshot.read(f"layer.{case}.weight").half(), weight)


def test_damaged_state_of_bitsandbytes_is_told(tmp_path: Path) -> None:
    tensors = stored("bitsandbytes", "nf4-plain-float16")
    del tensors["expected"]
    name = "weight.quant_state.bitsandbytes__nf4"
    for text, what in (
        ("{", "broken JSON"),
        ("[]", "does not describe"),
        ('{"shape": [2, 0], "blocksize": 64}', r"\[2, 0\]"),
    ):
        broken = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        with pytest.raises(SourceError, match=what):
            opened(tmp_path, tensors | {name: broken}, {"quant_method": "bitsandbytes"})


@pytest.mark.parametrize("case", ["v1-sym-4", "v2-asym-4"])
def test_gptq_without_g_idx_has_its_inputs_in_order(case: str, tmp_path: Path) -> None:
    """AutoRound writes no g_idx."""
    tensors = stored("gptqmodel", case)
    expected = tensors.pop("expected")
    del tensors["g_idx"]
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq"}
    layout = {"checkpoint_format": CASES["gptqmodel", case]["checkpoint_format"]}
    assert torch.equal(opened(tmp_path, tensors, settings | layout).read("layer.weight").half(), expected)


def test_what_torchao_stores_otherwise_is_refused(tmp_path: Path) -> None:
    case = "int8-row-bfloat16"
    tensors = stored("torchao", case)
    del tensors["expected"]
    changed = {
        "codes U8": tensors | {"_weight_qdata": tensors["_weight_qdata"].view(torch.uint8)},
        "scales U8": tensors | {"_weight_scale": tensors["_weight_scale"].to(torch.uint8)},
        "zero points F32 of codes I8": tensors | {"_weight_zero_point": tensors["_weight_zero_point"].float()},
        "codes of no weight": tensors | {"experts._gate_up_proj_qdata": tensors["_weight_qdata"].clone()},
        "factors for its inputs": tensors | {"_weight_act_pre_scale": torch.ones(96)},
    }
    for what, wrong in changed.items():
        with pytest.raises(UnsupportedError, match=what):
            opened(tmp_path, wrong, CASES["torchao", case])
    static = tensors | {"_weight_act_quant_scale": torch.ones(1), "_weight_act_quant_zero_point": torch.zeros(1)}
    assert list(opened(tmp_path, static, CASES["torchao", case]).tensors) == ["layer.weight"]
