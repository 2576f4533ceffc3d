"""What hubmill knows about a model family: one YAML per family, data only.

A tap is one hidden state and the linears that read it: they share statistics, so q, k and v cost one Gram matrix
instead of three. A folding is what can absorb a per-column scale of the tap behind it: a norm, or the linear whose rows
the columns come from. Names are those of the checkpoint, relative to the block and without ".weight". The alternative,
tracing the module graph, needs no tables but sees names as transformers fuses them today, not as the checkpoint has
them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import resources
from typing import Any, Literal

import yaml

from converter.errors import SourceError, UnsupportedError
from converter.expression import evaluate
from converter.residual import Residual, parse_residual

# Buffers that older checkpoints carry along; whoever runs the model computes them from config.json.
COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias|position_ids)$")

Runs = Literal["decoder", "encoder", "none"]
HEADS = re.compile(r"(For[A-Z]\w+|LMHeadModel|Model)$")  # how a class's name ends, behind the family's
MISMATCH = "Config.json and weights are of different models, or a file is missing: fetch both again"
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")  # where config.json counts a block's experts
MOST_EXPERTS = 4096
EXPERT_INPUT, EXPERT_MIDDLE = "expert_input", "expert_middle"  # what the taps of experts are called, before a number
BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")  # where it counts the blocks
DECODER_BLOCKS = "num_decoder_layers"  # where a model of an encoder and a decoder counts the latter's
# What names start with alone, and inside of models of pictures and text; at last in those saved without their head.
WRAPPED: tuple[Mapping[str, str], ...] = (
    {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."},
    {"model.": "model.language_model."},
    {"model.": "model.text_model."},
    {"lm_head.": "lm_head.", "model.": ""},
)


@dataclass(frozen=True, kw_only=True)
class Tap:
    """One hidden state inside a block, named, and the linears that read it (module names relative to the block)."""

    name: str
    linears: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What can absorb the column scales of a tap: a norm, whose gain is `offset + weight` (1 in Gemma), or a linear.

    linear: the tap's columns are multiples of what its rows give, in order. fused: of its last rows, which come behind
    those of others. heads: formulas for how many heads the columns are and how many the rows, which heads of the
    columns share in turn; counts: both numbers in a fitted family. "{e}" in the names stands for each expert.
    """

    tap: str
    norm: str = ""
    offset: float = 0.0
    linear: str = ""
    fused: bool = False
    heads: tuple[str, ...] = ()
    counts: tuple[int, int] = (1, 1)

    def fitted(self, config: Mapping[str, Any]) -> Folding | None:
        """This folding in the model with this config.json; None where that does not tell how heads are shared.

        One that has no number of its own for the rows' heads has as many as for the columns', as in transformers.
        """
        if not self.heads:
            return self
        columns, rows = (evaluate(formula, text_config(config)) for formula in self.heads)
        rows = columns if rows is None else rows
        if type(columns) is not int or type(rows) is not int or rows < 1 or columns % rows:
            return None
        return replace(self, counts=(columns, rows))


@dataclass(frozen=True, kw_only=True)
class FusedExperts:
    """How checkpoints that keep a block's experts in two tensors lay them out.

    gate_up and down: their names relative to the block; empty: "<module>.gate_up_proj" and "<module>.down_proj".
    interleaved: rows of gate and up in turn, not one half after the other. transposed: an expert is [I, O].
    """

    gate_up: str = ""
    down: str = ""
    interleaved: bool = False
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a block: their `count`, the module that holds them, and the names of an expert's linears.

    module is a checkpoint name relative to the block ("mlp.experts"), linears are those that gate, widen and narrow
    ("gate_proj", "up_proj", "down_proj"): expert 3 gates with mlp.experts.3.gate_proj. fused: see FusedExperts.
    """

    count: int
    module: str
    linears: tuple[str, str, str]
    fused: FusedExperts = FusedExperts()

    def expert_of(self, module: str) -> tuple[int, str] | None:
        """The number of the expert and the name of its linear, for a module relative to the block; else None."""
        match = re.fullmatch(re.escape(self.module) + r"\.(\d+)\.(\w+)", module)
        return (int(match[1]), match[2]) if match and match[2] in self.linears else None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models. Names are checkpoint names without ".weight"; `block` ends with a dot and holds `{b}`.

    experts is None in dense families. renamed: what names relative to the block begin with in transformers, where the
    checkpoint has something else. gguf is the family's GGUF section as written in its YAML (see
    converter/containers/gguf); None when there is none. runs: as what transformers runs its blocks one by one; "none":
    it does not, so there is nothing to calibrate with and no output to measure. transposed: linears of a block that the
    checkpoint keeps as [I, O]. spellings: what names begin with here, and in checkpoints that have it otherwise.

    wrappers: classes of models of pictures, sound and text whose language model, by the model type that config.json
    gives it, is of this family; GGUF takes that alone.

    residual: what reads the residual stream and adds to it, by entries as written in the YAML; see inner_residual.
    middles: by tap, the linears beside each other whose rows make its columns, one row of each (or, of a linear that is
    several in one, of each part) a column: so columns may change places with their rows.

    decoder: what the blocks of a second stack begin with, in models of an encoder and a decoder; they are numbered on
    behind the encoder's. longest: a formula over config.json for the most tokens of a sequence, where more cannot run.
    Encoders have no head, and some no final norm: "".

    A family as read from its YAML fits any model of it; `fitted` gives it the numbers and the spelling of one. blocks
    is how many that model has (0: not fitted), encoder_blocks how many come before the decoder's, spelling the one it
    uses.
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
    residual: Residual
    middles: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    experts: Experts | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    runs: Runs = "decoder"
    transposed: tuple[str, ...] = ()
    spellings: tuple[Mapping[str, str], ...] = ()
    spelling: Mapping[str, str] = field(default_factory=dict)
    wrappers: tuple[str, ...] = ()
    decoder: str = ""
    longest: str = ""
    blocks: int = 0
    encoder_blocks: int = 0

    def block_of(self, tensor: str) -> int | None:
        """The number of the block that `tensor` (a checkpoint name) belongs to; None for tensors outside the blocks.

        Blocks beyond those that config.json counts, such as those that predict further tokens, are outside.
        """
        b = self.number_of(tensor)
        return None if b is not None and self.blocks and b >= self.blocks else b

    def number_of(self, tensor: str) -> int | None:
        """The number in the name of a block's tensor, also one that config.json does not count; None for others."""
        for stack, pattern in enumerate(self._patterns):
            if match := pattern.match(tensor):
                b = int(match[1])
                if stack:
                    return self.encoder_blocks + b
                return b if not self.decoder or b < self.encoder_blocks else self.blocks + b
        return None

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        """What the names of tensors in blocks begin with, by stack; the group is the block's number there."""
        stacks = (self.block, self.decoder) if self.decoder else (self.block,)
        return tuple(re.compile(re.escape(stack).replace(r"\{b\}", r"(\d+)")) for stack in stacks)

    def prefix(self, b: int) -> str:
        """What the names of block b's tensors begin with."""
        if self.decoder and b >= self.encoder_blocks:
            return self.decoder.format(b=b - self.encoder_blocks)
        return self.block.format(b=b)

    def is_routed(self, tap: Tap) -> bool:
        """Whether routing decides which tokens a tap sees."""
        return self.experts is not None and any(self.experts.expert_of(linear) for linear in tap.linears)

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

    @cached_property
    def inner_residual(self) -> Residual:
        """What touches the residual stream in a block, by modules relative to it; "expert_input" means every expert."""

        def linears_of(entry: str) -> tuple[str, ...]:
            taps = [tap for tap in self.taps if tap.name.partition(".")[0] == entry]
            return tuple(linear for tap in taps for linear in tap.linears) or (entry,)

        return self.residual.named(linears_of)

    @property
    def outer_residual(self) -> Residual:
        """What touches it outside of the blocks: the embedding, the final norm and the head, by checkpoint names."""
        return replace(self.residual, reads={"": (self.embedding,), self.final_norm: (self.head,)}, writes=(), inner=())

    def inner(self, name: str) -> str:
        """A name relative to the block as transformers has it."""
        start = next((start for start in self.renamed if name.startswith(start)), "")
        return self.renamed[start] + name.removeprefix(start) if start else name

    def canonical(self, name: str) -> str:
        """A checkpoint name as the family's YAML, and transformers' model of the family alone, spell it."""
        for ours, theirs in self.spelling.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def spelled(self, name: str) -> str:
        """The inverse of `canonical`: a name as this model's checkpoint has it."""
        for ours, theirs in self.spelling.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def fitted(self, config: Mapping[str, Any], tensors: Collection[str], where: str) -> Architecture:
        """This family for the model with this config.json and these tensors: its experts and blocks, its names.

        Experts get taps of their own: "expert_input.3" for expert 3. The spelling is the one that finds most of the
        modules outside the blocks. Raises SourceError when config.json does not count the experts or the blocks.
        """
        own = self._with_experts(config, where) if self.experts else self
        count = declared_blocks(config)
        more = 0 if not self.decoder else config.get(DECODER_BLOCKS) or count
        if type(count) is not int or count < 1 or type(more) is not int:
            what = f"config.json gives {count!r} for {BLOCK_COUNTS[0]}, not a number of blocks"
            raise SourceError(where, what, "Complete config.json from the model's original")
        wrapped = WRAPPED if self.embedding.startswith("model.") else ()
        spellings: tuple[Mapping[str, str], ...] = ({}, *self.spellings, *wrapped)
        candidates = [replace(own, spelling=spelling) for spelling in spellings]
        outside = [f"{module}.weight" for module in (self.embedding, self.final_norm, self.head)]
        found = max(candidates, key=lambda one: sum(one.spelled(name) in tensors for name in outside))
        return replace(
            found,
            foldings=tuple(folding for one in own.foldings if (folding := one.fitted(config))),
            gguf=found.gguf and _of_case(found.gguf, config),
            blocks=count + more,
            encoder_blocks=count if self.decoder else 0,
            block=found.spelled(self.block),
            decoder=found.spelled(self.decoder),
            embedding=found.spelled(self.embedding + ".").removesuffix("."),
            final_norm=found.spelled(self.final_norm + ".").removesuffix("."),
            head=found.spelled(self.head + ".").removesuffix("."),
        )

    def _with_experts(self, config: Mapping[str, Any], where: str) -> Architecture:
        assert self.experts is not None
        given = [text_config(config).get(key) for key in EXPERT_COUNTS]
        count = next((value for value in given if value is not None), None)
        if type(count) is not int or not 1 <= count <= MOST_EXPERTS:
            what = f"config.json gives {count!r} for {' or '.join(EXPERT_COUNTS)}, not a number of experts"
            raise SourceError(where, what, "Complete config.json from the model's original")
        experts = replace(self.experts, count=count)
        gate, up, down = experts.linears
        taps, middles = list(self.taps), dict(self.middles)
        foldings = [folding for folding in self.foldings if "{e}" not in folding.tap]
        for e in range(count):
            own = f"{experts.module}.{e}"
            foldings += [
                replace(folding, tap=folding.tap.format(e=e), linear=folding.linear.format(e=e))
                for folding in self.foldings
                if "{e}" in folding.tap
            ]
            taps.append(Tap(name=f"{EXPERT_INPUT}.{e}", linears=(f"{own}.{gate}", f"{own}.{up}")))
            taps.append(Tap(name=f"{EXPERT_MIDDLE}.{e}", linears=(f"{own}.{down}",)))
            middles[f"{EXPERT_MIDDLE}.{e}"] = f"{own}.{gate}", f"{own}.{up}"
        return replace(self, experts=experts, taps=tuple(taps), foldings=tuple(foldings), middles=middles)


def _of_case(section: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A GGUF section with what is otherwise in the cases that config.json is of, by the formula that is true then."""
    for formula, changes in section.get("cases", {}).items():
        if evaluate(formula, config):
            section = {**section, **changes}
    return section


def block_count(config: Mapping[str, Any]) -> int:
    """The number of blocks that config.json declares, which it must."""
    return int(declared_blocks(config))


def declared_blocks(config: Mapping[str, Any]) -> Any:
    """What config.json gives as its number of blocks, None when nothing; multi-modal ones keep it in `text_config`."""
    inner = text_config(config)
    return next((inner[key] for key in BLOCK_COUNTS if inner.get(key) is not None), None)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says about the language model: its `text_config`, or all of it when it has none."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def code_notes(config: Mapping[str, Any], family: Architecture | None) -> tuple[str, ...]:
    """What a plan says about a model that brings code along, a sentence without full stop; nothing of others."""
    if not config.get("auto_map") or family is None or family.runs == "none":
        return ()
    said = "config.json names code that comes with the model (auto_map), which is never run"
    return (f"{said}: the model is taken for {family.name} as transformers knows it",)


def check_blocks(architecture: Architecture, config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """Raise SourceError unless the blocks that `tensors` name are those that config.json counts.

    architecture is fitted. Beyond them there may be as many as config.json counts for predicting further tokens (MTP):
    those are outside, see block_of.
    """
    count, ahead = architecture.blocks, text_config(config).get("num_nextn_predict_layers") or 0
    named = {b for b in map(architecture.number_of, tensors) if b is not None}
    beyond = [b for b in named if b >= count]
    if len(beyond) > ahead:
        what = f"config.json counts {count} blocks, and the weights hold block {max(beyond)}, too"
        raise SourceError(where, what, MISMATCH)
    stored = {b for b in named if b < count}
    if len(stored) < count:  # a count beyond reason makes no set of that size
        missing = next(b for b in range(count) if b not in stored)
        held = f"the weights hold {len(stored)} of them: block {missing} is missing" if stored else "none is there"
        what = f"config.json counts {count} blocks, and {held}"
        raise SourceError(where, what, MISMATCH)


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as people write them: "0 to 3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join(" to ".join(map(str, run)) for run in runs)


@cache
def _texts() -> Mapping[str, str]:
    """Every YAML of an architecture by its name."""
    folder = resources.files("converter") / "architectures"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {name.removesuffix(".yaml"): (folder / name).read_text("utf-8") for name in names}


@cache
def _family(name: str) -> Architecture:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C it is ten times as fast, where PyYAML has it
    return parse(name, yaml.load(_texts()[name], Loader=loader))


def families() -> tuple[Architecture, ...]:
    """Every architecture that has a YAML."""
    return tuple(map(_family, _texts()))


def parse(name: str, data: Mapping[str, Any]) -> Architecture:
    """The architecture that one YAML describes; what has a default in Architecture may be left out."""
    return Architecture(
        name=name,
        classes=tuple(data["classes"]),
        block=data["block"],
        taps=tuple(Tap(name=tap, linears=tuple(linears)) for tap, linears in data["taps"].items()),
        foldings=tuple(
            Folding(**folding | {"heads": tuple(folding.get("heads", ()))}) for folding in data.get("foldings", ())
        ),
        embedding=data["embedding"],
        final_norm=data.get("final_norm", ""),
        head=data.get("head", "" if data.get("runs") == "encoder" else "lm_head"),
        gguf=data.get("gguf"),
        residual=parse_residual(data["residual"]),
        middles={tap: tuple(linears) for tap, linears in data.get("middles", {}).items()},
        experts=_experts(data["experts"]) if "experts" in data else None,
        renamed=data.get("renamed", {}),
        runs=data.get("runs", "decoder"),
        transposed=tuple(data.get("transposed", ())),
        spellings=tuple(data.get("spellings", ())),
        wrappers=tuple(data.get("wrappers", ())),
        decoder=data.get("decoder", ""),
        longest=data.get("longest", ""),
    )


def _experts(data: Mapping[str, Any]) -> Experts:
    fused = FusedExperts(**data.get("fused", {}))
    return Experts(count=0, module=data["module"], linears=tuple(data["linears"]), fused=fused)


def find(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a model with this config.json, not yet fitted; `where` names the model in the error.

    Where config.json lists no class, its model type is that of a family. Raises UnsupportedError, naming the nearest
    known class, when no YAML lists the model's, and SourceError when config.json says something else there than names.
    """
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        what = f"config.json gives {classes!r} for architectures, not a list of names"
        raise SourceError(where, what, "Mend config.json, or fetch it again")
    if not config:
        what = "there is no config.json, so its architecture is not known"
        remedy = (
            "Put the original config.json beside the weights, or choose parquet or compressed-tensors with method rtn"
        )
        raise UnsupportedError(where, what, remedy)
    for name in classes:
        for family, text in _texts().items():  # all of them take 70 ms to parse
            if name in text and name in _family(family).classes:
                return _family(family)
    table: dict[str, Architecture] = {}
    wrapping: list[Architecture] = []
    known = families()
    for architecture in known:
        table |= dict.fromkeys(architecture.classes, architecture)
        wrapping += [architecture] if set(classes) & set(architecture.wrappers) else []
    if not classes and (alike := [family for family in known if family.name == config.get("model_type")]):
        return alike[0]
    inside = str(text_config(config).get("model_type", "")).removesuffix("_text")
    for architecture in wrapping:
        if architecture.name == inside:
            return architecture
    wanted = ", ".join(classes) or f"no architecture and '{config.get('model_type')}' for a model type"
    if wrapping:
        wanted += f" with a language model of type '{inside}'"
    stems = {HEADS.sub("", name): name for name in sorted(table, reverse=True)}
    near = difflib.get_close_matches(HEADS.sub("", classes[0]) if classes else inside, stems, n=1, cutoff=0.5)
    hint = f"The nearest known one is {stems[near[0]]}; add" if near else "Add"
    raise UnsupportedError(
        where,
        f"config.json names {wanted}, which none of the {len(known)} files in converter/architectures describes",
        f"{hint} a YAML for it (docs/adding-an-architecture.md), or choose parquet or compressed-tensors with method "
        "rtn, which need no architecture",
    )
