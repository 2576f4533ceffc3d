"""What must hold between the fields of a manifest, as findings without a place in the file.

manifest.py checks each field by itself and puts findings where they belong; here is what needs several fields at once.
Everything here is pure. The alternative, validators inside the pydantic classes, stops at the first broken rule and
skips all of them when any field is wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converter.marks import quoted, suggestion
from converter.schemes import CACHES, CACHING, GGUF_TENSOR_TYPES, METHODS, ROUNDERS, SCHEMES, STORES, TRANSFORMS, Scheme

if TYPE_CHECKING:
    from converter.manifest_fields import Publish, Target

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
MAX_NAME = 96
# A model called so would sit in the output folder under the name of a file that the run writes there.
RESERVED = (
    *("comparison.json", "comparison.parquet", "comparison.svg", "tensors.parquet"),
    *("report.html", "manifest.lock.yaml", ".work"),
)
REPO = re.compile(rf"{NAME.pattern}(/{NAME.pattern})?", re.ASCII)
REPO_FIELDS = ("name", "model", "target")
BRANCH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*", re.ASCII)
MAX_TITLE = 120
HUB_FIELDS = ("branch", "pull_request", "collection")  # of publish, that a folder knows nothing of
KEEP = ("BF16", "F16", "F32")
# Fields that only mean something beside a certain method.
METHOD_OF_FIELD = {
    "smoothing_strength": "smoothquant",
    "damping": "gptq",
    **dict.fromkeys(("iterations", "batch_size", "learning_rate"), "autoround"),
}
# What a scheme stores whose values are floats of eight bits: rounding one way or the other hardly differs.
UNCODED = ("e4m3", "e5m2", "mxfp8")
# Methods that look at no statistics unless importance is asked for.
WITHOUT_STATISTICS = ("rotation", "rtn", "hqq")
# Transforms whose statistics cannot be followed through a rotation.
WITHOUT_ROTATION = ("smoothquant", "awq")
# Fields that describe integer grids; a GGUF block has its shape from its type.
GRID_FIELDS = ("group_size", "symmetric", "granularity", "observer")
# Fields that only a GGUF file has a place for.
GGUF_FIELDS = (
    *("search", "output_type", "embedding_type", "pure", "fallback"),
    *("requantize", "split_tensors", "split_size", "metadata"),
)
METADATA_KEY = re.compile(r"[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*", re.ASCII)
MAX_METADATA_KEY = 128
# Keys that say how the file is laid out, and are written from what is in it.
LAYOUT_KEYS = ("general.architecture", "general.alignment", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A broken rule: `at` is the path to the value to blame, `needs` the other keys that the rule has looked at."""

    at: tuple[str | int, ...]
    what: str
    remedy: str
    needs: tuple[str, ...] = ()


def scheme_key(format: str) -> str:
    """Give the key that says what a format shall store: scheme where there are integer schemes, otherwise type."""
    return "scheme" if format in SCHEMES else "type"


def rule_types(format: str) -> tuple[str, ...]:
    """Give what the values of `rules:` may be: types of single tensors, or a scheme of the format, or a float type."""
    return STORES[format] + KEEP if format in SCHEMES else GGUF_TENSOR_TYPES


def check_target(target: Target) -> Iterator[Finding]:
    """Give every rule that the target breaks; each of its fields is valid by itself."""
    yield from _check_stores(target)
    yield from _check_methods(target)
    yield from _check_offsets(target)
    yield from _check_codes(target)
    yield from _check_grid(target)
    yield from _check_inputs(target)
    yield from _check_gguf(target)
    yield from _check_rules(target)


def _check_stores(target: Target) -> Iterator[Finding]:
    wanted = scheme_key(target.format)
    other = "type" if wanted == "scheme" else "scheme"
    given = {"type": target.type, "scheme": target.scheme}
    stores = STORES[target.format]
    misplaced, value = given[other], given[wanted]
    if misplaced is not None and value is not None:
        what = f"{target.format} takes {wanted}, and {other} is given too"
        yield Finding(at=(other,), needs=("format",), what=what, remedy=f"Remove {other}")
    elif misplaced is not None and misplaced in stores:
        what = f"{target.format} takes {wanted}, not {other}"
        yield Finding(at=(other,), needs=("format",), what=what, remedy=f"Write {wanted}: {misplaced}")
    elif misplaced is not None:
        yield _unknown_store(target.format, other, misplaced)
    elif value is None:
        remedy = f"Add {wanted} with one of: {', '.join(stores)}"
        yield Finding(at=(), needs=("format", wanted), what=f"{target.format} needs {wanted}", remedy=remedy)
    elif value not in stores:
        yield _unknown_store(target.format, wanted, value)


def _unknown_store(format: str, key: str, value: str) -> Finding:
    what = f"{format} cannot store {key} {quoted(value)}; it stores {', '.join(STORES[format])}"
    elsewhere = " or ".join(name for name, stores in STORES.items() if value in stores and name != format)
    remedy = f"Choose one, or format: {elsewhere}" if elsewhere else suggestion(value, STORES[format])
    return Finding(at=(key,), needs=("format",), what=what, remedy=remedy)


def _check_methods(target: Target) -> Iterator[Finding]:
    for index, method in enumerate(target.methods):
        if method not in METHODS[target.format]:
            what = f"method {quoted(method)} does not work with {target.format}"
            remedy = f"Use {', '.join(METHODS[target.format])}, or another format"
            yield Finding(at=("method", index), needs=("format",), what=what, remedy=remedy)
    if target.has_chain and not target.collects_imatrix and set(target.methods) <= set(WITHOUT_STATISTICS):
        what = "propagate quantized has no effect without statistics"
        remedy = "Add gptq or autoround to method, write imatrix: true, or remove propagate"
        yield Finding(at=("propagate",), needs=("method", "imatrix"), what=what, remedy=remedy)
    if "rotation" in target.methods:
        for index, method in enumerate(target.methods):
            if method in WITHOUT_ROTATION:
                what = f"{method} reads the size of each column's activations, which a rotation mixes"
                remedy = f"Leave one of the two out: a rotation spreads the outliers that {method} scales down"
                yield Finding(at=("method", index), what=what, remedy=remedy)
        if target.counts_inputs or any(one.values == "int" for one in target.static_inputs):
            what = "a fixed range of inputs needs to be known exactly, and behind a rotation there is only a bound"
            remedy = "Choose a scheme with scales for each token: W8A8, FP8_DYNAMIC"
            yield Finding(at=("method",), needs=("scheme", "rules", "activation_observer"), what=what, remedy=remedy)
        if target.kv_cache and CACHES[target.kv_cache].how.values == "int":
            what = "a fixed range of values needs to be known exactly, and behind a rotation there is only a bound"
            yield Finding(at=("kv_cache",), needs=("method",), what=what, remedy="Write kv_cache: FP8, or remove it")
    moving = [method for method in target.methods if method in ("rotation", "reorder")]
    if target.imatrix_file and moving:
        what = f"an imatrix file is of the model's own columns, and {moving[0]} moves them"
        yield Finding(at=("imatrix",), needs=("method",), what=what, remedy="Write imatrix: true, or remove it")
    for field, method in METHOD_OF_FIELD.items():
        if field in target.model_fields_set and method not in target.methods:
            what = f"{field} has no effect without {method}"
            yield Finding(
                at=(field,), needs=("method",), what=what, remedy=f"Add {method} to method, or remove {field}"
            )


def _check_offsets(target: Target) -> Iterator[Finding]:
    """hqq needs a scheme whose groups have offsets; formats without any refuse it altogether."""
    schemes = SCHEMES.get(target.format, {})
    scheme, others = schemes.get(target.scheme or ""), [name for name, one in schemes.items() if one.offset]
    if "hqq" in target.methods and scheme and others and not scheme.offset:
        at = ("method", target.methods.index("hqq"))
        what = f"hqq moves offsets, and scheme {target.scheme} has none"
        remedy = f"Choose scheme {', '.join(others)}, or method rtn"
        yield Finding(at=at, needs=("format", "scheme"), what=what, remedy=remedy)


def _check_codes(target: Target) -> Iterator[Finding]:
    """autoround needs codes, in the whole file or by a rule."""
    scheme = SCHEMES.get(target.format, {}).get(target.scheme or "")
    uncoded = scheme.values in UNCODED if scheme else target.type in KEEP
    if "autoround" in target.methods and uncoded and not target.rules:
        at = ("method", target.methods.index("autoround"))
        what = f"autoround learns codes, and {target.scheme or target.type} has no codes to learn"
        remedy = "Choose one of fewer bits, or method rtn"
        yield Finding(at=at, needs=("format", scheme_key(target.format)), what=what, remedy=remedy)


def check_order(methods: tuple[str, ...]) -> tuple[str, str] | None:
    """Give (what, remedy) when the methods, all of them known, are not transforms followed by exactly one rounder."""
    remedy = f"Write transforms first ({', '.join(TRANSFORMS)}), then one rounder ({', '.join(ROUNDERS)})"
    rounders = [method for method in methods if method in ROUNDERS]
    if not rounders:
        return "has no rounder, so nothing would be quantized", remedy
    if len(rounders) > 1:
        return f"has {len(rounders)} rounders ({', '.join(rounders)})", remedy
    if methods[-1] != rounders[0]:
        return f"has {methods[-1]} after the rounder {rounders[0]}", remedy
    if len(set(methods)) < len(methods):
        return "names a transform twice", "Keep it once"
    return None


def _check_grid(target: Target) -> Iterator[Finding]:
    schemes = SCHEMES.get(target.format)
    if schemes is None:
        for field in GRID_FIELDS:
            if field in target.model_fields_set:
                what = f"{field} has no effect with {target.format}, where the type fixes the blocks"
                yield Finding(at=(field,), needs=("format",), what=what, remedy=f"Remove {field}")
        return
    scheme = schemes.get(target.scheme or "")
    for field in GRID_FIELDS:
        if scheme and field in target.model_fields_set and field not in scheme.fields:
            what = f"{field} has no effect with scheme {target.scheme}, which fixes it"
            yield Finding(at=(field,), needs=("scheme",), what=what, remedy=f"Remove {field}")
    if scheme and "granularity" in scheme.fields and "observer" not in scheme.fields:
        yield from _check_granularity(target, scheme)
    elif target.granularity == "block":
        what = "granularity block is for fp8; integers share a scale in a row or in groups of its columns"
        yield Finding(at=("granularity",), needs=("scheme",), what=what, remedy="Write granularity: group")
    if target.granularity in ("tensor", "channel") and target.group_size is not None:
        what = f"group_size is given, but granularity is {target.granularity}"
        yield Finding(at=("group_size",), needs=("granularity",), what=what, remedy="Remove one of the two")
    if scheme and target.granularity == "group" and target.group_size is None and scheme.group_size is None:
        what = f"granularity is group, and scheme {target.scheme} has no group size of its own"
        yield Finding(at=("granularity",), needs=("group_size", "scheme"), what=what, remedy="Add group_size: 128")
    if scheme and target.symmetric is not None and target.symmetric != scheme.symmetric:
        for name, twin in schemes.items():
            same = (twin.bits, twin.activations) == (scheme.bits, scheme.activations)
            if same and twin.symmetric == target.symmetric:
                what = f"scheme {target.scheme} is {'symmetric' if scheme.symmetric else 'asymmetric'}"
                remedy = f"Write scheme: {name}, and remove symmetric"
                yield Finding(at=("symmetric",), needs=("format", "scheme"), what=what, remedy=remedy)


def _check_granularity(target: Target, scheme: Scheme) -> Iterator[Finding]:
    """What may share a scale of fp8, or a scale or levels of other grids than integers."""
    floats = scheme.values in ("e4m3", "e5m2")
    refused = {"group"} if floats else {"tensor", "block"}
    if floats and target.format == "parquet":
        refused.add("block")
    if target.granularity in refused:
        shared = (
            "a row or all of a tensor shares a scale" if floats else "a row shares a scale, or a group of its columns"
        )
        what = f"granularity {target.granularity} does not work with scheme {target.scheme} here, where {shared}"
        remedy = "Write granularity: channel"
        yield Finding(at=("granularity",), needs=("format", "scheme"), what=what, remedy=remedy)


def _check_inputs(target: Target) -> Iterator[Finding]:
    if target.kv_cache is not None and target.format not in CACHING:
        what = f"{target.format} has no place for scales of keys and values"
        remedy = f"Remove kv_cache, or choose format: {' or '.join(CACHING)}"
        yield Finding(at=("kv_cache",), needs=("format",), what=what, remedy=remedy)
    if target.activation_observer is None:
        return
    static = target.static_inputs
    if not static:
        what = "activation_observer has no effect where no scheme fixes the range of inputs beforehand"
        remedy = "Remove it, or choose a scheme that does: FP8, W8A8_STATIC, W8A8_STATIC_ASYM, NVFP4"
        yield Finding(at=("activation_observer",), needs=("format", "scheme", "rules"), what=what, remedy=remedy)
    elif target.activation_observer in ("kl", "mse") and any(one.scale == "fp8" for one in static):
        what = f"activation_observer {target.activation_observer} weighs codes of one scale, and NVFP4 has one a group"
        remedy = "Write minmax or percentile"
        yield Finding(at=("activation_observer",), needs=("scheme", "rules"), what=what, remedy=remedy)


def _check_gguf(target: Target) -> Iterator[Finding]:
    if target.format != "gguf":
        for field in GGUF_FIELDS:
            if field in target.model_fields_set:
                what = f"{field} is for gguf, and has no effect with {target.format}"
                yield Finding(at=(field,), needs=("format",), what=what, remedy=f"Remove {field}")
        if target.imatrix_file:
            what = f"an imatrix file names tensors as GGUF does, so {target.format} cannot use it"
            yield Finding(at=("imatrix",), needs=("format",), what=what, remedy="Write imatrix: true, or remove it")
        return
    if target.split_tensors is not None and target.split_size is not None:
        what = "split_size and split_tensors are both given"
        yield Finding(at=("split_size",), needs=("split_tensors",), what=what, remedy="Remove one of the two")
    if target.pure and target.type in KEEP:
        what = f"pure has no effect with type {target.type}, which is no mixture"
        yield Finding(at=("pure",), needs=("format", "type"), what=what, remedy="Remove pure")


def check_metadata_key(key: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `key` is not a key of GGUF metadata, or one that the layout of the file decides."""
    if not METADATA_KEY.fullmatch(key) or len(key) > MAX_METADATA_KEY:
        remedy = f"Write small letters, digits, _ and - in parts with . between, at most {MAX_METADATA_KEY} characters"
        return "is not a metadata key", remedy
    if key in LAYOUT_KEYS or key.startswith("split."):
        return "is written from what is in the file", "Remove it"
    return None


def _check_rules(target: Target) -> Iterator[Finding]:
    types = rule_types(target.format)
    for index, rule in enumerate(target.rules):
        try:
            re.compile(rule.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            what = f"rule pattern {quoted(rule.pattern)} is not a regular expression: {error}"
            yield Finding(at=("rules", index), what=what, remedy="Escape . * + ? ( [ with \\ where meant as such")
        if rule.type in types:
            continue
        what = f"{target.format} cannot store rule type {quoted(rule.type)}"
        if target.format not in SCHEMES and rule.type in STORES[target.format]:
            what = f"{rule.type} is a mixture for whole files, not the type of one tensor"
            remedy = f"Choose one of: {', '.join(types)}"
        else:
            remedy = suggestion(rule.type, types)
        yield Finding(at=("rules", index, "type"), needs=("format",), what=what, remedy=remedy)


def check_name(name: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `name` cannot be the name of a folder and of part of a repository."""
    if not NAME.fullmatch(name) or len(name) > MAX_NAME:
        what = f"{quoted(name)} cannot be a name"
        return what, f"Start with a letter or digit, go on with those and . _ -, at most {MAX_NAME} characters"
    if name.casefold() in RESERVED:
        return f"{quoted(name)} is the name of a file of the run", "Choose another name"
    return None


def check_template(template: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `template` is not a repository name with {name}, {model} and {target} in it."""
    if problem := _check_fields(template):
        return problem
    if not check_repo(template.format(name="n", model="m", target="t")):
        return None
    return (
        f"{quoted(template)} is not a repository name",
        "Write name or owner/name, with letters, digits and . _ -",
    )


def check_branch(template: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `template` is not a branch name with {name}, {model} and {target} in it."""
    if problem := _check_fields(template):
        return problem
    filled = template.format(name="n", model="m", target="t")
    if not BRANCH.fullmatch(filled) or ".." in filled or filled.endswith(".lock") or filled.startswith("refs/"):
        return f"{quoted(template)} is not a branch", "Write letters, digits and . _ - /, as in quantized/{target}"
    if filled == "main":
        return "main is where artifacts go without it", "Remove branch"
    return None


def check_collection(title: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `title` cannot be the title of a collection."""
    if title.strip() and len(title) <= MAX_TITLE and title.isprintable():
        return None
    return f"{quoted(title)} is not a title", f"Write one line of at most {MAX_TITLE} characters"


def check_publish(publish: Publish) -> Iterator[Finding]:
    """Give every rule that the fields of publish break."""
    if publish.hub.startswith("folder:"):
        for field in HUB_FIELDS:
            if field in publish.model_fields_set:
                what = f"{field} has no effect with a folder as hub"
                yield Finding(at=(field,), needs=("hub",), what=what, remedy=f"Remove {field}, or write hub: hf")
    if publish.branch and publish.pull_request:
        what = "branch and pull_request are both given, and a pull request goes to the main branch"
        yield Finding(at=("branch",), needs=("pull_request",), what=what, remedy="Remove one of the two")


def _check_fields(template: str) -> tuple[str, str] | None:
    """Give (what, remedy) when the braces of `template` are not {name}, {model} and {target}."""
    braces = ", ".join(f"{{{field}}}" for field in REPO_FIELDS)
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError:
        return f"{quoted(template)} has braces that do not match", f"Write {braces}, each in one pair of braces"
    for _, field, detail, conversion in pieces:
        if field is None:
            continue
        if field not in REPO_FIELDS:
            return f"has {quoted('{' + field + '}')}, which nothing fills in", suggestion(field, REPO_FIELDS)
        if detail or conversion:
            return f"has a format in {{{field}}}", f"Write {{{field}}} alone"
    return None


def check_repo(repo: str) -> tuple[str, str] | None:
    """Give (what, remedy) when `repo` is not name or owner/name, or would leave the hub's folder."""
    if not REPO.fullmatch(repo) or ".." in repo or any(len(part) > MAX_NAME for part in repo.split("/")):
        what = f"the repository name {quoted(repo)} is not allowed"
        return what, f"Make each part letters, digits and . _ -, without '..', at most {MAX_NAME} characters"
    return None
