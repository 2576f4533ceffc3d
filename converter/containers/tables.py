"""Every container by the name that a manifest's `format` gives it."""

from __future__ import annotations

from converter.containers import Container
from converter.containers.compressed_tensors import CompressedTensors
from converter.containers.gguf import GGUF
from converter.containers.parquet import Parquet

CONTAINERS: dict[str, Container] = {
    "gguf": GGUF,
    "compressed-tensors": CompressedTensors(),
    "parquet": Parquet(),
}
