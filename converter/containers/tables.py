"""Every container by the name that a manifest's `format` gives it."""

from __future__ import annotations

from converter.containers import Container
from converter.containers.awq import AWQ
from converter.containers.bitsandbytes import BitsAndBytes
from converter.containers.compressed_tensors import CompressedTensors
from converter.containers.fp8 import FP8
from converter.containers.gguf import GGUF
from converter.containers.gptq import GPTQ
from converter.containers.parquet import Parquet
from converter.containers.torchao import TorchAO

CONTAINERS: dict[str, Container] = {
    "gguf": GGUF,
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQ("gptq"),
    "gptq_v2": GPTQ("gptq_v2"),
    "auto-round": GPTQ("auto-round"),
    "awq": AWQ(),
    "bitsandbytes": BitsAndBytes(),
    "fp8": FP8(),
    "torchao": TorchAO(),
    "parquet": Parquet(),
}
