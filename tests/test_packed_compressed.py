"""compressed-tensors checkpoints, made by the library's own compressors, and MXFP4, decoded as the library does it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from converter.containers.packing import to_unsigned
from converter.errors import NumericsError, SourceError, UnsupportedError
from converter.packed import part_of
from converter.source import Snapshot, open_folder
from converter.views import View
from quantkernels import ggml

ROWS, COLUMNS = 48, 96


def opened(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None, **more: Any) -> Snapshot:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    said = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"} | said | more))
    return open_folder(folder, "test")


def random_weight(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def compress(
    format: str, weight: Tensor, dtype: torch.dtype, **args: Any
) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    """What the library stores of a linear, its group of config.json, and what it decodes it to."""
    weights = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    width = weights.group_size or weight.shape[1]
    grouped = weight.reshape(len(weight), -1, width)
    state = {"weight": weight.to(dtype)}
    low, high = grouped.amin(-1), grouped.amax(-1)
    if args["strategy"] == "tensor":
        low, high = weight.min().reshape(1), weight.max().reshape(1)
    whole = None
    if format == "nvfp4-pack-quantized":
        whole = (448 * 6 / weight.abs().max()).reshape(1)
        state["weight_global_scale"] = whole
    scale, zero = calculate_qparams(low, high, weights, global_scale=whole)
    state |= {"weight_scale": scale if whole is not None else scale.to(dtype), "weight_zero_point": zero}
    if weights.symmetric:
        del state["weight_zero_point"]
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(dict(state), scheme)
    decoded = compressor.decompress(dict(stored), scheme)["weight"]
    group = {"targets": ["Linear"], "weights": json.loads(weights.model_dump_json()), "format": format}
    return stored, group, decoded


def settings_of(*groups: dict[str, Any]) -> dict[str, Any]:
    formats = {group["format"] for group in groups}
    named = {f"group_{number}": group for number, group in enumerate(groups)}
    format = formats.pop() if len(formats) == 1 else "mixed-precision"
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": named, "ignore": ["lm_head"]}


PACKED = [
    {"num_bits": bits, "symmetric": symmetric, "strategy": strategy, "group_size": 32 if strategy == "group" else None}
    for bits in range(2, 9)
    for symmetric in (True, False)
    for strategy in ("group", "channel")
]


@pytest.mark.parametrize("args", PACKED, ids=lambda args: "-".join(str(value) for value in args.values()))
def test_packed_integers_of_any_width_are_decoded_as_the_library_does(args: dict[str, Any], tmp_path: Path) -> None:
    columns = COLUMNS if args["group_size"] else 90  # rows of 90 do not fill words, which weight_shape tells
    stored, group, decoded = compress(
        "pack-quantized", random_weight(columns=columns), torch.bfloat16, type="int", **args
    )
    snapshot = opened(tmp_path, {f"m.{name}": part for name, part in stored.items()}, settings_of(group))
    assert list(snapshot.tensors) == ["m.weight"] and snapshot.tensors["m.weight"].shape == (ROWS, columns)
    weight = snapshot.read("m.weight")
    # The library multiplies in BF16: a code and its zero point, of 8 bits each, and their product rounded once.
    assert torch.equal(weight.bfloat16(), decoded)
    assert torch.equal(torch.cat(list(snapshot.slabs("m.weight", 5 * columns))), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_int8_weights_are_decoded_as_the_library_does(symmetric: bool, strategy: str, tmp_path: Path) -> None:
    stored, group, decoded = compress(
        "int-quantized", random_weight(), torch.float32, type="int", num_bits=8, symmetric=symmetric, strategy=strategy
    )
    extra = {"m.input_scale": torch.ones(1), "m.k_scale": torch.ones(1)}
    snapshot = opened(tmp_path, extra | {f"m.{name}": part for name, part in stored.items()}, settings_of(group))
    assert list(snapshot.tensors) == ["m.weight"]
    assert torch.equal(snapshot.read("m.weight"), decoded)


@pytest.mark.parametrize("format", ["float-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"])
def test_small_floats_are_decoded_as_the_library_does(format: str, tmp_path: Path) -> None:
    args: dict[str, Any] = {
        "float-quantized": {"num_bits": 8, "strategy": "channel"},
        "nvfp4-pack-quantized": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        "mxfp4-pack-quantized": {"num_bits": 4, "strategy": "group", "group_size": 32},
    }[format]
    if format == "mxfp4-pack-quantized":
        args["scale_dtype"] = torch.uint8
    stored, group, decoded = compress(format, random_weight(), torch.bfloat16, type="float", symmetric=True, **args)
    snapshot = opened(tmp_path, {f"m.{name}": part for name, part in stored.items()}, settings_of(group))
    # All but NVFP4 are products of few bits; there the library divides the scale in f32, multiplies and rounds to BF16.
    assert torch.equal(snapshot.read("m.weight").bfloat16(), decoded.bfloat16())


def test_words_of_whole_elements_are_told_by_their_number(tmp_path: Path) -> None:
    weight = random_weight()
    stored, group, decoded = compress(
        "pack-quantized",
        weight,
        torch.bfloat16,
        type="int",
        num_bits=3,
        symmetric=True,
        strategy="group",
        group_size=32,
    )
    dense = opened(tmp_path, {f"m.{name}": part for name, part in stored.items()}, settings_of(group)).read("m.weight")
    scale = stored["weight_scale"].float().repeat_interleave(32, 1)
    codes = to_unsigned((dense / scale).round().to(torch.int8), 3).long()
    padded = torch.nn.functional.pad(codes, (0, -COLUMNS % 10)).reshape(ROWS, -1, 10)
    words = sum(padded[:, :, place] << (3 * place) for place in range(10))
    assert isinstance(words, Tensor)
    old = stored | {"weight_packed": words.to(torch.int32)}
    snapshot = opened(tmp_path, {f"m.{name}": part for name, part in old.items()}, settings_of(group))
    assert torch.equal(snapshot.read("m.weight").bfloat16(), decoded)


def test_each_module_has_the_group_that_fits_it_best(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {"lm_head.weight": torch.ones(2, 2)}
    expected: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    targets = {"a.down": ["a.down"], "a.up": ["re:.*up$"], "a.gate": ["Linear"]}
    for bits, (name, target) in zip((8, 4, 2), targets.items(), strict=True):
        stored, group, decoded = compress(
            "pack-quantized",
            random_weight(bits),
            torch.bfloat16,
            type="int",
            num_bits=bits,
            symmetric=True,
            strategy="group",
            group_size=32,
        )
        groups.insert(0, group | {"targets": target})  # the widest comes first, and must not win
        tensors |= {f"{name}.{part}": value for part, value in stored.items()}
        expected[f"{name}.weight"] = decoded
    snapshot = opened(tmp_path, tensors, settings_of(*groups))
    assert set(snapshot.tensors) == {"lm_head.weight", *expected}
    for name, weight in expected.items():
        assert torch.equal(snapshot.read(name).bfloat16(), weight)


def test_column_order_of_older_files_is_followed(tmp_path: Path) -> None:
    stored, group, _ = compress(
        "pack-quantized",
        random_weight(),
        torch.bfloat16,
        type="int",
        num_bits=4,
        symmetric=True,
        strategy="group",
        group_size=32,
    )
    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.int32) // 32
    plain = opened(tmp_path, {f"m.{name}": part for name, part in stored.items()}, settings_of(group)).read("m.weight")
    scale = stored["weight_scale"].float()
    codes = (plain / scale.repeat_interleave(32, 1)).round()
    ordered = {f"m.{name}": part for name, part in stored.items()} | {"m.weight_g_idx": order}
    assert torch.equal(opened(tmp_path, ordered, settings_of(group)).read("m.weight"), codes * scale[:, order.long()])
    wrong = ordered | {"m.weight_g_idx": order + 1}
    with pytest.raises(SourceError, match="from 1 to 3, and there are 3 groups"):
        opened(tmp_path, wrong, settings_of(group)).read("m.weight")


def test_parts_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    stored, group, _ = compress(
        "pack-quantized",
        random_weight(),
        torch.bfloat16,
        type="int",
        num_bits=4,
        symmetric=False,
        strategy="group",
        group_size=32,
    )
    tensors = {f"m.{name}": part for name, part in stored.items()}
    unsaid = settings_of(group | {"targets": ["other"]})
    bits = settings_of(group | {"weights": group["weights"] | {"num_bits": "four"}})
    cases: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        ({k: v for k, v in tensors.items() if "scale" not in k}, settings_of(group), "there is no weight_scale"),
        ({k: v for k, v in tensors.items() if "zero" not in k}, settings_of(group), "there is no weight_zero_point"),
        ({k: v for k, v in tensors.items() if "packed" not in k}, settings_of(group), "part of a quantized weight"),
        (tensors | {"m.weight_packed": tensors["m.weight_packed"][:, 1:]}, settings_of(group), "11. words of 4 bits"),
        (tensors | {"m.weight": torch.ones(ROWS, COLUMNS)}, settings_of(group), "as it is and in parts"),
        (tensors, unsaid, "no group of config_groups says how"),
        (tensors, bits, "num_bits of m is 'four'"),
    ]
    for wrong, settings, what in cases:
        with pytest.raises(SourceError, match=what):
            opened(tmp_path, wrong, settings)
    shape = tensors | {"m.weight_shape": torch.tensor([ROWS, COLUMNS - 1])}
    with pytest.raises(SourceError, match="weight_shape is"):
        opened(tmp_path, shape, settings_of(group)).read("m.weight")


@pytest.mark.parametrize(
    "settings",
    [
        *({"quant_method": m} for m in ("hqq", "quanto", "aqlm", "eetq", "higgs", "spqr", "vptq", "bitnet")),
        {"quant_method": "compressed-tensors", "format": "marlin-24"},
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        {"bits": 4},
    ],
    ids=str,
)
def test_other_quantizations_are_refused_by_name(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="already quantized by") as caught:
        opened(tmp_path, {"m.weight": torch.ones(2, 2)}, settings)
    assert str(settings.get("quant_method", "unknown")) in str(caught.value) and caught.value.remedy


# MXFP4 and NVFP4


def gpt_oss(experts: int = 3, rows: int = 8, groups: int = 2) -> dict[str, Tensor]:
    """Fused experts as gpt-oss stores them; rows of gate and up in turn."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, (experts, rows, groups), dtype=torch.uint8, generator=generator)
    return {"mlp.experts.gate_up_proj_blocks": blocks, "mlp.experts.gate_up_proj_scales": scales}


def test_fused_experts_of_mxfp4_are_decoded_as_transformers_does(tmp_path: Path) -> None:
    tensors = gpt_oss()
    snapshot = opened(tmp_path, tensors, {"quant_method": "mxfp4"})
    header = snapshot.tensors["mlp.experts.gate_up_proj"]
    assert (header.shape, header.dtype) == ((3, 8, 64), "BF16")
    # transformers gives [E, I, O] for its own matrix product; a level times a power of two is exact in BF16.
    theirs = convert_moe_packed_tensors(*tensors.values(), dtype=torch.bfloat16).transpose(1, 2)
    assert torch.equal(snapshot.read("mlp.experts.gate_up_proj").bfloat16(), theirs)
    tensors["mlp.experts.gate_up_proj_scales"][1, 2, 1] = 255
    with pytest.raises(NumericsError, match=r"not finite, the first at \[1, 2, 32\]"):
        opened(tmp_path, tensors, {"quant_method": "mxfp4"}).read("mlp.experts.gate_up_proj")


def test_slice_of_fused_experts_reads_its_own_bytes_through_a_view(tmp_path: Path) -> None:
    snapshot = opened(tmp_path, gpt_oss(), {"quant_method": "mxfp4"})
    name = "mlp.experts.gate_up_proj"
    whole, packed = snapshot.read(name), snapshot.packed[name]
    for e in range(3):
        one = part_of(packed, e, 3, "test")
        assert one.shape == (8, 64) and one.size_bytes * 3 == packed.size_bytes
        for half in range(2):
            header = replace(snapshot.tensors[name], shape=(4, 64), view=View(shape=(8, 64), start=half, step=2))
            slices = replace(snapshot, tensors={name: header}, packed={name: one})
            assert torch.equal(slices.read(name), whole[e, half::2])
            moved = slices.repacked(name, "MXFP4", 64)
            assert moved is not None
            assert torch.equal(ggml.dequantize(torch.cat(list(moved)), "MXFP4"), whole[e, half::2])


@pytest.mark.parametrize("scale", [(3, 2, 1), (3, 1, 1), (3, 8, 1), (3, 8), (1,)])
def test_slices_of_fp8_experts_keep_their_scales(scale: tuple[int, ...], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 6, generator=generator).to(torch.float8_e4m3fn)
    tensors = {"experts.up": weight, "experts.up_scale_inv": torch.rand(scale, generator=generator) + 0.5}
    snapshot = opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 6]})
    whole, packed = snapshot.read("experts.up"), snapshot.packed["experts.up"]
    for count in (3, 6):
        for index in range(count):
            one = part_of(packed, index, count, "test")
            header = replace(snapshot.tensors["experts.up"], shape=one.shape)
            part = replace(snapshot, tensors={"experts.up": header}, packed={"experts.up": one})
            assert torch.equal(part.read("experts.up"), whole.reshape(count, -1, 6)[index])


def test_slices_that_cut_through_a_block_are_refused(tmp_path: Path) -> None:
    tensors = {"e.up": torch.ones(2, 6, 4).to(torch.float8_e4m3fn), "e.up_scale_inv": torch.ones(2, 2, 1)}
    snapshot = opened(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [4, 4]})
    with pytest.raises(SourceError, match="cut through blocks of 4 rows"):
        part_of(snapshot.packed["e.up"], 0, 4, "test")


def test_scale_of_modelopt_is_a_factor(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (4, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[1.0, 0.5]] * 4).to(torch.float8_e4m3fn)
    tensors = {"m.weight": codes, "m.weight_scale": scale, "m.weight_scale_2": torch.tensor(0.25)}
    weight = opened(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}).read("m.weight")
    level = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for row, column in ((0, 0), (1, 7), (3, 30), (2, 31)):
        code = int(codes[row, column // 2]) >> (4 * (column % 2)) & 15
        assert weight[row, column] == level[code & 7] * (-1 if code > 7 else 1) * (0.25 if column < 16 else 0.125)


# The same grid in GGUF


@pytest.mark.parametrize(
    ("bits", "symmetric", "type"), [(4, True, "Q4_0"), (4, False, "Q4_1"), (8, True, "Q8_0"), (4, False, "Q8_0")]
)
def test_codes_of_the_same_grid_go_over_unchanged(bits: int, symmetric: bool, type: str, tmp_path: Path) -> None:
    stored, group, _ = compress(
        "pack-quantized",
        random_weight(columns=128),
        torch.bfloat16,
        type="int",
        num_bits=bits,
        symmetric=symmetric,
        strategy="group",
        group_size=64,
    )
    snapshot = opened(tmp_path, {f"m.{name}": part for name, part in stored.items()}, settings_of(group))
    moved, weight = snapshot.repacked("m.weight", type, 5 * 128), snapshot.read("m.weight")
    if (bits, type) == (4, "Q8_0"):
        assert moved is None
        return
    assert moved is not None
    blocks = list(moved)
    assert all(slab.dtype == torch.uint8 for slab in blocks)
    back = ggml.dequantize(torch.cat(blocks), type)
    # BF16 scales of this size are f16 numbers, and so are their products with zero points below 16 (8 + 4 bits) but for
    # one bit: at most 2^-11 of the minimum is lost, which is at most 15 steps.
    step = stored["weight_scale"].float().repeat_interleave(64, 1)
    lost = 0.0 if symmetric else 15 * 2.0**-11
    assert bool(((back - weight).abs() <= lost * step).all())
    again = ggml.dequantize(ggml.quantize(weight, type), type)
    assert float((again - weight).norm()) > 10 * float((back - weight).norm())


def test_rows_whose_scales_f16_does_not_hold_come_as_values(tmp_path: Path) -> None:
    codes = torch.randint(-127, 128, (4, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.01], [1e-7], [1e6], [0.02]])
    snapshot = opened(tmp_path, {"m.weight": codes, "m.weight_scale": scale}, None)
    for weights in (64, 256):
        moved = snapshot.repacked("m.weight", "Q8_0", weights)
        assert moved is not None
        kinds = [(slab.dtype, len(slab)) for slab in moved]
        assert sum(count for kind, count in kinds if kind == torch.uint8) == 2
        assert sum(count for kind, count in kinds if kind == torch.float32) == 2
