"""Reads artifacts of safetensors files with nothing but their own files: what every measurement goes through.

The readers are those of checkpoints that are quantized already (converter/packed), so an artifact is decoded as a model
from a hub would be. Codes times scales are multiplied in f32. transformers multiplies in the scale's type, so its
weights differ from these by one rounding to that type; vLLM's kernels multiply and add up in higher precision, as here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from converter.activations import FP4_MAX, FP8_MAX, fixed_range
from converter.caches import KEYS, MAKERS, SCALES, VALUES, CacheRounding
from converter.containers.safetensors_file import read_headers, read_tensor
from converter.errors import SourceError
from converter.packed.bitsandbytes import state_of
from converter.packed.schemes import block_of, group_of, scheme_of
from converter.packed.torchao import rounds_inputs
from converter.packed.weight import Packed
from converter.schemes import TOKEN_FP8, TOKEN_INT8, Activations
from converter.source import Header, Snapshot, open_folder

FLOATS = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
FP8_BLOCK = 128  # columns of a token that share a scale where weights are fp8 in blocks


@dataclass(frozen=True, kw_only=True)
class OpenedSafetensors:
    """An artifact on disk: as a model, and `headers`, every tensor of its files."""

    snapshot: Snapshot
    headers: Mapping[str, Header]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.snapshot.tensors)

    def read(self, name: str) -> Tensor:
        """The weight in f32. Raises SourceError when what is stored contradicts config.json or itself."""
        return self.snapshot.read(name).float()

    def stored(self, name: str) -> tuple[str, int]:
        packed = self.snapshot.packed.get(name)
        module = name.removesuffix("weight")
        attention, _, linear = module.removesuffix(".").rpartition(".")
        names = [module + end for end in ("input_scale", "input_zero_point", "input_global_scale")]
        names += [f"{attention}.{SCALES[tap]}" for tap, makers in MAKERS.items() if linear in makers]
        beside = sum(self.headers[one].end - self.headers[one].start for one in names if one in self.headers)
        if packed is None:
            header = self.snapshot.tensors[name]
            return header.dtype, header.end - header.start + beside
        return self._title(name), packed.size_bytes + beside

    def activations(self, name: str) -> Activations | None:
        if name not in self.snapshot.packed:
            return None
        settings: Mapping[str, Any] = self.snapshot.config["quantization_config"]
        if settings["quant_method"] == "fp8":
            return replace(TOKEN_FP8, group_size=FP8_BLOCK)
        if settings["quant_method"] == "torchao":
            return TOKEN_INT8 if rounds_inputs(settings) else None
        if not settings.get("config_groups"):
            return None
        module = name.removesuffix(".weight")
        said = group_of(settings, module, str(self.snapshot.folder)).get("input_activations")
        return self._declared(said, module) if said else None

    def keeps(self, prefix: str) -> CacheRounding | None:
        said = self.snapshot.config["quantization_config"].get("kv_cache_scheme")
        if not said:
            return None
        how = Activations(values="int" if said["type"] == "int" else "e4m3", bits=int(said["num_bits"]), static=True)
        ranges = {
            tap: tuple(fixed_range(how, scale) for scale in self._load(name).float().flatten().tolist())
            for name in self.headers
            for tap, end in SCALES.items()
            if name.startswith(prefix) and name.endswith(f".{end}")
        }
        return CacheRounding(keys=ranges[KEYS], values=ranges[VALUES]) if ranges else None

    def _declared(self, said: Mapping[str, Any], module: str) -> Activations:
        """What a config group says of inputs; a static scale is read from the file."""
        bits, static = int(said["num_bits"]), said["dynamic"] is not True
        scales = {"torch.float8_e4m3fn": "fp8", "torch.uint8": "power of two"}
        found = Activations(
            values="int" if said["type"] == "int" else "e2m1" if bits == 4 else "e4m3",
            bits=bits,
            group_size=said.get("group_size"),
            scale=scales.get(str(said.get("scale_dtype")), "float"),  # type: ignore[arg-type]
            static=static,
            symmetric=said.get("symmetric", True) is not False,
        )
        if static and said["strategy"] == "tensor":
            zero = 0 if found.symmetric else int(self._load(f"{module}.input_zero_point"))
            return fixed_range(found, float(self._load(f"{module}.input_scale").float()), zero)
        if static:
            largest = FP4_MAX * FP8_MAX / float(self._load(f"{module}.input_global_scale"))
            return replace(found, lowest=-largest, largest=largest)
        return found

    def _load(self, name: str) -> Tensor:
        if name not in self.headers:
            raise SourceError(str(self.snapshot.folder), f"tensor '{name}' is missing", "Write the artifact again")
        return read_tensor(self.snapshot.folder, self.headers[name])

    def _title(self, name: str) -> str:
        """The grid in words, as the grids call themselves."""
        packed = self.snapshot.packed[name]
        (rows, columns), (_, width) = (math.prod(packed.shape[:-1]), packed.shape[-1]), packed.block
        group, block = self._stated(name)
        one = rows > 1 and math.prod(packed.parts["scale"].shape) == 1 if "scale" in packed.parts else False
        match packed.format:
            case "fp8" if packed.parts["scale"].dtype == "U8":
                return "mxfp8"
            case "fp8":
                where = "x".join(map(str, block)) if block else "tensor" if one else "channel"
                return f"{FLOATS[packed.parts['codes'].dtype]} {where}"
            case "mxfp4" | "nvfp4":
                return packed.format
            case "bitsandbytes":
                raw = read_tensor(self.snapshot.folder, packed.parts["state"])
                state = state_of(raw.numpy().tobytes(), str(self.snapshot.folder))
                kind = "nf4" if packed.parts["state"].name.endswith("nf4") else "fp4"
                return f"{kind} b{state.block}" + (" double" if state.nested_block else "")
        where = "tensor" if one and not group else f"g{width}" if group or width < columns else "channel"
        return f"int{packed.bits} {where}" + (" asym" if self._is_asymmetric(packed) else "")

    def _stated(self, name: str) -> tuple[int, tuple[int, int] | None]:
        """The group size of a weight (0: none) and its block, as config.json has them."""
        settings: Mapping[str, Any] = self.snapshot.config["quantization_config"]
        if settings.get("config_groups"):
            scheme = scheme_of(settings, name.removesuffix(".weight"), str(self.snapshot.folder))
            return scheme.group_size, scheme.block
        size = settings.get("group_size")
        return size if isinstance(size, int) and size > 0 else 0, block_of(settings.get("weight_block_size"))

    def _is_asymmetric(self, packed: Packed) -> bool:
        settings = self.snapshot.config["quantization_config"]
        if packed.format == "gptq":
            return not settings.get("sym", True)
        return "zero" in packed.parts


def open_safetensors(folder: Path) -> OpenedSafetensors:
    """The artifact in `folder`, config and headers checked; raises SourceError when it is damaged."""
    snapshot = open_folder(folder, str(folder))
    if not isinstance(snapshot.config.get("quantization_config"), dict):
        what = "config.json has no quantization_config"
        raise SourceError(str(folder / "config.json"), what, "Check that this is an artifact of this format")
    return OpenedSafetensors(snapshot=snapshot, headers=read_headers(folder))
