"""Foldings: in every family, blocks compute the same with columns scaled and what comes in front of them divided."""

# N rows, T tokens, I in.
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import gguf_models as tiny
from converter.architecture import Folding
from converter.blocks import Decoder
from converter.grids.plain import PlainGrid
from converter.methods import Block
from converter.methods.folding import fold, rows_of, scaled_by
from tiny_families import names_of, tiny_models

TINY = tiny_models()
PROMPT = torch.arange(300, 364)[None]
F32 = PlainGrid(dtype="F32")
# Those of the default suite: each folds otherwise.
QUICK = ("llama", "gpt2", "gemma3", "phi3", "glm", "mixtral", "deepseek_v3", "granitemoe", "lfm2", "bert")


def scale_of(folding: Folding, columns: int) -> Tensor:
    """Scales from 1/4 to 4, equal where columns share a row."""
    random = torch.Generator().manual_seed(columns)
    return (4 ** (2 * torch.rand(columns, generator=random) - 1))[rows_of(folding, columns)]


@pytest.mark.parametrize("name", names_of("causal", "encoder", quick=QUICK))
def test_blocks_compute_the_same_after_every_folding(name: str, tmp_path: Path) -> None:
    TINY[name].save(tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    hidden = decoder.embed(PROMPT, {name: snapshot.read(name) for name in decoder.input_names})
    done: set[Folding] = set()
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}
        given = Block(where="test", tensors=own, stats={}, taps=architecture.taps, foldings=architecture.foldings)
        behind = decoder.run_block(b, own, hidden)
        folded = given
        for folding in architecture.foldings:
            if names := scaled_by(folded, folding):
                done.add(folding)
                before, scale_I = folded, scale_of(folding, own[names[0]].shape[1])
                folded = fold(folded, folding, scale_I, dict.fromkeys(own, F32))
                assert all(not torch.equal(folded.tensors[name], before.tensors[name]) for name in names)
        change = decoder.run_block(b, folded.tensors, hidden) - behind
        # Products round otherwise, by some 2^-22 of each; a wrong scale moves the output by its own size.
        assert float(change.norm()) < 1e-5 * float((behind - hidden).norm())
        hidden = behind
    present = {tap.name for name in snapshot.tensors if (tap := architecture.tap_of(name))}
    assert {folding for folding in architecture.foldings if folding.linear and folding.tap in present} <= done
