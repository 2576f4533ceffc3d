"""What a model and its file are called, and what the name tells.

Files are named MODEL-TYPE.gguf, as people who publish GGUF files name them. A model that is named by GGUF's convention,
such as Mixtral-8x7B-Instruct-v0.1, gives a file named by it: base name, size, fine-tune, version, encoding. Composing
every name from those parts, as llama.cpp's converter does, would rename models that are called otherwise.

Source: the GGUF specification's naming convention (ggml, docs/gguf.md).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import gguf

from converter.containers import TensorPlan
from converter.manifest import Target
from converter.source import Snapshot

# llama.cpp marks these tokens in any file whose name has the pattern, and ends itself where one is missing.
PHI3 = re.compile("phi-?3", re.IGNORECASE)
TOKENS_OF_PHI3 = frozenset({"<unk>", "<s>", "</s>", "<|endoftext|>"})


@dataclass(frozen=True, kw_only=True)
class NameParts:
    """The parts of a model's name by GGUF's convention, empty where there is none."""

    basename: str = ""
    finetune: str = ""
    version: str = ""


def model_name(snapshot: Snapshot) -> str:
    """What the manifest calls the model, and without one the last part of the repository's name."""
    return snapshot.name or snapshot.repo.rstrip("/").rpartition("/")[2]


def readable_name(name: str, tokens: Collection[str]) -> str:
    """`name` as llama.cpp loads it with these tokens: it takes models named like Phi-3 for one that has Phi-3's."""
    return name if TOKENS_OF_PHI3.issubset(tokens) else PHI3.sub("Phi 3", name)


def file_stem(snapshot: Snapshot, target: Target) -> str:
    """The name of the artifact's file without its ending, such as "quickstart-Q4_K_M"."""
    return str(gguf.naming_convention(model_name(snapshot), None, None, None, None, target.type))


def name_parts(name: str, weights: int, published: bool) -> NameParts:
    """The parts of the name of a model of so many weights.

    Folders are called what their owner liked, checkpoint-500 or run-2024-05-01; in the name of a model that is not
    published, parts are therefore believed only beside a size that fits the number of weights.
    """
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, weights)
    if not published and not any(mark.isdecimal() for mark in size or ""):
        return NameParts()
    return NameParts(basename=basename or "", finetune=finetune or "", version=version or "")


def size_label(tensors: Sequence[TensorPlan]) -> str:
    """The number of weights as hubs show it: "8.0B", "135M"; for a mixture of experts "8x7.2B".

    The second number is of a model with one expert in each block, as llama.cpp's converter writes it.
    """
    sizes = [math.prod(tensor.shape) for tensor in tensors]
    experts = Counter(tensor.stack for tensor in tensors if "_exps." in tensor.stack)
    each = sum(size // experts[t.stack] for t, size in zip(tensors, sizes, strict=True) if t.stack in experts)
    shared = sum(size for t, size in zip(tensors, sizes, strict=True) if t.stack not in experts)
    count = experts.total() // len(experts) if experts else 0
    return str(gguf.size_label(sum(sizes), shared, each, count))
