"""Plan and write a GGUF file from a checkpoint: which tensors, which metadata, how many files.

The head is composed first, then each tensor is streamed behind it (see files). Parts arrive in the checkpoint's row
order and are brought into the file's on the way (see tensors).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converter.architecture import Architecture
from converter.containers import ArtifactPlan, Parts, TensorPlan
from converter.containers.gguf.coverage import Weighing, check_coverage, weighing_fields, weighing_of
from converter.containers.gguf.family import (
    Family,
    check_requirements,
    family_of,
    unread,
)
from converter.containers.gguf.files import Layout, check_planned, entries_of, write_files
from converter.containers.gguf.header import string
from converter.containers.gguf.hyper import Hyper, filled, hyper_parameters
from converter.containers.gguf.metadata import general_fields
from converter.containers.gguf.mixture import MIXTURES
from converter.containers.gguf.naming import file_stem, readable_name
from converter.containers.gguf.overrides import overridden
from converter.containers.gguf.pooling import pooling_fields
from converter.containers.gguf.rope import RopeScaling, rope_scaling
from converter.containers.gguf.shards import lay_out_files, too_large
from converter.containers.gguf.tensors import plan_tensors, torch_bytes
from converter.containers.gguf.tokenizer import PRE_KEY, Described, describe_tokenizer
from converter.errors import UnsupportedError
from converter.manifest import Target
from converter.source import Snapshot


@dataclass(frozen=True, kw_only=True)
class Known:
    """What config.json says, in GGUF's words."""

    family: Family
    hyper: Hyper
    scaling: RopeScaling


def know(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> Known:
    """The hyper-parameters of the model; raises UnsupportedError or SourceError when GGUF cannot say them."""
    where = f"{snapshot.repo} (target {target.name})"
    family = family_of(architecture, where)
    if target.type not in MIXTURES:
        raise UnsupportedError(where, f"GGUF files of type {target.type} are not made", f"Choose {', '.join(MIXTURES)}")
    assert architecture is not None  # family_of has refused it
    hyper = hyper_parameters(family, snapshot.config, architecture.blocks, where)
    check_requirements(family, snapshot.config, architecture.blocks, where)
    return Known(family=family, hyper=hyper, scaling=rope_scaling(family, snapshot.config, hyper, where))


def plan(snapshot: Snapshot, architecture: Architecture | None, target: Target) -> ArtifactPlan:
    """See Container.plan; the sizes of files are exact."""
    where = f"{snapshot.repo} (target {target.name})"
    known = know(snapshot, architecture, target)
    assert architecture is not None  # know() has refused it
    tensors, dropped = plan_tensors(snapshot, architecture, known.family, target, known.hyper.integers)
    weighing = weighing_of(target)
    notes = check_coverage(tensors, weighing, target, architecture, where)
    layout = lay_out(snapshot, known, target, tensors, weighing)
    notes += unread(known.family, snapshot.config, known.hyper.integers["context_length"])
    notes += known.scaling.notes + layout.notes
    return ArtifactPlan(
        tensors=tensors,
        files=layout.files,
        exact=True,
        dropped=dropped,
        notes=notes,
        imatrix_sha256=weighing.sha256 if weighing else "",
    )


def lay_out(
    snapshot: Snapshot,
    known: Known,
    target: Target,
    tensors: Sequence[TensorPlan],
    weighing: Weighing | None,
    tokenizer: Described | None = None,
) -> Layout:
    """The layout of the files, tensors that have no source in the checkpoint first; tokenizer: None reads it."""
    where = f"{snapshot.repo} (target {target.name})"
    fields, unsaid = general_fields(snapshot, known.family, target, tensors)
    prefix = known.family.architecture + "."
    fields |= known.hyper.fields(prefix) | known.scaling.fields(prefix)
    accepted = target.metadata.get(PRE_KEY)
    tokenizer = tokenizer or describe_tokenizer(
        snapshot.folder, snapshot.config, known.hyper.integers["vocab_size"], where, accepted
    )
    fields |= tokenizer.fields
    pooling, unpooled = pooling_fields(snapshot, prefix)
    fields |= pooling
    fields |= weighing_fields(weighing)
    fields = overridden(fields, target.metadata, where)
    name, tokens = fields["general.name"].value, fields["tokenizer.ggml.tokens"].value
    fields["general.name"] = string(readable_name(name, tokens))
    entries = entries_of(tensors)
    made = {name: torch_bytes(values) for name, values in known.scaling.divisors.items()}
    entries[:0] = [(name, (len(values),), "F32") for name, values in known.scaling.divisors.items()]
    shards = lay_out_files(file_stem(snapshot, target), fields, entries, target.split_tensors, target.split_bytes)
    notes = tokenizer.notes + unsaid + unpooled
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
    assert architecture is not None  # know() has refused it
    known = replace(known, hyper=filled(known.hyper, known.family, architecture, snapshot))
    layout = lay_out(snapshot, known, target, plan.tensors, weighing_of(target))
    check_planned(plan, layout, snapshot.repo)
    write_files(layout, plan.tensors, parts, folder)
