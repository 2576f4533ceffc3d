"""Plan and write a GGUF file from a checkpoint: which tensors, which metadata, how many files.

The head is composed first, then each tensor is streamed behind it (see files). Parts arrive in the checkpoint's row
order and are brought into the file's on the way (see tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.gguf.coverage import Weighing, check_coverage, weighing_fields, weighing_of
from converter.containers.gguf.family import (
    Family,
    RopeScaling,
    check_requirements,
    family_of,
    hyper_parameters,
    rope_scaling,
    unread,
)
from converter.containers.gguf.files import Layout, check_planned, entries_of, write_files
from converter.containers.gguf.metadata import general_fields, hyper_fields, model_name, read_card
from converter.containers.gguf.mixture import MIXTURES
from converter.containers.gguf.overrides import overridden
from converter.containers.gguf.shards import lay_out_files, too_large
from converter.containers.gguf.tensors import FREQUENCIES, plan_tensors, torch_bytes
from converter.containers.gguf.tokenizer import describe_tokenizer
from converter.errors import UnsupportedError
from converter.manifest import Target
from converter.source import Snapshot


@dataclass(frozen=True, kw_only=True)
class Known:
    """What config.json says, in GGUF's words."""

    family: Family
    integers: Mapping[str, int]
    floats: Mapping[str, float]
    scaling: RopeScaling


def know(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> Known:
    """The hyper-parameters of the model; raises UnsupportedError or SourceError when GGUF cannot say them."""
    where = f"{snapshot.repo} (target {target.name})"
    family = family_of(architecture, where)
    if target.type not in MIXTURES:
        raise UnsupportedError(where, f"GGUF files of type {target.type} are not made", f"Choose {', '.join(MIXTURES)}")
    integers, floats = hyper_parameters(family, snapshot.config, where)
    check_requirements(family, snapshot.config, integers["block_count"], where)
    scaling = rope_scaling(
        family,
        snapshot.config,
        floats["rope.freq_base"],
        integers["rope.dimension_count"],
        integers["context_length"],
        where,
    )
    return Known(family=family, integers=integers, floats=floats, scaling=scaling)


def file_stem(snapshot: Snapshot, target: Target) -> str:
    """The name of the artifact's file without its ending, such as "quickstart-Q4_K_M"."""
    return f"{model_name(snapshot)}-{target.type}"


def plan(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
    """See Container.plan; the sizes of files are exact."""
    where = f"{snapshot.repo} (target {target.name})"
    known = know(snapshot, architecture, target)
    assert architecture is not None  # know() has refused it
    tensors, dropped = plan_tensors(snapshot, architecture, known.family, target, known.integers)
    weighing = weighing_of(target)
    notes = check_coverage(tensors, weighing, target, architecture, where)
    layout = lay_out(snapshot, known, target, tensors, weighing)
    notes += unread(known.family, snapshot.config, known.integers["context_length"]) + layout.notes
    return ArtifactPlan(
        tensors=tensors,
        files=layout.files,
        exact=True,
        dropped=dropped,
        notes=notes,
        imatrix_sha256=weighing.sha256 if weighing else "",
    )


def lay_out(
    snapshot: Snapshot, known: Known, target: Target, tensors: Sequence[TensorPlan], weighing: Weighing | None
) -> Layout:
    """The layout of the files, tensors that have no source in the checkpoint first."""
    where = f"{snapshot.repo} (target {target.name})"
    fields = general_fields(snapshot, known.family, target, tensors)
    fields |= hyper_fields(known.family, known.integers, known.floats, known.scaling)
    tokenizer = describe_tokenizer(snapshot.folder, snapshot.config, known.integers["vocab_size"], where)
    fields |= tokenizer.fields
    fields |= weighing_fields(weighing)
    fields = overridden(fields, target.metadata, where)
    entries = entries_of(tensors)
    made: dict[str, Tensor] = {}
    if known.scaling.divisors:
        entries.insert(0, (FREQUENCIES, (len(known.scaling.divisors),), "F32"))
        made[FREQUENCIES] = torch_bytes(known.scaling.divisors)
    shards = lay_out_files(file_stem(snapshot, target), fields, entries, target.split_tensors, target.split_bytes)
    unreadable = "the front matter of README.md cannot be read, so licence, languages and tags are left out"
    notes = tokenizer.notes + ((unreadable,) if read_card(snapshot.folder) is None else ())
    return Layout(shards=shards, notes=notes + too_large(shards, target.split_bytes), made=made)


def write(
    plan: ArtifactPlan,
    snapshot: Snapshot,
    architecture: Architecture | None,
    target: Target,
    parts: Parts,
    folder: Path,
) -> None:
    """See Container.write; `parts` gives `blocks` [O, bytes a row] u8 in the checkpoint's row order.

    Raises SourceError when the model's small files are no longer those that were planned.
    """
    known = know(snapshot, architecture, target)
    layout = lay_out(snapshot, known, target, plan.tensors, weighing_of(target))
    check_planned(plan, layout, snapshot.repo)
    write_files(layout, plan.tensors, parts, folder)
