"""A checkpoint as everything here wants it: linears as [O, I], each expert's linears as tensors of their own.

Nothing is copied: a tensor that is part of a stored one is a range of its file's bytes, with a view where the range
alone does not say it. Names stay those of the checkpoint, so that what is written has the names that its config.json
goes with; the family is fitted to them instead.
"""

# E experts, I in, M middle width of an expert, O out

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from converter.architecture import Architecture, Experts, text_config
from converter.errors import SourceError
from converter.packed import Packed, part_of
from converter.source import Header, Snapshot
from converter.views import View

LONG_AGO = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def adapt(snapshot: Snapshot, architecture: Architecture, where: str) -> tuple[Snapshot, Architecture]:
    """`snapshot` with its tensors as linears and `architecture` fitted to it; `where` names the model in errors.

    What config.json says about the language model stands at its top. Raises SourceError when config.json does not
    count blocks or experts, or a fused tensor has another shape than that calls for.
    """
    fitted = architecture.fitted(snapshot.config, snapshot.tensors, where)
    tensors: dict[str, Header] = {}
    packed = dict(snapshot.packed)
    for stored, header in snapshot.tensors.items():
        name = modern(stored)
        if name != stored:
            header = replace(header, name=name)
        b = fitted.block_of(name)
        local = name.removeprefix(fitted.prefix(b)) if b is not None else ""
        if fitted.experts is not None and local in fused_names(fitted.experts):
            for own, parts in slices(
                header, packed.pop(name, None), fitted.prefix(b or 0), local, fitted.experts, where
            ):
                tensors[own.name] = own
                packed |= {own.name: parts} if parts else {}
        elif local.removesuffix(".weight") in fitted.transposed and len(header.shape) == 2 and name not in packed:
            rows, columns = header.shape
            tensors[name] = replace(header, shape=(columns, rows), view=View(shape=(rows, columns), transposed=True))
        else:
            tensors[name] = header
    config = {**snapshot.config, **text_config(snapshot.config)}
    if snapshot.config.get("tie_word_embeddings"):  # transformers asks the whole model, not the part
        config["tie_word_embeddings"] = True
    return replace(snapshot, tensors=dict(sorted(tensors.items())), packed=packed, config=config), fitted


def untied(snapshot: Snapshot, architecture: Architecture) -> Snapshot:
    """`snapshot` with a head of its own, which has the embedding's bytes where the embedding serves as the head.

    For artifacts in which the two differ, and whose config.json then says that they are not tied.
    """
    embedding, head = f"{architecture.embedding}.weight", f"{architecture.head}.weight"
    tensors, packed = dict(snapshot.tensors), dict(snapshot.packed)
    if head not in tensors or snapshot.config.get("tie_word_embeddings"):
        tensors[head] = replace(tensors[embedding], name=head)
        packed.pop(head, None)
        packed |= {head: packed[embedding]} if embedding in packed else {}
    config = {**snapshot.config, "tie_word_embeddings": False}
    return replace(snapshot, tensors=dict(sorted(tensors.items())), packed=packed, config=config, untied=head)


def modern(name: str) -> str:
    """The name of a tensor, those of BERT's norms by what they are called since 2019; transformers reads both."""
    for old, new in LONG_AGO.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def fused_names(experts: Experts) -> tuple[str, str, str, str]:
    """The names, relative to the block, of the tensors that hold all experts' gate and up rows, and their down rows.

    Behind them those of their biases.
    """
    gate_up = experts.fused.gate_up or f"{experts.module}.gate_up_proj"
    down = experts.fused.down or f"{experts.module}.down_proj"
    return gate_up, down, f"{gate_up}_bias", f"{down}_bias"


def slices(
    header: Header, packed: Packed | None, prefix: str, local: str, experts: Experts, where: str
) -> Iterator[tuple[Header, Packed | None]]:
    """Each expert's part of a fused tensor [E, 2 M, I] (gate and up) or [E, O, M] (down); see FusedExperts.

    Of biases [E, 2 M] and [E, O] an expert's are vectors. packed: the tensor's parts where it is stored in some; these
    are [E, O, I] in any case, and every expert gets its own.
    """
    kind = fused_names(experts).index(local)
    halves, vector = 1 + (kind % 2 == 0), kind > 1
    stored = header.shape[1:]
    turned = experts.fused.transposed and not packed and not vector
    outputs = 0 if len(stored) < 2 or not turned else 1
    if len(stored) != 2 - vector or header.shape[0] != experts.count or stored[outputs] % halves:
        what = (
            f"tensor {header.name} has the shape {list(header.shape)}, and config.json counts {experts.count} experts"
        )
        raise SourceError(where, what, "Config.json and weights are of different models: fetch both again")
    rows, columns = (stored[0], 1) if vector else (stored[0], stored[1])
    outs, ins = (columns, rows) if turned else (rows, columns)
    interleaved = experts.fused.interleaved and halves == 2
    plain = not turned and not interleaved
    pieces = experts.count * (halves if plain else 1)
    size_bytes = (header.end - header.start) // pieces
    names = experts.linears[:2] if halves == 2 else experts.linears[2:]
    for e, (half, linear) in product(range(experts.count), enumerate(names)):
        piece = e * halves + half if plain else e
        first, step = (half, halves) if interleaved else (half * (outs // halves), 1)
        stop = None if interleaved else first + outs // halves
        view = View(shape=(rows, columns), transposed=turned, start=first, stop=stop, step=step)
        own = replace(
            header,
            name=f"{prefix}{experts.module}.{e}.{linear}.{'bias' if vector else 'weight'}",
            shape=(outs // halves,) if vector else (outs // halves, ins),
            start=header.start + piece * size_bytes,
            end=header.start + (piece + 1) * size_bytes,
            view=None if plain else view,
        )
        yield own, part_of(packed, piece, pieces, where) if packed else None
