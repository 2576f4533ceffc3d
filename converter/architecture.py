"""What hubmill knows about a model family: one YAML per family, data only.

A tap is one hidden state and the linears that read it: they share statistics, so q, k and v cost one Gram matrix
instead of three. A folding is a norm whose weight can absorb a per-column scale of the tap behind it. Names are those
of the checkpoint, relative to the block and without ".weight". The alternative, tracing the module graph, needs no
tables but sees names as transformers fuses them today, not as the checkpoint has them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from converter.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One hidden state inside a block, named, and the linears that read it (module names relative to the block)."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Folding:
    """A norm that can absorb the column scales of a tap; its gain is `offset + weight` (offset 1 in Gemma)."""

    norm: str
    tap: str
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of decoders. Names are checkpoint names without ".weight"; `block` ends with a dot and holds `{b}`.

    gguf is the family's GGUF section as written in its YAML (see converter/containers/gguf); None when there is none.
    """

    name: str
    classes: tuple[str, ...]
    block: str
    taps: tuple[Tap, ...]
    foldings: tuple[Folding, ...]
    embedding: str
    final_norm: str
    head: str
    gguf: Mapping[str, Any] | None

    def block_of(self, tensor: str) -> int | None:
        """The number of the block that `tensor` (a checkpoint name) belongs to; None for tensors outside the blocks."""
        match = re.match(re.escape(self.block).replace(r"\{b\}", r"(\d+)"), tensor)
        return int(match[1]) if match else None

    def prefix(self, b: int) -> str:
        """What the names of block b's tensors begin with."""
        return self.block.format(b=b)

    def tap_of(self, tensor: str) -> Tap | None:
        """The tap that the linear with weight `tensor` reads; None when it is no linear of a block."""
        b = self.block_of(tensor)
        if b is None or not tensor.endswith(".weight"):
            return None
        module = tensor.removeprefix(self.prefix(b)).removesuffix(".weight")
        return next((tap for tap in self.taps if module in tap.linears), None)

    def is_linear(self, tensor: str) -> bool:
        """Whether `tensor` is the weight of a linear inside a block: what quantization is about."""
        return self.tap_of(tensor) is not None


def block_count(config: Mapping[str, Any]) -> int:
    """The number of blocks that config.json declares; multi-modal configs keep it in `text_config`."""
    return int(config.get("text_config", config)["num_hidden_layers"])


def known() -> dict[str, Architecture]:
    """Every architecture that has a YAML, by the class name that config.json gives under `architectures`."""
    found: dict[str, Architecture] = {}
    folder = resources.files("converter") / "architectures"
    for file in sorted(folder.iterdir(), key=lambda item: item.name):
        if file.name.endswith(".yaml"):
            architecture = parse(file.name.removesuffix(".yaml"), yaml.safe_load(file.read_text("utf-8")))
            found.update(dict.fromkeys(architecture.classes, architecture))
    return found


def parse(name: str, data: Mapping[str, Any]) -> Architecture:
    """The architecture that one YAML describes; every key but `foldings`, `head` and `gguf` is required."""
    return Architecture(
        name=name,
        classes=tuple(data["classes"]),
        block=data["block"],
        taps=tuple(Tap(name=tap, linears=tuple(linears)) for tap, linears in data["taps"].items()),
        foldings=tuple(Folding(**folding) for folding in data.get("foldings", ())),
        embedding=data["embedding"],
        final_norm=data["final_norm"],
        head=data.get("head", "lm_head"),
        gguf=data.get("gguf"),
    )


def find(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a model with this config.json; `where` names the model in the error.

    Raises UnsupportedError, naming the nearest known class, when no YAML lists the model's class.
    """
    table = known()
    classes = config.get("architectures") or []
    for name in classes:
        if name in table:
            return table[name]
    wanted = ", ".join(classes) or "no architecture at all"
    near = difflib.get_close_matches(wanted, table, n=1, cutoff=0.5)
    hint = f"the nearest known one is {near[0]}; " if near else ""
    raise UnsupportedError(
        where,
        f"config.json names {wanted}, which no file in converter/architectures describes",
        f"{hint}known are {', '.join(sorted(table))}; add a YAML for it, or choose parquet or compressed-tensors with "
        "method rtn, which need no architecture",
    )
