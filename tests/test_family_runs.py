"""Whole runs of every family: a manifest of one target of each kind is planned, and in the long suite carried out."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

import gguf_models as tiny
from converter import manifest as manifests
from jobs.convert import Run, convert, plan
from small_run import write_manifest
from test_variety import Quiet
from tiny_families import few, tiny_models

TARGETS = {
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: [awq, gptq], group_size: 32}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, gptq]}",
    "int8": "{format: parquet, scheme: INT8}",
}
TINY = {one.name: one for one in tiny_models().values() if one.name == one.family and one.kind == "causal"}
# apertus: numbers of a block that are tensors without a dimension
QUICK = ("apertus", "granitemoe")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.byte_level()


def prepared(name: str, place: Path, tokenizer: Tokenizer) -> Run:
    TINY[name].save(place / "model")
    tiny.save_tokenizer(tokenizer, place / "model", bos_token="<|endoftext|>", eos_token="<|im_end|>")
    manifest = manifests.load(write_manifest(place, TARGETS))
    return Run(manifest=manifest, out=place / "out", executor="inprocess")


@pytest.mark.parametrize("name", few(TINY, QUICK))
def test_every_format_of_every_family_is_planned(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ready = plan(prepared(name, tmp_path, tokenizer))
    assert not ready.prepared.problems and not ready.reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_every_format_of_every_family_is_made(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    result = convert(prepared(name, tmp_path, tokenizer), Quiet())
    assert not result.failures
    assert {row["target"]: row["status"] for row in result.rows} == dict.fromkeys(TARGETS, "done")
    assert all(row["output"]["kl_mean"] < 1 for row in result.rows)
