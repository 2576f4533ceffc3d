"""What hubmill knows about a model family: one YAML per family, data only.

A tap is one hidden state and the linears that read it: they share statistics, so q, k and v cost one Gram matrix
instead of three. A folding is a norm whose weight can absorb a per-column scale of the tap behind it. Names are those
of the checkpoint, relative to the block and without ".weight". The alternative, tracing the module graph, needs no
tables but sees names as transformers fuses them today, not as the checkpoint has them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from typing import Any

import yaml

from converter.errors import SourceError, UnsupportedError

# Buffers that older checkpoints carry along; whoever runs the model computes them from config.json.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attention\.(masked_)?bias|position_ids)$")


COUNTS = ("num_local_experts", "num_experts")  # where config.json counts the experts of a block
MOST_EXPERTS = 4096


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
class Experts:
    """The experts of a block: their `count`, the module that holds them, and the names of an expert's linears.

    module is a checkpoint name relative to the block ("mlp.experts"), linears are those that gate, widen and narrow
    ("gate_proj", "up_proj", "down_proj"): expert 3 gates with mlp.experts.3.gate_proj.
    """

    count: int
    module: str
    linears: tuple[str, str, str]

    def expert_of(self, module: str) -> tuple[int, str] | None:
        """The number of the expert and the name of its linear, for a module relative to the block; else None."""
        match = re.fullmatch(re.escape(self.module) + r"\.(\d+)\.(\w+)", module)
        return (int(match[1]), match[2]) if match and match[2] in self.linears else None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of decoders. Names are checkpoint names without ".weight"; `block` ends with a dot and holds `{b}`.

    experts is None in dense families. renamed: what names relative to the block begin with in transformers, where the
    checkpoint has something else. gguf is the family's GGUF section as written in its YAML (see
    converter/containers/gguf); None when there is none.
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
    experts: Experts | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)

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
        return self._tap_by_linear.get(tensor.removeprefix(self.prefix(b)).removesuffix(".weight"))

    @cached_property
    def _tap_by_linear(self) -> Mapping[str, Tap]:
        return {linear: tap for tap in self.taps for linear in tap.linears}

    def is_linear(self, tensor: str) -> bool:
        """Whether `tensor` is the weight of a linear inside a block: what quantization is about."""
        return self.tap_of(tensor) is not None

    def inner(self, name: str) -> str:
        """A name relative to the block as transformers has it."""
        start = next((start for start in self.renamed if name.startswith(start)), "")
        return self.renamed[start] + name.removeprefix(start) if start else name

    def with_experts(self, config: Mapping[str, Any], where: str) -> Architecture:
        """This family with as many experts as config.json counts, and their taps: "expert_input.3" for expert 3.

        Raises SourceError when config.json does not count them.
        """
        if self.experts is None:
            return self
        given = [text_config(config).get(key) for key in COUNTS]
        count = next((value for value in given if value is not None), None)
        if type(count) is not int or not 1 <= count <= MOST_EXPERTS:
            what = f"config.json gives {count!r} for {' or '.join(COUNTS)}, not a number of experts"
            raise SourceError(where, what, "Complete config.json from the model's original")
        experts = replace(self.experts, count=count)
        gate, up, down = experts.linears
        taps = list(self.taps)
        for e in range(count):
            own = f"{experts.module}.{e}"
            taps.append(Tap(name=f"expert_input.{e}", linears=(f"{own}.{gate}", f"{own}.{up}")))
            taps.append(Tap(name=f"expert_middle.{e}", linears=(f"{own}.{down}",)))
        return replace(self, experts=experts, taps=tuple(taps))


def block_count(config: Mapping[str, Any]) -> int:
    """The number of blocks that config.json declares; multi-modal configs keep it in `text_config`."""
    return int(text_config(config)["num_hidden_layers"])


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says about the language model: its `text_config`, or all of it when it has none."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def check_blocks(architecture: Architecture, config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """Raise SourceError unless the blocks that `tensors` name are those that config.json counts."""
    count = text_config(config).get("num_hidden_layers")
    remedy = "Config.json and weights are of different models, or a file is missing: fetch both again"
    if type(count) is not int or count < 1:
        raise SourceError(where, f"config.json gives {count!r} for num_hidden_layers, not a number of blocks", remedy)
    stored = {block for block in map(architecture.block_of, tensors) if block is not None}
    if stored != set(range(min(count, len(stored) + 1))):  # a count beyond reason makes no set of that size
        held = f"{len(stored)} blocks, up to block {max(stored)}" if stored else "none"
        what = f"config.json gives {count} for num_hidden_layers, and the weights hold {held}"
        raise SourceError(where, what, remedy)


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
    """The architecture that one YAML describes; foldings, head, experts, renamed and gguf may be left out."""
    experts = data.get("experts")
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
        experts=Experts(count=0, module=experts["module"], linears=tuple(experts["linears"])) if experts else None,
        renamed=data.get("renamed", {}),
    )


def find(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a model with this config.json; `where` names the model in the error.

    Raises UnsupportedError, naming the nearest known class, when no YAML lists the model's class, and SourceError when
    config.json says something else there than names.
    """
    table = known()
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        what = f"config.json gives {classes!r} for architectures, not a list of names"
        raise SourceError(where, what, "Mend config.json, or fetch it again")
    for name in classes:
        if name in table:
            return table[name].with_experts(config, where)
    if not config:
        what = "there is no config.json, so its architecture is not known"
        remedy = (
            "Put the original config.json beside the weights, or choose parquet or compressed-tensors with method rtn"
        )
        raise UnsupportedError(where, what, remedy)
    wanted = ", ".join(classes) or "no architecture at all"
    near = difflib.get_close_matches(wanted, table, n=1, cutoff=0.5)
    hint = f"the nearest known one is {near[0]}; " if near else ""
    raise UnsupportedError(
        where,
        f"config.json names {wanted}, which no file in converter/architectures describes",
        f"{hint}known are {', '.join(sorted(table))}; add a YAML for it, or choose parquet or compressed-tensors with "
        "method rtn, which need no architecture",
    )
