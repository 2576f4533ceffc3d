"""The model card: README.md of an artifact, written from what was measured on it.

Front matter for the hub, then Markdown for people. Names, licences and file names come from strangers, so they enter by
three doors only: `quoted` for the front matter (JSON strings, which YAML reads alike), `plain` for running text and
`code` for names. What the hub takes as an identifier (licence, language, tag) is inherited only when it looks like one.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from converter.compare import wording
from converter.front_matter import HUB_NAME, read_front_matter
from converter.manifest import Calibration, Evaluation, Target
from converter.manifest_rules import WITHOUT_STATISTICS
from converter.marks import Items, Node, Text
from converter.provenance import FILE
from converter.schemes import SCHEMES
from converter.source import Snapshot

IDENTIFIER = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}")
INHERITED_TAGS = 20
MARKDOWN = re.compile(r"[\\`*_\[\]|~#$@]|^[-+=]")  # what starts something inside a line, and at its beginning
ADDRESS = re.compile(r"(?<=:)//|(?<=\bwww)\.", re.IGNORECASE)  # by which hubs make a link of bare text
ENTITIES: Mapping[str, str] = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
# What transformers needs beside itself for a format.
EXTRAS: Mapping[str, str] = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "optimum gptqmodel",
    "gptq_v2": "optimum gptqmodel",
    "auto-round": "auto-round",
    "awq": "optimum gptqmodel",
    "bitsandbytes": "bitsandbytes accelerate",
    "fp8": "accelerate",
    "torchao": "torchao",
}
LIBRARIES: Mapping[str, str] = {"gguf": "gguf", **dict.fromkeys(EXTRAS, "transformers")}  # as the hub calls them
METHODS: Mapping[str, str] = {
    "rtn": "each weight to the nearest value of its grid",
    "gptq": "column by column, each column's error pushed onto the next ones (GPTQ)",
    "hqq": "each weight to the nearest value of its grid, offsets moved to leave large errors to few weights (HQQ)",
    "autoround": "rounding and scales learned from the output of each block, by signs of gradients (AutoRound)",
    "smoothquant": "outliers of the activations moved into the weights (SmoothQuant)",
    "awq": "columns that large activations meet stretched before rounding (AWQ)",
    "rotation": "residual stream and values of the heads in a rotated basis, merged into the weights (QuaRot)",
    "reorder": "columns of like range beside each other in the middle of each MLP, merged into the weights (RPTQ)",
}


@dataclass(frozen=True, kw_only=True)
class Snippet:
    """A few lines to copy, and what they are for."""

    said: str
    language: str
    lines: Sequence[str]


def card_text(
    row: Mapping[str, Any],
    snapshot: Snapshot,
    target: Target,
    repo: str,
    calibration: Calibration,
    evaluation: Evaluation | None = None,
) -> str:
    """The model card of one artifact.

    row: its row of the comparison, with the original's figures in row["source"]; repo: where it will be published, as
    owner/name or owner/name@branch, empty for nowhere; evaluation: the text behind the figures, named when it is given.
    """
    inherited, problem = read_front_matter(snapshot.folder)
    parts = [
        _front_matter(row, snapshot, target, inherited),
        _introduction(row, snapshot, target, inherited, problem),
        _figures(row, evaluation),
        _how_made(row, target, calibration),
        _how_loaded(row, target, repo),
        _warnings(row),
        _notes(row),
        _checksums(row),
    ]
    return "\n".join(part for part in parts if part)


def quoted(text: object) -> str:
    """The text as a quoted YAML scalar on one line: JSON without control characters is YAML that means the same."""
    return json.dumps(wording.one_line(text), ensure_ascii=False)


def plain(text: object) -> str:
    """The text as Markdown that shows it and does nothing else: no HTML, link, address, emphasis, list or mention."""
    shown = MARKDOWN.sub(lambda found: f"\\{found.group()}", wording.one_line(text))
    shown = re.sub(r"^(\d+)([.)])", r"\1\\\2", shown)
    shown = re.sub("[<>&]", lambda found: ENTITIES[found.group()], shown)
    return ADDRESS.sub(lambda found: "".join(f"&#{ord(mark)};" for mark in found.group()), shown)


def code(text: object) -> str:
    """The text as a code span, whatever backticks are in it."""
    shown = wording.one_line(text)
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{shown}{space}{fence}" if shown else ""


def _words(node: Node | None) -> list[str]:
    """A scalar, or the scalars of a list."""
    nodes = node.values if isinstance(node, Items) else (node,)
    return [one.text for one in nodes if isinstance(one, Text) and not one.is_null]


def _identifiers(node: Node | None) -> list[str]:
    return [word for word in _words(node) if IDENTIFIER.fullmatch(word)]


def _scalar_or_list(words: Sequence[str]) -> str:
    return quoted(words[0]) if len(words) == 1 else f"[{', '.join(map(quoted, words))}]"


def _front_matter(row: Mapping[str, Any], snapshot: Snapshot, target: Target, inherited: Mapping[str, Node]) -> str:
    """What the hub reads: where the artifact comes from, its licence, how it is found."""
    lines = ["---"]
    if _on_hub(snapshot):
        lines += [f"base_model: {quoted(snapshot.repo)}", "base_model_relation: quantized"]
    else:
        lines += [f"model_name: {quoted(row['model'])}", "base_model_relation: quantized"]
    lines += _licence(row, snapshot, inherited)
    if languages := _identifiers(inherited.get("language")):
        lines.append(f"language: {_scalar_or_list(languages)}")
    trained_on = [word for word in _words(inherited.get("datasets")) if HUB_NAME.fullmatch(word)]
    if trained_on:
        lines.append(f"datasets: [{', '.join(map(quoted, trained_on))}]")
    if library := LIBRARIES.get(target.format):
        lines.append(f"library_name: {library}")
        if task := _identifiers(inherited.get("pipeline_tag")):
            lines.append(f"pipeline_tag: {quoted(task[0])}")
    scheme = [str(row["scheme"]).lower()] if row.get("scheme") else []
    own = [target.format, "quantized", *scheme]
    tags = dict.fromkeys(own + _identifiers(inherited.get("tags"))[:INHERITED_TAGS])
    lines += [f"tags: {_scalar_or_list(list(tags))}", "quantized_by: hubmill", "---", ""]
    return "\n".join(lines)


def _on_hub(snapshot: Snapshot) -> bool:
    return snapshot.source.startswith("hub:") and bool(HUB_NAME.fullmatch(snapshot.repo))


def _licence(row: Mapping[str, Any], snapshot: Snapshot, inherited: Mapping[str, Node]) -> list[str]:
    """The original's licence, its name and where its text is, as far as they are given in a form the hub takes."""
    licences = _identifiers(inherited.get("license"))
    lines = [f"license: {_scalar_or_list(licences)}"] if licences else []
    lines += [f"license_name: {quoted(name)}" for name in _words(inherited.get("license_name"))[:1]]
    for link in _words(inherited.get("license_link"))[:1]:
        travelled = link in [file["path"] for file in row["files"]]
        if travelled or re.fullmatch(r"https?://[^\s<>\"]{1,300}", link):
            lines.append(f"license_link: {quoted(link)}")
        elif _on_hub(snapshot) and link in snapshot.files:
            lines.append(
                f"license_link: {quoted(f'https://huggingface.co/{snapshot.repo}/blob/{snapshot.commit}/{link}')}"
            )
    return lines


def _introduction(
    row: Mapping[str, Any], snapshot: Snapshot, target: Target, inherited: Mapping[str, Node], problem: str
) -> str:
    """What this is, how large, of what it was made, and under which licence."""
    origin = plain(snapshot.repo)
    if _on_hub(snapshot):
        origin = f"[{origin}](https://huggingface.co/{snapshot.repo})"
    ratio, bits = wording.ratio(row["compression_ratio"]), wording.figure(row["bits_per_weight"])
    smaller = f"{ratio} smaller than the original" if row["compression_ratio"] > 1 else "no smaller than the original"
    lines = [
        f"# {plain(row['model'])}, {plain(row.get('scheme') or target.name)} in {plain(target.format)}",
        "",
        f"Made by hubmill from {origin} at commit {code(snapshot.commit)}: "
        f"**{wording.bytes_text(row['size_bytes'])}**, {bits} bits per weight, {smaller}.",
        "",
    ]
    if gap := _licence_gap(inherited, problem):
        lines += [plain(gap), ""]
    return "\n".join(lines)


def stated_licence(folder: Path) -> tuple[str, str]:
    """The licence that the card in a model's folder states, and, where none is to be had, why in a sentence."""
    inherited, problem = read_front_matter(folder)
    return ", ".join(_identifiers(inherited.get("license"))), _licence_gap(inherited, problem)


def _licence_gap(inherited: Mapping[str, Node], problem: str) -> str:
    named = _words(inherited.get("license"))
    if problem:
        return f"The front matter of the original's card could not be read: {problem}"
    if not named:
        return "The original's card names no licence."
    if not _identifiers(inherited.get("license")):
        return f"The original's card names its licence as “{named[0]}”, which is no identifier."
    return ""


def _figures(row: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """The table of the original against this artifact, and what the figures were measured on."""
    source, output, weight = row["source"], row["output"], row["weight"]
    parameters = source["parameters"]
    rows = [
        ("size of the weights", wording.bytes_text(source["size_bytes"]), wording.bytes_text(row["size_bytes"])),
        (
            "bits per weight",
            wording.figure(8 * source["size_bytes"] / parameters),
            wording.figure(row["bits_per_weight"]),
        ),
    ]
    if "embedding_cosine" in output:
        rows += [
            ("mean cosine of the embeddings", "1", wording.cosine(output["embedding_cosine"])),
            ("lowest of these cosines", "1", wording.cosine(output["embedding_cosine_min"])),
            ("same nearest neighbour", wording.share(1.0), wording.share(output.get("neighbour_agreement"))),
            ("relative error of the hidden states", "0", wording.figure(output["hidden_relative_mse"])),
        ]
    elif output:
        mine, original = output["perplexity"], source.get("perplexity")
        moved = f" ({wording.change(mine / original - 1)})" if original else ""
        rows += [
            ("perplexity per token", wording.figure(original), wording.figure(mine) + moved),
            ("mean KL divergence, nats per token", "0", wording.figure(output["kl_mean"])),
            ("99th percentile of it", "0", wording.figure(output.get("kl_p99"))),
            ("same most likely token", wording.share(1.0), wording.share(output["top1_agreement"])),
        ]
    rows.append(("cosine of the weights", "1", wording.cosine(weight["cosine"])))
    lines = ["## What it loses", "", "| | original | this |", "|---|---:|---:|"]
    lines += [f"| {name} | {first} | {second} |" for name, first, second in rows]
    said = ["Measured on the published files, decoded again and run beside the original."]
    text = f": {plain(wording.rows_of(evaluation.model_dump(), 'evaluation'))}" if evaluation else ""
    if "embedding_cosine" in output:
        said.append(f"Embeddings are those of {source['tokens']:,} tokens, none used to calibrate{text}.")
        said.append("A text's neighbour is the one with the nearest embedding among the others.")
    elif output:
        if tokens := source.get("tokens"):
            said.append(f"The model's figures are over {tokens:,} predicted tokens, none used to calibrate{text}.")
        said.append("KL is KL(original ‖ this) of the next token. Compare perplexity with the original's only.")
    else:
        said = ["Measured on the published files, decoded again; the model itself could not be run."]
    return "\n".join([*lines, "", " ".join(said), ""])


def _how_made(row: Mapping[str, Any], target: Target, calibration: Calibration) -> str:
    """Format, scheme, method with its settings, calibration; not the time, so the same work gives the same card."""
    methods = [f"{code(name)}: {METHODS[name]}" if name in METHODS else code(name) for name in row["method"]]
    facts = [("format", f"{code(target.format)}, {code(row['scheme'])}" if row.get("scheme") else code(target.format))]
    facts.append(("method", "; then ".join(methods)))
    if target.granularity:
        size = f" of {target.group_size} input columns" if target.group_size else ""
        facts.append(("scales", f"one per {target.granularity}{size}"))
    if target.symmetric is not None:
        facts.append(("codes", "symmetric around zero" if target.symmetric else "with a zero point"))
    if target.granularity:
        facts.append(("range of the grid", f"observer {code(target.observer)}"))
    if target.fixes_inputs:
        facts.append(("range of the inputs", f"fixed beforehand, observer {code(target.input_observer)}"))
    if target.kv_cache:
        each = "a scale for each head" if target.kv_cache.endswith("_HEAD") else "one scale a layer"
        facts.append(("keys and values", f"kept as {code(target.kv_cache.partition('_')[0])}, {each}"))
    if target.search == "thorough":
        facts.append(("search", "thorough: scales and codes of less error than ggml's own, in the same format"))
    if target.weighs_columns:
        origin = f"from {code(target.imatrix_file.name)}" if target.imatrix_file else "imatrix"
        facts.append(("importance", f"errors weighed by the squares of each input column ({origin})"))
    if target.pure:
        facts.append(("mixture", "none: every matrix in the base type"))
    outer = (("output head", target.output_type), ("embedding", target.embedding_type))
    facts += [(name, code(type)) for name, type in outer if type]
    facts += [("exception", f"{code(rule.pattern)} as {code(rule.type)}") for rule in target.rules]
    if target.collects_imatrix or target.fixes_ranges or set(row["method"]) - {*WITHOUT_STATISTICS}:
        facts.append(("calibration", plain(wording.rows_of(calibration.model_dump(), "calibration"))))
    return "\n".join(["## How it was made", "", *[f"- {name}: {value}" for name, value in facts], ""])


def _weights(row: Mapping[str, Any], pattern: str) -> list[str]:
    return sorted(wording.one_line(file["path"]) for file in row["files"] if fnmatch(file["path"], pattern))


def _load_gguf(row: Mapping[str, Any], target: Target, place: str, branch: str) -> Sequence[Snippet]:
    file = shlex.quote((_weights(row, "*.gguf") or ["model.gguf"])[0])
    revision = f" --revision {shlex.quote(branch)}" if branch else ""
    lines = [f"hf download {place} {file}{revision} --local-dir ."] if place != "." else []
    program, more = ("llama-embedding", "") if "embedding_cosine" in row["output"] else ("llama-cli", " -n 64")
    lines.append(f'{program} -m {file} -p "Once upon a time"{more}')
    return [Snippet(said="With llama.cpp:", language="sh", lines=lines)]


def _load_transformers(row: Mapping[str, Any], target: Target, place: str, branch: str) -> Sequence[Snippet]:
    embeds = "embedding_cosine" in row["output"]
    loader = "AutoModel" if embeds else "AutoModelForCausalLM"
    revision = f", revision={json.dumps(branch)}" if branch else ""
    lines = [
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f"place = {json.dumps(place)}",
        f"tokenizer = AutoTokenizer.from_pretrained(place{revision})",
        f"model = {loader}.from_pretrained(place{revision})",
        'prompt = tokenizer("Once upon a time", return_tensors="pt")',
        "print(model(**prompt).last_hidden_state.shape)"
        if embeds
        else "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))",
    ]
    said = f"With transformers, after `pip install transformers {EXTRAS[target.format]}`:"
    found = [Snippet(said=said, language="python", lines=lines)]
    if target.format == "compressed-tensors" and _weights(row, "modules.json"):
        found.append(_load_sentence_transformers(target, place, revision))
    return found


def _load_sentence_transformers(target: Target, place: str, revision: str) -> Snippet:
    """It calls a model's `forward`, before which weights have to be decoded: config.json asks for it where it can."""
    said = "With sentence-transformers, after `pip install sentence-transformers compressed-tensors`"
    lines, settings = ["from sentence_transformers import SentenceTransformer", ""], ""
    if target.scheme and SCHEMES[target.format][target.scheme].activations:
        said += " (weights only: inputs are not rounded)"
        lines.insert(1, "from transformers import CompressedTensorsConfig")
        settings = ', model_kwargs={"quantization_config": CompressedTensorsConfig(dequantize=True)}'
    lines += [
        f"model = SentenceTransformer({json.dumps(place)}{revision}{settings})",
        'print(model.encode("Once upon a time").shape)',
    ]
    return Snippet(said=f"{said}:", language="python", lines=lines)


def _load_parquet(row: Mapping[str, Any], target: Target, place: str, branch: str) -> Sequence[Snippet]:
    files = _weights(row, "model*.parquet")
    table = files[0] if len(files) == 1 else "model*.parquet"
    select = "SELECT layer_name, quant_type, sum(num_params) AS weights, sum(octet_length(data)) AS bytes"
    query = [select, f"FROM '{table}' GROUP BY ALL ORDER BY bytes DESC LIMIT 10;"]
    read = [
        "from pathlib import Path",
        "",
        "from converter.containers.parquet_open import open_parquet",
        "",
        'model = open_parquet(Path("."))',
        "weight = model.read(model.names[0])",
    ]
    return [
        Snippet(said="Where the bytes are, in duckdb:", language="sql", lines=query),
        Snippet(said="The weights as tensors, with hubmill:", language="python", lines=read),
    ]


LOADING: Mapping[str, Callable[[Mapping[str, Any], Target, str, str], Sequence[Snippet]]] = {
    "gguf": _load_gguf,
    **dict.fromkeys(EXTRAS, _load_transformers),
    "parquet": _load_parquet,
}


def _how_loaded(row: Mapping[str, Any], target: Target, repo: str) -> str:
    """A snippet for each usual reader, with the real names of repository and files."""
    name, _, branch = repo.partition("@")
    place, branch = (name, branch) if HUB_NAME.fullmatch(name) else (".", "")
    lines = ["## How to load it", ""]
    for snippet in LOADING[target.format](row, target, place, branch):
        lines += [snippet.said, "", f"```{snippet.language}", *snippet.lines, "```", ""]
    return "\n".join(lines)


def _warnings(row: Mapping[str, Any]) -> str:
    """Where readers of the whole artifact compute something else than with the original."""
    lines = [f"- {plain(text)}." for text in row.get("warnings", ())]
    return "\n".join(["## What readers do otherwise", "", *lines, ""]) if lines else ""


def _notes(row: Mapping[str, Any]) -> str:
    """Tensors that are not stored as asked, grouped by why."""
    grouped = wording.group_notes(row.get("notes", {}))
    if not grouped:
        return ""
    lines = ["## Not as asked", ""]
    for text, names in grouped.items():
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        lines.append(f"- {plain(text)}: {', '.join(map(code, names[:8]))}{more}")
    return "\n".join([*lines, ""])


def _checksums(row: Mapping[str, Any]) -> str:
    files = [file for file in row["files"] if file["path"] != "README.md"]
    if not files:
        return ""
    lines = ["## Files", "", "| file | bytes | sha256 |", "|---|---:|---|"]
    lines += [f"| {_cell(file['path'])} | {file['bytes']:,} | {code(file['sha256'])} |" for file in files]
    said = f"What it was made of, and with which versions, is in {code(FILE)}; `hubmill verify .` checks it all."
    return "\n".join([*lines, "", said, ""])


def _cell(text: str) -> str:
    """A code span inside a table, where a bar ends the cell unless it is escaped."""
    return code(text).replace("|", "\\|")
