"""The metadata of a GGUF file: what the model computes with, where it comes from, how it was quantized.

Everything is said with GGUF's standard keys, so that hubs and readers show it; where the model came from to the commit
has no standard key and stands under `hubmill.`. What a model card does not say is left out, never guessed from a name.

Source: the GGUF specification's list of keys (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf

from converter.containers import TensorPlan
from converter.containers.gguf.family import Family, RopeScaling
from converter.containers.gguf.header import Field, f32, string, strings, u32
from converter.containers.gguf.mixture import MIXTURES
from converter.manifest import Target
from converter.source import Snapshot

HUB = "https://huggingface.co"


def hyper_fields(
    family: Family, integers: Mapping[str, int], floats: Mapping[str, float], scaling: RopeScaling
) -> dict[str, Field]:
    """What the reader's graph is built from, under the architecture's prefix."""
    prefix = family.architecture + "."
    fields = {prefix + key: u32(value) for key, value in integers.items()}
    fields |= {prefix + key: f32(value) for key, value in floats.items()}
    if scaling.kind:
        fields[prefix + "rope.scaling.type"] = string(scaling.kind)
        fields[prefix + "rope.scaling.factor"] = f32(scaling.factor)
    if scaling.original_context:
        fields[prefix + "rope.scaling.original_context_length"] = u32(scaling.original_context)
    return fields


def general_fields(
    snapshot: Snapshot, family: Family, target: Target, tensors: Sequence[TensorPlan]
) -> dict[str, Field]:
    """What the file is and where it comes from."""
    card = read_card(snapshot.folder) or {}
    fields = {
        "general.architecture": string(family.architecture),
        "general.type": string("model"),
        "general.name": string(model_name(snapshot)),
        "general.size_label": string(gguf.size_label(sum(math.prod(tensor.shape) for tensor in tensors), 0, 0, 0)),
        "general.quantized_by": string("hubmill"),
        "general.file_type": u32(MIXTURES[target.type or ""].number),
    }
    if any(tensor.quantized for tensor in tensors):
        fields["general.quantization_version"] = u32(gguf.GGML_QUANT_VERSION)
    if snapshot.source.startswith("hub:"):
        fields["general.organization"] = string(snapshot.repo.partition("/")[0])
        fields["general.source.repo_url"] = string(f"{HUB}/{snapshot.repo}")
        fields["general.source.url"] = string(f"{HUB}/{snapshot.repo}/tree/{snapshot.commit}")
    fields["hubmill.source.repo"] = string(snapshot.repo)
    fields["hubmill.source.commit"] = string(snapshot.commit)
    fields |= card_fields(card)
    if target.collects_imatrix:
        covered = sum(tensor.quantized and tensor.block is not None for tensor in tensors)
        fields["quantize.imatrix.entries_count"] = u32(covered)
    return fields


def model_name(snapshot: Snapshot) -> str:
    """The last part of the repository's name."""
    return snapshot.repo.rstrip("/").rpartition("/")[2]


def read_card(folder: Path) -> dict[str, Any] | None:
    """The front matter of README.md; {} when there is none, None when it cannot be read.

    A stranger's broken card must not stop a conversion, and gguf-py's loader raises whatever its YAML library does.
    """
    try:
        return dict(gguf.Metadata.load_model_card(folder))
    except Exception:
        return None


def card_fields(card: Mapping[str, Any]) -> dict[str, Field]:
    """Licence, lineage, languages and tags as the model card gives them."""
    fields: dict[str, Field] = {}
    for key, name in (("license", "license"), ("license_name", "license.name"), ("license_link", "license.link")):
        if isinstance(card.get(key), str):
            fields[f"general.{name}"] = string(card[key])
    bases = _texts(card.get("base_model"))
    if bases:
        fields["general.base_model.count"] = u32(len(bases))
    for number, base in enumerate(bases):
        owner, _, name = base.rpartition("/")
        fields[f"general.base_model.{number}.name"] = string(name)
        if owner:
            fields[f"general.base_model.{number}.organization"] = string(owner)
            fields[f"general.base_model.{number}.repo_url"] = string(f"{HUB}/{base}")
    tags = _texts(card.get("tags")) + _texts(card.get("pipeline_tag"))
    if tags:
        fields["general.tags"] = strings(list(dict.fromkeys(tags)))
    languages = _texts(card.get("language"))
    if languages:
        fields["general.languages"] = strings(languages)
    return fields


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
