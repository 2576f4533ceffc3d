"""Reads compressed-tensors artifacts with nothing but their own files: what every measurement goes through.

Codes times scales are multiplied in f32. transformers multiplies in the scale's type, so its weights differ from these
by one rounding to that type; vLLM's kernels multiply and add up in higher precision, as here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter.containers.packing import unpack_words
from converter.containers.safetensors_file import read_headers, read_tensor
from converter.errors import SourceError
from converter.grids.affine import AffineGrid
from converter.source import Header, parse_json

# O out, I in (columns), G groups

_ENDINGS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point")


@dataclass(frozen=True, kw_only=True)
class OpenedCompressedTensors:
    """A compressed-tensors artifact on disk; `groups` are the config groups of config.json."""

    folder: Path
    headers: Mapping[str, Header]
    groups: tuple[Mapping[str, Any], ...]

    @property
    def names(self) -> tuple[str, ...]:
        packed = {
            f"{name.removesuffix('.weight_packed')}.weight" for name in self.headers if name.endswith(_ENDINGS[0])
        }
        return tuple(sorted(packed | {name for name in self.headers if not name.endswith(_ENDINGS)}))

    def read(self, name: str) -> Tensor:
        """The weight in f32. Raises SourceError when what is stored contradicts config.json or itself."""
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in self.headers:
            return self._load(name).to(torch.float32)
        grid = self._grid(module)
        scale = self._load(f"{module}.weight_scale")
        scale = scale.reshape(1, 1) if scale.ndim == 1 else scale
        if f"{module}.weight_packed" not in self.headers:
            return grid.decode({"codes": self._load(name), "scale": scale})
        shape = self._load(f"{module}.weight_shape").tolist()
        words = self._load(f"{module}.weight_packed")
        if len(shape) != 2 or words.shape != (shape[0], -(-shape[1] * grid.bits // 32)):
            what = f"{list(words.shape)} words of {grid.bits}-bit codes cannot hold a weight of shape {shape}"
            raise SourceError(f"{self.folder}: {name}", what, "Write the artifact again")
        parts = {"codes": unpack_words(words, grid.bits, shape[1]), "scale": scale}
        if not grid.symmetric:
            zero_words = self._load(f"{module}.weight_zero_point")
            parts["zero_point"] = unpack_words(zero_words.T, grid.bits, shape[0]).T
        return grid.decode(parts)

    def stored(self, name: str) -> tuple[str, int]:
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in self.headers:
            header = self.headers[name]
            return header.dtype, header.end - header.start
        own = [self.headers[key] for key in (name, *(module + end for end in _ENDINGS)) if key in self.headers]
        return self._grid(module).name, sum(header.end - header.start for header in own)

    def activation_bits(self, name: str) -> int | None:
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" not in self.headers:
            return None
        activations = self._group(module).get("input_activations")
        return int(activations["num_bits"]) if activations else None

    def _load(self, name: str) -> Tensor:
        if name not in self.headers:
            raise SourceError(str(self.folder), f"tensor '{name}' is missing", "Write the artifact again")
        return read_tensor(self.folder, self.headers[name])

    def _group(self, module: str) -> Mapping[str, Any]:
        """The config group of a module: the one that names it, else the one for every Linear."""
        for target in (module, "Linear"):
            for group in self.groups:
                if target in group["targets"]:
                    return group
        what = f"config.json has no group for the quantized module '{module}'"
        raise SourceError(str(self.folder), what, "Write the artifact again")

    def _grid(self, module: str) -> AffineGrid:
        weights = self._group(module)["weights"]
        return AffineGrid(
            bits=weights["num_bits"],
            symmetric=weights["symmetric"],
            group_size=weights.get("group_size"),
            granularity=weights["strategy"],
            observer="minmax",
            scale_dtype=self.headers[f"{module}.weight_scale"].dtype,
        )


def open_compressed_tensors(folder: Path) -> OpenedCompressedTensors:
    """The artifact in `folder`, config and headers checked; raises SourceError when it is damaged."""
    path = folder / "config.json"
    try:
        config = parse_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise SourceError(str(folder), "there is no config.json", "Write the artifact again") from error
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        what = "config.json has no quantization_config of compressed-tensors"
        raise SourceError(str(path), what, "Check that this is such an artifact")
    groups = tuple(settings["config_groups"].values())
    return OpenedCompressedTensors(folder=folder, headers=read_headers(folder), groups=groups)
