"""How a model of embeddings makes one vector of a text, in GGUF's words."""

from __future__ import annotations

from converter.containers.gguf.header import Field, u32
from converter.pooling import declared_pooling
from converter.source import Snapshot

NUMBERS = {"mean": 1, "cls": 2, "lasttoken": 3}  # of llama.cpp's enum llama_pooling_type


def pooling_fields(snapshot: Snapshot, prefix: str) -> tuple[dict[str, Field], tuple[str, ...]]:
    """The metadata under the architecture's prefix, and what readers do otherwise; nothing where none is declared."""
    modes = declared_pooling(snapshot.folder, snapshot.repo)
    if not modes:
        return {}, ()
    if len(modes) > 1 or modes[0] not in NUMBERS:
        by = " and ".join(modes)
        return {}, (f"readers of GGUF do not pool by {by} as the model does, and must be told how",)
    return {f"{prefix}pooling_type": u32(NUMBERS[modes[0]])}, ()
