"""Measure an artifact from its written bytes, streaming it block by block beside the original.

The original runs once over the held-out rows and leaves its hidden states on disk (`reference`); every artifact is then
measured against those (`measure`), one block of each in memory at a time. Keeping final logits instead would cost
vocabulary / width times the space: 37 GiB for a Llama-3 vocabulary in one well-known tool.
"""

# O out, I in, N rows, T tokens a row, D width, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from converter import tensor_file
from converter.architecture import Architecture, Folding
from converter.blocks import Decoder
from converter.compare.metrics import (
    WINDOW,
    Difference,
    TokenFigures,
    difference,
    embedding_figures,
    outliers,
    summary,
    token_figures,
)
from converter.compare.unfolding import unfold
from converter.containers import Opened
from converter.errors import NumericsError
from converter.methods import Block
from converter.methods.reorder import restored
from converter.methods.rotation import rotation_of, unrotated
from converter.pooling import pool

Report = Callable[[float], None]
Read = Callable[[str], Tensor]
PROBES = 2  # rows that per-tensor output errors are measured on


@dataclass(frozen=True, kw_only=True)
class Original:
    """The original model: its family (None: a plain state dict), names, tensors in f32, hidden states on disk.

    hidden_at: the file of the hidden state in front of a block, see `hidden_file`; None where the original was not run.
    pooling: how an encoder makes one vector of a text, see `pooling.declared_pooling`. foldings: those of the family
    that the artifact's methods may have carried out. seed: what the basis follows from that the artifact's residual
    stream is in (empty: the original's). reordered: whether columns of its middles changed places. copies: names whose
    bytes another tensor has, too.
    """

    architecture: Architecture | None
    names: tuple[str, ...]
    read: Read
    hidden_at: Callable[[int], Path] | None
    pooling: tuple[str, ...] = ()
    foldings: tuple[Folding, ...] = ()
    seed: str = ""
    reordered: bool = False
    copies: frozenset[str] = frozenset()

    def turned(self, hidden: Tensor) -> Tensor:
        """A hidden state [..., D] of the original in the artifact's basis."""
        return rotation_of(self.seed, "residual", hidden.shape[-1]).turn(hidden) if self.seed else hidden

    def unturned(self, hidden: Tensor) -> Tensor:
        """A hidden state [..., D] of the artifact in the original's basis."""
        return rotation_of(self.seed, "residual", hidden.shape[-1]).back(hidden) if self.seed else hidden


def hidden_file(folder: Path, block: int) -> Path:
    """Where the input of a block lies; block = number of blocks gives the last block's output."""
    return folder / f"hidden-{block:04d}.safetensors"


def reference(decoder: Decoder, rows_NT: Tensor, original: Original, folder: Path, report: Report) -> dict[str, Any]:
    """Run the original over the rows, write the input of each block and the last output to `folder`, f32 [N, T, D].

    Returns the original's own figures: the number of tokens, and of a decoder the perplexity over them.
    """
    hidden = decoder.embed(rows_NT, {name: original.read(name) for name in decoder.input_names})
    tensor_file.save(hidden_file(folder, 0), {"hidden": hidden})
    for block in range(decoder.blocks):
        hidden = decoder.run_block(block, block_tensors(original, block), hidden)
        check_hidden(hidden, f"{decoder.where} block {block}", "Check the model's weights for overflow in f32")
        tensor_file.save(hidden_file(folder, block + 1), {"hidden": hidden})
        report((block + 1) / (decoder.blocks + 1))
    if decoder.encodes:
        return {"tokens": rows_NT.numel()}
    figures = [
        token_figures(logits, logits, following)
        for logits, following in _windows(decoder, hidden, rows_NT, original.read)
    ]
    found = summary(figures)
    return {"perplexity": found["perplexity"], "tokens": int(found["tokens"])}


def check_hidden(hidden: Tensor, where: str, remedy: str) -> None:
    """Raise NumericsError when a hidden state [N, T, D] holds NaN or an infinity: no figure could follow from it."""
    broken = sum(1 for row in hidden if not bool(torch.isfinite(row).all()))
    if broken:
        raise NumericsError(
            where, f"the hidden state behind it is not finite in {broken} of {len(hidden)} sequences", remedy
        )


def block_tensors(original: Original, block: int) -> dict[str, Tensor]:
    """The original's tensors of one block, f32, by their names relative to the block."""
    assert original.architecture is not None
    prefix = original.architecture.prefix(block)
    return {name.removeprefix(prefix): original.read(name) for name in original.names if name.startswith(prefix)}


def measure(
    original: Original, opened: Opened, decoder: Decoder | None, rows_NT: Tensor | None, report: Report
) -> dict[str, Any]:
    """Every figure of one artifact: `tensors`, `blocks`, `weight`, `output` (empty without a decoder), `parameters`."""
    block_of = original.architecture.block_of if original.architecture else (lambda name: None)
    outer = [name for name in original.names if decoder is None or block_of(name) is None]
    tensors: list[dict[str, Any]] = []
    for done, name in enumerate(outer):
        weight = original.read(name)
        if row := _tensor_row(name, block_of(name), weight, opened, _outer_undone(original, opened, name, weight)):
            tensors.append(row)
        if decoder is None:  # every tensor is an outer one
            report((done + 1) / len(outer))
    blocks: list[dict[str, Any]] = []
    output: dict[str, float] = {}
    if decoder is not None and rows_NT is not None:
        hidden = decoder.embed(rows_NT, {name: opened.read(name) for name in decoder.input_names})
        for block in range(decoder.blocks):
            hidden, rows, deviation = _measure_block(original, opened, decoder, block, hidden)
            what_to_do = "The original's is; store the largest weights of this block in a wider type with rules:"
            check_hidden(hidden, f"{decoder.where} block {block} as read back", what_to_do)
            tensors.extend(rows)
            blocks.append({"block": block, "relative_mse": deviation.relative_mse, "cosine": deviation.cosine})
            report((block + 1) / (decoder.blocks + 1))
        if decoder.encodes:
            output = _measure_embeddings(original, opened, decoder, hidden)
        else:
            output = _measure_output(original, opened, decoder, rows_NT, hidden)
    total = sum((row["sums"] for row in tensors if len(row["shape"]) > 1), Difference())
    return {
        "tensors": [{key: value for key, value in row.items() if key != "sums"} for row in tensors],
        "blocks": blocks,
        "weight": {"cosine": total.cosine, "relative_mse": total.relative_mse},
        "output": {key: value for key, value in output.items() if key not in ("original_perplexity", "tokens")},
        "parameters": sum(math.prod(row["shape"]) for row in tensors if row["name"] not in original.copies),
    }


def _outer_undone(original: Original, opened: Opened, name: str, weight: Tensor) -> Tensor | None:
    """A tensor outside of the blocks as read back, in the original's basis; None where that is how it is stored."""
    if not original.seed or original.architecture is None or name not in opened.names:
        return None
    residual = original.architecture.outer_residual
    module = name.removesuffix(".weight")
    norms = [f"{norm}.weight" for norm, linears in residual.reads.items() if norm and module in linears]
    first = {name: weight} | {norm: original.read(norm) for norm in norms}
    copy = {one: opened.read(one) for one in first}
    return unrotated(Block(where="", tensors=first, stats={}, residual=residual), copy, original.seed)[name]


def _measure_block(
    original: Original, opened: Opened, decoder: Decoder, block: int, hidden: Tensor
) -> tuple[Tensor, list[dict[str, Any]], Difference]:
    """Run the artifact's block on its own chain; compare its tensors, and its output with the original's."""
    architecture = original.architecture
    assert architecture is not None and original.hidden_at is not None
    prefix = architecture.prefix(block)
    first = block_tensors(original, block)
    copy = {name: opened.read(prefix + name) for name in first}
    inputs = _tap_inputs(original, decoder, block, first)
    found = {tap: outliers(x_NI) for tap, x_NI in inputs.items()}
    standing_out = {
        tap: {"outlier_ratio": one.ratio if math.isfinite(one.ratio) else None, "outlier_channels": list(one.channels)}
        for tap, one in found.items()
    }
    undone = copy
    if original.seed:
        undone = unrotated(_whole(architecture, first), copy, original.seed)
    if original.reordered:
        undone = restored(_whole(architecture, first), undone)
    if not original.seed:
        undone = unfold(architecture.taps, original.foldings, first, undone)
    rows = []
    for name, weight in first.items():
        unfolded = undone[name]
        row = _tensor_row(prefix + name, block, weight, opened, unfolded)
        tap = architecture.tap_of(prefix + name)
        if row and tap and tap.name in inputs:
            x_NI = inputs[tap.name]
            row["output_relative_mse"] = difference(x_NI @ weight.T, x_NI @ unfolded.T).relative_mse
            row |= standing_out[tap.name]
        rows.append(row)
    said = {name.removesuffix(".weight"): opened.activations(prefix + name) for name in first}
    activations = {module: how for module, how in said.items() if how}
    hidden = decoder.run_block(block, copy, hidden, activations=activations, rounding=opened.keeps(prefix))
    expected = tensor_file.load(original.hidden_at(block + 1))["hidden"]
    deviation = difference(expected, original.unturned(hidden))
    kept = [row | {"block_relative_mse": deviation.relative_mse} for row in rows if row]
    return hidden, kept, deviation


def _whole(architecture: Architecture, tensors: Mapping[str, Tensor]) -> Block:
    """A block of the original as methods see it, without statistics."""
    return Block(
        where="",
        tensors=tensors,
        stats={},
        taps=architecture.taps,
        foldings=architecture.foldings,
        residual=architecture.inner_residual,
        middles=architecture.middles,
    )


def _tap_inputs(original: Original, decoder: Decoder, block: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the linears of each tap read in the original, [N, I] f32, on the first few rows."""
    assert original.hidden_at is not None
    hidden = tensor_file.load(original.hidden_at(block))["hidden"][:PROBES]
    seen: dict[str, list[Tensor]] = {}

    def observe(row: int, taps: Mapping[str, Tensor]) -> None:
        for tap, x_TI in taps.items():
            seen.setdefault(tap, []).append(x_TI.cpu())  # the weights that it meets are there

    decoder.run_block(block, tensors, hidden, observe=observe)
    return {tap: torch.cat(parts) for tap, parts in seen.items()}


def _tensor_row(
    name: str, block: int | None, weight: Tensor, opened: Opened, decoded: Tensor | None = None
) -> dict[str, Any] | None:
    """One tensor's figures; None when the artifact leaves it out."""
    if name not in opened.names:
        return None
    decoded = opened.read(name) if decoded is None else decoded
    stored, size_bytes = opened.stored(name)
    sums = difference(weight, decoded)
    return {
        "name": name,
        "block": block,
        "shape": list(weight.shape),
        "type": stored,
        "size_bytes": size_bytes,
        "bits_per_weight": 8 * size_bytes / max(1, weight.numel()),
        "cosine": sums.cosine,
        "relative_mse": sums.relative_mse,
        "output_relative_mse": None,
        "block_relative_mse": None,
        "outlier_ratio": None,
        "outlier_channels": [],
        "sums": sums,
    }


def _windows(decoder: Decoder, hidden: Tensor, rows_NT: Tensor, read: Read) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, V] and the tokens that came next [n], window by window; the last position predicts nothing."""
    outer = {name: read(name) for name in decoder.output_names}
    for row in range(hidden.shape[0]):
        for start in range(0, rows_NT.shape[1] - 1, WINDOW):
            stop = min(start + WINDOW, rows_NT.shape[1] - 1)
            yield decoder.logits(hidden[row : row + 1, start:stop], outer)[0], rows_NT[row, start + 1 : stop + 1]


def _measure_output(
    original: Original, opened: Opened, decoder: Decoder, rows_NT: Tensor, hidden: Tensor
) -> dict[str, float]:
    """Perplexity, KL divergence to the original and top-1 agreement, from the final hidden states of both."""
    assert original.hidden_at is not None
    expected = tensor_file.load(original.hidden_at(decoder.blocks))["hidden"]
    first = _windows(decoder, expected, rows_NT, original.read)
    second = _windows(decoder, hidden, rows_NT, opened.read)
    figures: list[TokenFigures] = [
        token_figures(logits, copy, following) for (logits, following), (copy, _) in zip(first, second, strict=True)
    ]
    return summary(figures)


def _measure_embeddings(original: Original, opened: Opened, decoder: Decoder, hidden: Tensor) -> dict[str, float]:
    """How far an encoder's embeddings and final hidden states are from the original's, a text at a time."""
    assert original.hidden_at is not None
    expected = tensor_file.load(original.hidden_at(decoder.blocks))["hidden"]
    outer = [{name: read(name) for name in decoder.output_names} for read in (original.read, opened.read)]
    total = Difference()
    pooled: tuple[list[Tensor], list[Tensor]] = ([], [])
    for first, second in zip(expected.unsqueeze(1), hidden.unsqueeze(1), strict=True):
        final = decoder.final(first, outer[0]), decoder.final(second, outer[1])
        total += difference(*final)
        for vectors, states in zip(pooled, final, strict=True):
            vectors.append(pool(states, original.pooling))
    return embedding_figures(torch.cat(pooled[0]), torch.cat(pooled[1])) | {"hidden_relative_mse": total.relative_mse}
