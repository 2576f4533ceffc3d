"""Who made a model, from what and under which licence, as its card says it, in GGUF's standard keys.

Names of base models and data sets are split and written as gguf-py does, so that files of both converters say the same
of one card. Three of its guesses are wrong too often and are not made: config.json's `_name_or_path` as the model's
name (a fine-tune has its base model's there), the card's `model_type` as a base name (it is an architecture's), and
data sets at the address of a model. A card's size label is not believed: the file's tensors are counted.

Source: the GGUF specification's list of keys (ggml, docs/gguf.md), gguf-py's metadata.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import gguf

from converter.containers.gguf.header import Field, strings
from converter.front_matter import HUB_NAME
from converter.marks import Fields, Items, Node, Text

HUB = "https://huggingface.co"
URL = re.compile(r"https?://[^\s<>\"/@]+(/[^\s<>\"]*)?", re.ASCII)  # nobody's password before the host
MAX_CHARACTERS = 2048
MAX_ITEMS = 500  # languages of the largest multilingual models, and some
# Attribute of gguf.Metadata -> keys of the card that give it, the first that is there wins.
SCALARS: Mapping[str, tuple[str, ...]] = {
    "name": ("name", "model_name"),
    "author": ("author", "model_author", "model_creator"),
    "version": ("version", "model_version"),
    "organization": ("organization", "model_organization"),
    "description": ("description", "model_description"),
    "finetune": ("finetune", "model_finetune"),
    "basename": ("basename", "model_basename"),
    "source_url": ("url", "model_url"),
    "source_doi": ("doi", "model_doi"),
    "source_uuid": ("uuid", "model_uuid"),
    "source_repo_url": ("repo_url", "model_repo_url"),
    "license_name": ("license_name",),
    "license_link": ("license_link",),
}
ADDRESSES = ("source_url", "source_repo_url")
BASES = ("base_model", "base_models", "base_model_sources")
DATASETS = ("datasets", "dataset", "dataset_sources")
PARTS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


def card_metadata(card: Mapping[str, Node], weights: int) -> tuple[gguf.Metadata, tuple[str, ...]]:
    """What the card says of a model of so many weights, and the keys of values that no GGUF key can hold.

    Values have one line, a bounded length and a bounded number; what is of another form is left out.
    """
    metadata = gguf.Metadata()
    odd: list[str] = []
    for attribute, keys in SCALARS.items():
        for key in keys:
            text = _text(card.get(key))
            if attribute in ADDRESSES and not URL.fullmatch(text):
                text = ""
            if not text and _said(card.get(key)):
                odd.append(key)
            if text and getattr(metadata, attribute) is None:
                setattr(metadata, attribute, text)
    metadata.license = ",".join(_texts(card, ("license",), odd)) or None
    metadata.tags = _texts(card, ("tags", "pipeline_tag"), odd) or None
    metadata.languages = _texts(card, ("languages", "language"), odd) or None
    metadata.base_models = _references(card, BASES, HUB, weights, odd) or None
    metadata.datasets = _references(card, DATASETS, f"{HUB}/datasets", 0, odd) or None
    return metadata, tuple(odd)


def metadata_fields(metadata: gguf.Metadata) -> dict[str, Field]:
    """The metadata under the keys, and as the kinds, that gguf-py writes them in; it must have a name."""
    writer = gguf.GGUFWriter(None, "")  # no file, no architecture: it only collects
    metadata.set_gguf_meta_model(writer)
    (written,) = writer.kv_data
    return {
        key: strings(entry.value) if isinstance(entry.value, list) else Field(kind=int(entry.type), value=entry.value)
        for key, entry in written.items()
    }


def title(name: str) -> str:
    """The name as gguf-py writes names for people: "Llama 3.1 8B Instruct"."""
    return str(gguf.Metadata.id_to_title(name))


def one_line(text: str) -> str:
    """The text on one line without control and direction marks, empty when it is too long to be what it should be."""
    shown = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    return shown if len(shown) <= MAX_CHARACTERS else ""


def _said(node: Node | None) -> bool:
    return node is not None and not (isinstance(node, Text) and (node.is_null or not node.text))


def _text(node: Node | None) -> str:
    return one_line(node.text) if isinstance(node, Text) and not node.is_null else ""


def _nodes(card: Mapping[str, Node], key: str) -> tuple[Node, ...]:
    node = card.get(key)
    if node is None:
        return ()
    return node.values if isinstance(node, Items) else (node,)


def _texts(card: Mapping[str, Node], keys: Iterable[str], odd: list[str]) -> list[str]:
    """The texts under these keys, each once; a key that has others is added to `odd`."""
    found: dict[str, None] = {}
    for key in keys:
        nodes = _nodes(card, key)
        texts = [text for node in nodes[:MAX_ITEMS] if (text := _text(node))]
        if len(texts) < sum(map(_said, nodes)):
            odd.append(key)
        found |= dict.fromkeys(texts)
    return list(found)


def _references(
    card: Mapping[str, Node], keys: Iterable[str], place: str, weights: int, odd: list[str]
) -> list[dict[str, str]]:
    """What the first of these keys that is there refers to, each in GGUF's parts.

    place: the address under which hubs have such things; weights: about how many a model has, 0: it is no model.
    """
    key = next((key for key in keys if _said(card.get(key))), "")
    nodes = _nodes(card, key)
    found = [parts for node in nodes[:MAX_ITEMS] if (parts := _reference(node, place, weights))]
    if len(found) < sum(map(_said, nodes)):
        odd.append(key)
    return found


def _reference(node: Node, place: str, weights: int) -> dict[str, str]:
    if isinstance(node, Fields):
        given = {part: _text(node.entries[part].value) for part in PARTS if part in node.entries}
        return {part: text for part, text in given.items() if text and ("url" not in part or URL.fullmatch(text))}
    text = _text(node)
    repo = text.removeprefix(f"{place}/")
    if not HUB_NAME.fullmatch(repo) and URL.fullmatch(text):
        return {"repo_url": text}
    name = re.split(r"[/\\]", repo.rstrip("/\\"))[-1]  # of a path on somebody's disk only what it leads to
    parts = {"name": title(name)}
    if weights:
        parts["version"] = gguf.Metadata.get_model_id_components(name, weights)[4] or ""
    if HUB_NAME.fullmatch(repo):
        parts |= {"organization": title(repo.partition("/")[0]), "repo_url": f"{place}/{repo}"}
    return {part: text for part, text in parts.items() if text}
