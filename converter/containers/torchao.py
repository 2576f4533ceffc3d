"""torchao's int8: one scale for each row, inputs as they are (W8A16) or int8 with a scale for each token (W8A8).

    _weight_qdata   I8 [O, I], codes from -128 to 127
    _weight_scale   F32 [O, 1], what they are multiplied by

Readers build tensors of torchao's own classes from these and from what the header of the file says of each weight: its
class and arguments, JSON by the weight's name, and the list of names. transformers looks at the last file's list alone,
so every file has all of it, and looks weights up as its own model calls them, which need not be what files do: both
names are there. Linears that it keeps otherwise (experts in one tensor, GPT-2's [I, O]) are none of torchao's.
Source: torchao 0.18 (prototype/safetensors, quantize_/workflows/int8); transformers 5.23 (quantizer_torchao.py).
"""

# O out, I in (columns)

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, TensorPlan
from converter.containers.safetensors_file import Entry
from converter.containers.safetensors_model import SafetensorsModel, kept_linears, module_of, where_of
from converter.containers.selection import Choice, float_dtype
from converter.errors import UnsupportedError
from converter.grids import Grid
from converter.grids.plain import DTYPES
from converter.manifest import Target
from converter.packed.torchao import DYNAMIC, WEIGHT_ONLY
from converter.source import Header, Snapshot

PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
BY_HAND = ("falcon",)  # families whose linears transformers multiplies by itself, which torchao's classes do not take


class TorchAO(SafetensorsModel):
    """The container of `format: torchao`."""

    def choose_grid(self, header: Header, dtype: str, choice: Choice) -> tuple[Grid, str]:
        target = choice.target
        if target.granularity != "channel" or not target.symmetric:
            asked = f"granularity {target.granularity}" if target.symmetric else "asymmetric codes"
            what = f"torchao's int8 is written with one scale for each row and no zero points, not with {asked}"
            raise UnsupportedError(where_of(target), what, "Remove granularity, group_size and symmetric")
        return choice.grid(group_size=None, scale_dtype="F32"), ""

    def entries(self, tensor: TensorPlan) -> tuple[Entry, ...]:
        module = module_of(tensor)
        scale = Entry(name=f"{module}._weight_scale", dtype="F32", shape=(tensor.shape[0], 1))
        return Entry(name=f"{module}._weight_qdata", dtype="I8", shape=tensor.shape), scale

    def values(self, tensor: TensorPlan, parts: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return [parts["codes"], parts["scale"]]

    def metadata(
        self, tensors: Sequence[TensorPlan], snapshot: Snapshot, architecture: Architecture | None
    ) -> Mapping[str, str]:
        said: dict[str, str] = {}
        for tensor in tensors:
            names = {tensor.name, architecture.canonical(tensor.name) if architecture else tensor.name}
            said |= dict.fromkeys(sorted(names), json.dumps(_class_of(tensor, snapshot)))
        said = {name: kind for name, kind in said.items() if "." in name}  # readers split names at the last dot
        return {"tensor_names": json.dumps(list(said)), **said}

    def check(self, tensors: Sequence[TensorPlan], architecture: Architecture | None, target: Target) -> None:
        super().check(tensors, architecture, target)
        if len({tensor.activations for tensor in tensors if tensor.quantized}) > 1:
            what = "torchao's config.json has one word for the inputs of all linears, and rules differ"
            raise UnsupportedError(where_of(target), what, "Use one scheme, or format compressed-tensors")
        if architecture and architecture.name in BY_HAND:
            what = f"the linears of transformers' {architecture.name} cannot run with weights of torchao's"
            raise UnsupportedError(where_of(target), what, "Use format compressed-tensors")
        for tensor in tensors:
            if tensor.quantized and architecture and _is_kept_otherwise(tensor, architecture):
                what = f"transformers keeps {tensor.name} in a form that is none of torchao's"
                raise UnsupportedError(where_of(target), what, "Use format compressed-tensors, or keep it by rules")

    def settings(
        self, plan: ArtifactPlan, snapshot: Snapshot, architecture: Architecture | None, target: Target
    ) -> dict[str, Any]:
        rounds_inputs = any(tensor.activations for tensor in plan.tensors)
        said: dict[str, Any] = {"granularity": PER_ROW | {"_version": 1}, "set_inductor_config": True}
        if rounds_inputs:
            said |= {"act_mapping_type": SYMMETRIC, "reduce_range": False, "weight_only_decode": False}
        else:
            said |= {"group_size": None}
        kind = DYNAMIC if rounds_inputs else WEIGHT_ONLY
        return {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": kind, "_data": said, "_version": 2}},
            "modules_to_not_convert": kept_linears(plan, snapshot, architecture) or None,
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }


def _is_kept_otherwise(tensor: TensorPlan, architecture: Architecture) -> bool:
    """Whether transformers has this linear fused with others, or the other way round."""
    if tensor.block is None:
        return False
    module = module_of(tensor).removeprefix(architecture.prefix(tensor.block))
    fused = architecture.experts is not None and architecture.experts.expert_of(module) is not None
    return fused or module in architecture.transposed


def _class_of(tensor: TensorPlan, snapshot: Snapshot) -> dict[str, Any]:
    """What readers make of a weight: a class and its arguments."""
    if not tensor.quantized:
        return {"_type": "Tensor"}
    inputs = {"granularity": PER_ROW, "mapping_type": SYMMETRIC, "reduce_range": False}
    kept = float_dtype(snapshot.tensors[tensor.source].dtype)
    assert kept is not None, "integers are no weights"
    data = {
        "act_quant_kwargs": {"_type": "QuantizeTensorToInt8Kwargs", "_data": inputs} if tensor.activations else None,
        "reduce_range": False,
        "block_size": [1, tensor.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": str(DTYPES[kept]).removeprefix("torch.")},
    }
    return {"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale"]}
