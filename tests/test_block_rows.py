"""What a rounder that learns is given in a run: with nothing rounded, the block gives what is wanted, in any basis."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import gguf_models as tiny
from converter import manifest as manifests
from converter.grids import Grid
from converter.methods import Block, Options, Rounded
from converter.methods.rtn import is_quantized, round_to_nearest
from converter.methods.tables import ROUNDERS
from jobs.convert import Run, convert
from small_run import write_manifest, write_model
from test_variety import Quiet
from tiny_families import few, tiny_models

PLAIN = {
    "w2": "{format: parquet, scheme: INT2, group_size: 32, method: autoround}",
    "q4-0": "{format: gguf, type: Q4_0, method: autoround}",
}
MOVED = {
    method: f"{{format: compressed-tensors, scheme: W2A16, group_size: 32, method: [{method}, autoround]}}"
    for method in ("smoothquant", "awq", "rotation", "reorder")
}
TINY = {one.name: one for one in tiny_models().values() if one.name == one.family and one.kind == "causal"}
# phi3: halves of a tensor; falcon: queries, keys and values in one; deepseek_v2: a latent; mamba: convolutions
QUICK = ("phi3",)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


def looked_at(place: Path, targets: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many blocks a run brought to its rounder, each found to give what is wanted as long as nothing is rounded."""
    seen = []

    def look(block: Block, grids: Mapping[str, Grid], options: Options) -> Rounded:
        rounded = round_to_nearest(block, grids, options)
        rows = block.rows
        if rows is None:  # outside of the blocks
            return rounded
        everything = range(rows.count)
        read_back = {name: coded.decode() for name, coded in rounded.coded.items()}
        of = [name for name, weight in block.tensors.items() if is_quantized(weight, grids[name])]
        errors, gradients = rows.gradients(read_back, everything, of)
        assert {name: slope.shape for name, slope in gradients.items()} == {
            name: block.tensors[name].shape for name in of
        }
        # Folds and turns are rounded to f32, 2^-24 of a value, and a block adds up some thousand of those.
        assert float(rows.errors(block.tensors, everything).sum()) < 1e-5 * float(errors.sum())
        seen.append(block.where)
        return rounded

    monkeypatch.setitem(ROUNDERS, "autoround", look)
    run = Run(
        manifest=manifests.load(write_manifest(place, targets, extra="")), out=place / "out", executor="inprocess"
    )
    assert not convert(run, Quiet()).failures
    return len(seen)


@pytest.mark.parametrize("name", few(TINY, QUICK))
def test_of_every_family(name: str, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    TINY[name].save(tmp_path / "model")
    tiny.save_tokenizer(tokenizer, tmp_path / "model", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    assert looked_at(tmp_path, PLAIN, monkeypatch) >= 2 * len(PLAIN)


def test_behind_every_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    assert looked_at(tmp_path, MOVED, monkeypatch) == 2 * len(MOVED)
