"""What can be made of one model, without a manifest: a plan of every format at once, from headers and small files.

Whoever meets a model first wants to know whether it can be converted at all, what stands against it, what would be left
out and how large the results would be; all problems together, for each costs a download or a mail to an author. Tensors
that are alike cost alike, so of formats that store tensor by tensor only one of each kind is planned, and counted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from converter.adapt import adapt
from converter.architecture import COMPUTED, Architecture, check_blocks, code_notes, families, find, text_config
from converter.containers.gguf import requantize
from converter.containers.gguf.inspect import Inspected, inspect
from converter.containers.gguf.source import bundle_of
from converter.containers.gguf.tokenizer import describe_tokenizer
from converter.containers.tables import CONTAINERS
from converter.errors import HubmillError, UnsupportedError
from converter.manifest import Target
from converter.source import Header, Snapshot, open_folder
from converter.untrusted import parse_json, read_small
from jobs.agreement import check_agreement

# The first of them is quantized, so that its metadata are those of a quantized file.
GGUF_TYPES = ("Q8_0", "F16", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_S", "IQ2_S", "IQ1_S")
SCHEMES = {"compressed-tensors": ("W4A16", "W8A16", "W8A8"), "parquet": ("INT8", "INT4", "INT2")}
NUMBER = re.compile(r"^(.*?\.)(\d+)\.")
MOST_TOKENS = 1 << 20  # of a tokenizer whose embedding is not known
SHOWN = 8  # names that a sentence lists


def survey(source: str, cache: Path) -> dict[str, Any]:
    """Everything about the model at `source` ("folder:..." or "hub:..."), as JSON values.

    cache receives the small files of a model on a hub. `problems` are sentences, each saying what to do; without any,
    every format can be made, and of a GGUF model GGUF.
    """
    where = f"model '{source.partition(':')[2]}'"
    try:
        snapshot = resolve(source, cache, where)
    except HubmillError as error:
        problems = [str(error), *_small_problems(source, where)]
        return {"source": source, "problems": problems, "formats": {}}
    found: dict[str, Any] = {
        "source": source,
        "repo": snapshot.repo,
        "commit": snapshot.commit,
        "classes": list(snapshot.config.get("architectures") or []),
        "tensors": len(snapshot.tensors),
        "parameters": sum(math.prod(header.shape) for header in snapshot.tensors.values()),
        "bytes": snapshot.size_bytes,
        "types": dict(Counter(header.dtype for header in snapshot.tensors.values())),
    }
    return found | (_of_gguf(snapshot) if snapshot.gguf else _of_checkpoint(snapshot, where))


def resolve(source: str, cache: Path, where: str) -> Snapshot:
    """The model's snapshot; the client of hubs, which takes a second to import, comes in only for a hub."""
    if source.startswith("folder:"):
        return open_folder(Path(source.removeprefix("folder:")), where)
    from converter import hub

    return hub.resolve(source, cache, where)


def _of_gguf(snapshot: Snapshot) -> dict[str, Any]:
    """Of a model that is GGUF already: its other types."""
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for type in GGUF_TYPES:
        target = Target(name=type.lower(), format="gguf", type=type, requantize=True)
        try:
            sizes[type] = sum(requantize.plan(snapshot, target).files.values())
        except HubmillError as error:
            if type == GGUF_TYPES[0]:  # others ask for importance, which a manifest can name
                problems.append(str(error))
    bundle = bundle_of(snapshot)
    other = "the source is GGUF, which becomes GGUF of other types"
    tokens = bundle.get("tokenizer.ggml.tokens")
    return {
        "family": str(bundle.get("general.architecture") or ""),
        "blocks": snapshot.config["num_hidden_layers"],
        "tokenizer": {
            "model": str(bundle.get("tokenizer.ggml.model") or ""),
            "pre": str(bundle.get("tokenizer.ggml.pre") or ""),
            "tokens": len(tokens) if tokens else 0,
        },
        "formats": {"gguf": {"possible": not problems, "why": "; ".join(problems), "bytes": sizes}}
        | {name: {"possible": False, "why": other, "bytes": {}} for name in SCHEMES},
        "dropped": [],
        "notes": [],
        "problems": problems,
    }


def _of_checkpoint(snapshot: Snapshot, where: str) -> dict[str, Any]:
    problems: list[str] = []
    architecture: Architecture | None = None
    disagrees = False
    try:
        architecture = find(snapshot.config, where)
    except HubmillError as error:
        nearest = resemblance(snapshot.tensors, str(snapshot.config.get("model_type")))
        problems.append(f"{error} {nearest}" if isinstance(error, UnsupportedError) else str(error))
        disagrees = not isinstance(error, UnsupportedError)
    dropped: dict[str, str] = {
        name: "whoever runs the model computes it" for name in snapshot.tensors if COMPUTED.search(name)
    }
    snapshot = replace(snapshot, tensors={name: one for name, one in snapshot.tensors.items() if name not in dropped})
    gguf = Inspected(sizes={}, dropped={})
    if architecture is not None:
        try:
            snapshot, architecture = adapt(snapshot, architecture, where)
            check_blocks(architecture, snapshot.config, snapshot.tensors, where)  # what follows counts up to as many
            gguf = inspect(snapshot, architecture, [_gguf_target(type) for type in GGUF_TYPES])
            check_agreement(snapshot, architecture, where)
        except HubmillError as error:
            problems.append(str(error))
            disagrees = True
    if not gguf.architecture:  # GGUF was not asked
        problems += _tokenizer_problems(snapshot.folder, snapshot.config, where)
    said = [str(error) for error in gguf.problems]
    refused = "; ".join(said) or ("" if gguf.sizes else problems[0] if problems else "")
    formats: dict[str, Any] = {
        "gguf": {"possible": bool(gguf.sizes) and not disagrees, "why": refused, "bytes": dict(gguf.sizes)}
    }
    for format, schemes in SCHEMES.items():
        sizes, why = _plain_sizes(snapshot, None if disagrees else architecture, format, schemes)
        said += [why] if why else []
        formats[format] = {"possible": bool(sizes) and not disagrees, "why": why, "bytes": sizes}
    if disagrees:
        for entry in formats.values():
            entry["why"] = entry["why"] or problems[0]
    dropped |= gguf.dropped
    return {
        "family": architecture.name if architecture else None,
        "gguf_architecture": gguf.architecture or None,
        "blocks": architecture.blocks if architecture else None,
        "experts": architecture.experts.count if architecture and architecture.experts else 0,
        "tokenizer": vars(gguf.tokenizer) if gguf.tokenizer else None,
        "formats": formats,
        "dropped": grouped(dropped, architecture),
        "notes": [*code_notes(snapshot.config, architecture), *gguf.notes],
        "problems": list(dict.fromkeys([*problems, *said])),
    }


def _gguf_target(type: str) -> Target:
    return Target(name=type.lower(), format="gguf", type=type, imatrix=type.startswith("IQ"))


def _plain_sizes(
    snapshot: Snapshot, architecture: Architecture | None, format: str, schemes: Sequence[str]
) -> tuple[dict[str, int], str]:
    """Bytes of all tensors by scheme in a format that stores tensor by tensor, and why it cannot be had."""
    kinds, counts = representatives(snapshot.tensors, architecture)
    few = replace(snapshot, tensors=kinds)
    sizes: dict[str, int] = {}
    for scheme in schemes:
        target = Target.model_validate({"name": scheme.lower(), "format": format, "scheme": scheme}).with_defaults()
        try:
            plan = CONTAINERS[format].plan(few, architecture, target)
        except HubmillError as error:
            return {}, str(error)
        sizes[scheme] = sum(counts[tensor.source] * tensor.size_bytes for tensor in plan.tensors)
    return sizes, ""


def representatives(
    tensors: Mapping[str, Header], architecture: Architecture | None
) -> tuple[dict[str, Header], Counter[str]]:
    """One tensor of each kind, and how many there are by its name: alike in shape, type and whether it is a linear."""
    first: dict[tuple[object, ...], str] = {}
    counts: Counter[str] = Counter()
    for name, header in tensors.items():
        local = NUMBER.sub("", name) if architecture is None else architecture.is_linear(name)
        counts[first.setdefault((local, header.shape, header.dtype), name)] += 1
    return {name: tensors[name] for name in counts}, counts


def grouped(dropped: Mapping[str, str], architecture: Architecture | None) -> list[dict[str, Any]]:
    """Tensors that are left out, those of one block or one part of the model with one reason as one."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in dropped.items():
        groups.setdefault((_part(name, architecture), reason), []).append(name)
    return [
        {"tensors": _shown(part, names), "count": len(names), "reason": reason}
        for (part, reason), names in groups.items()
    ]


def _shown(part: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    return f"{part}*" if part.endswith(".") else part


def _part(name: str, architecture: Architecture | None) -> str:
    """What the names of a part begin with: a block that is left out, what all have, a tower beside them."""
    number = NUMBER.match(name)
    if number and architecture and architecture.block_of(name) is not None:
        return f"{number[1]}*.{name.removeprefix(number[0])}"
    if number and architecture and architecture.number_of(name) is not None:
        return number[0]
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}." if first == "model" else f"{first}."


def resemblance(tensors: Mapping[str, Header], kind: str) -> str:
    """Which known family has blocks most like these, in a sentence, and what an adapter would have to add.

    kind: the model type, which decides between families alike.
    """
    numbered = Counter(match[1] for match in map(NUMBER.match, tensors) if match)
    if not numbered:
        return ""
    prefix, _ = numbered.most_common(1)[0]
    own = {
        NUMBER.sub("", name).removesuffix(".weight").removesuffix(".bias")
        for name in tensors
        if name.startswith(prefix) and NUMBER.match(name)
    }
    own = {re.sub(r"\.\d+\.", ".*.", name) for name in own}
    known = {family.name: _modules(family) for family in families()}
    alike = {name: SequenceMatcher(None, name, kind).ratio() for name in known}
    nearest = max(known, key=lambda name: (len(own & known[name]), -len(known[name] - own), alike[name]))
    more = own - known[nearest]
    if 2 * len(more) > len(own):
        return f"Its blocks, {prefix}0 and so on, are unlike those of the known families: they have {_names(own)}."
    if not more:
        return f"All {len(own)} modules of its blocks are named as in {nearest}."
    shared = f"{len(own) - len(more)} of the {len(own)} modules of its blocks are named as in {nearest}"
    return f"{shared}; an adapter would have to say what {_names(more)} are."


def _modules(family: Architecture) -> set[str]:
    linears = {linear for tap in family.taps for linear in tap.linears}
    section = family.gguf or {}
    modules = set(section.get("modules", ()))
    modules |= {name.removesuffix(".weight").removesuffix(".bias") for name in section.get("names", ())}
    experts = family.experts
    return linears | modules | ({f"{experts.module}.*.{name}" for name in experts.linears} if experts else set())


def _names(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return f"{shown} and {len(names) - SHOWN} more" if len(names) > SHOWN else shown


def _small_problems(source: str, where: str) -> Iterator[str]:
    """What else is wrong with a folder whose weights cannot be read: its architecture, its tokenizer."""
    folder = Path(source.removeprefix("folder:"))
    if not source.startswith("folder:") or not (folder / "config.json").is_file():
        return
    try:
        config = parse_json(read_small(folder / "config.json", where), f"{where}: config.json")
        find(config, where)
    except (HubmillError, OSError) as error:
        yield str(error)
        return
    yield from _tokenizer_problems(folder, config, where)


def _tokenizer_problems(folder: Path, config: Mapping[str, Any], where: str) -> Iterator[str]:
    """What is wrong with a tokenizer, where GGUF cannot be asked as a whole."""
    rows = text_config(config).get("vocab_size")
    try:
        describe_tokenizer(folder, config, rows if type(rows) is int else MOST_TOKENS, where)
    except HubmillError as error:
        yield str(error)
