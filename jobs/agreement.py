"""Whether config.json and weights are of one model: what transformers builds from the one is what the other holds."""

from __future__ import annotations

from converter.architecture import MISMATCH, Architecture
from converter.errors import SourceError
from converter.source import Snapshot
from converter.usual import is_usual


def check_agreement(snapshot: Snapshot, architecture: Architecture, where: str) -> None:
    """Raise SourceError, naming all that differs, unless the model's tensors are those that config.json calls for.

    architecture is fitted. Of a family that transformers does not run block by block, blocks are compared with each
    other.
    """
    if architecture.runs == "none":
        _check_alike(snapshot, architecture, where)
        return
    if is_usual(architecture, snapshot.config, snapshot.tensors):
        return
    from converter.blocks import Decoder  # with transformers, whose models take seconds to import

    decoder = Decoder(snapshot.folder, architecture, where, stored=snapshot.tensors)
    decoder.check({name: header.shape for name, header in snapshot.tensors.items()})


def _check_alike(snapshot: Snapshot, architecture: Architecture, where: str) -> None:
    """Raise SourceError when a block lacks what another one has; the first of a stack may have more than the others."""
    stacks = ((0, architecture.encoder_blocks), (architecture.encoder_blocks, architecture.blocks))
    for start, end in stacks:
        own: dict[int, set[str]] = {b: set() for b in range(start, end)}
        for name in snapshot.tensors:
            b = architecture.block_of(name)
            if b in own:
                own[b].add(name.removeprefix(architecture.prefix(b)))
        wanted = set().union(*(names for b, names in own.items() if b != start))
        for b, names in own.items():
            if missing := sorted(wanted - names):
                what = f"block {b} has no {', '.join(missing)}, which other blocks have"
                raise SourceError(where, what, MISMATCH)
