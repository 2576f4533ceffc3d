"""The metadata of a GGUF file: where the model comes from, what it is, how it was quantized.

Everything is said with GGUF's standard keys, so that hubs and readers show it; where the model came from to the commit
has no standard key and stands under `hubmill.`. What the model card says goes before what its name tells, and both
before nothing: what neither says is left out. `general.url`, `.repo_url`, `.doi` and `.uuid` are of the file that is
written, which is not published yet, so only the manifest can give them; those of the card are the source's.

Source: the GGUF specification's list of keys (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import gguf

from converter.containers import TensorPlan
from converter.containers.gguf.authorship import HUB, URL, card_metadata, metadata_fields, title
from converter.containers.gguf.family import Family
from converter.containers.gguf.header import Field, string, u32
from converter.containers.gguf.mixture import MIXTURES
from converter.containers.gguf.naming import model_name, name_parts, size_label
from converter.containers.gguf.sampling import add_sampling
from converter.front_matter import read_front_matter
from converter.manifest import Target
from converter.source import Snapshot


def general_fields(
    snapshot: Snapshot, family: Family, target: Target, tensors: Sequence[TensorPlan]
) -> tuple[dict[str, Field], tuple[str, ...]]:
    """What the file is and where it comes from, and what the model's small files say in vain, a sentence each."""
    fields = {
        "general.architecture": string(family.architecture),
        "general.type": string("model"),
        "general.file_type": u32(MIXTURES[target.type or ""].number),
    }
    if any(tensor.quantized for tensor in tensors):
        fields["general.quantization_version"] = u32(gguf.GGML_QUANT_VERSION)
    metadata, notes = _metadata(snapshot, tensors)
    fields |= metadata_fields(metadata)
    fields["hubmill.source.repo"] = string(snapshot.repo)
    fields["hubmill.source.commit"] = string(snapshot.commit)
    if target.collects_imatrix:
        covered = sum(tensor.quantized and tensor.block is not None for tensor in tensors)
        fields["quantize.imatrix.entries_count"] = u32(covered)
    return fields, notes


def _metadata(snapshot: Snapshot, tensors: Sequence[TensorPlan]) -> tuple[gguf.Metadata, tuple[str, ...]]:
    """Card, name, generation config and hub put together."""
    card, problem = read_front_matter(snapshot.folder)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    metadata, odd = card_metadata(card, weights)
    notes = add_sampling(metadata, snapshot.folder)
    if problem:
        notes += ("the front matter of README.md cannot be read, so licence, languages and tags are left out",)
    if odd:
        notes += (f"the front matter of README.md has values of another form ({', '.join(odd)}), which are left out",)
    name = model_name(snapshot)
    on_hub = snapshot.source.startswith("hub:")
    parts = name_parts(name, weights, on_hub)
    metadata.name = metadata.name or title(name) or name  # the title of "-" is empty
    metadata.basename = metadata.basename or parts.basename or None
    metadata.finetune = metadata.finetune or parts.finetune or None
    metadata.version = metadata.version or parts.version or None
    metadata.size_label = size_label(tensors)
    metadata.quantized_by = "hubmill"
    link = metadata.license_link or ""
    if on_hub:
        metadata.organization = metadata.organization or title(snapshot.repo.partition("/")[0])
        metadata.source_repo_url = f"{HUB}/{snapshot.repo}"
        metadata.source_url = f"{HUB}/{snapshot.repo}/tree/{snapshot.commit}"
        if link in snapshot.files:
            link = f"{HUB}/{snapshot.repo}/blob/{snapshot.commit}/{link}"
    # A file of the source is not beside this one, so its bare name would lead nowhere.
    metadata.license_link = link if URL.fullmatch(link) else None
    return metadata, notes
