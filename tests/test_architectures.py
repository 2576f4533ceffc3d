"""Every family: its blocks compute what transformers does, and llama.cpp computes that from the written file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import gguf_models as tiny
from converter.blocks import Decoder
from llama_peer import Llama
from tiny_families import Tiny, names_of, tiny_models

TINY = tiny_models()
PROMPT = list(range(300, 420))  # long enough that the first and last position differ in every rotated pair
F32_ERROR = 2**-20  # of a product, relative: f32 sums of some hundred values in another order
F16_ERROR = 2**-11 / math.sqrt(3)  # of a value looked up in a table of f16 by an f16, which are two such errors
# Those of the default suite: each is of a kind of its own, and the long suite has all.
QUICK = ("llama", "gpt2", "falcon", "gemma3", "phi3", "deepseek_v3", "gpt_oss", "mamba", "lfm2")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tiny model, its folder, and the logits [T, V] that transformers gives for PROMPT."""

    one: Tiny
    folder: Path
    logits: torch.Tensor


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Tiny models by name, each made once."""
    tokenizer = tiny.byte_level()

    @cache
    def make(name: str) -> Saved:
        folder = tmp_path_factory.mktemp(name)
        logits = logits_of(TINY[name].save(folder))
        tiny.save_tokenizer(tokenizer, folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
        return Saved(one=TINY[name], folder=folder, logits=logits)

    return make


def test_every_family_has_a_tiny_model() -> None:
    families = {path.name for path in (resources.files("converter") / "architectures").iterdir()}
    assert families == {f"{one.family}.yaml" for one in TINY.values()}


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([PROMPT])).logits
    return logits[0]


@pytest.mark.parametrize("name", names_of("causal", quick=QUICK))
def test_blocks_compute_what_transformers_does(saved: Callable[[str], Saved], name: str) -> None:
    model = saved(name)
    folder = model.folder
    snapshot, architecture = tiny.load(folder)
    decoder = Decoder(folder, architecture, "test", stored=snapshot.tensors)
    decoder.check({name: header.shape for name, header in snapshot.tensors.items()})
    hidden = decoder.embed(torch.tensor([PROMPT]), {name: snapshot.read(name) for name in decoder.input_names})
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {name.removeprefix(prefix): snapshot.read(name) for name in snapshot.tensors if name.startswith(prefix)}
        seen: list[Mapping[str, torch.Tensor]] = []
        hidden = decoder.run_block(b, own, hidden, observe=partial(lambda all, _, taps: all.append(taps), seen))
        linears = {tap.name for name in own if (tap := architecture.tap_of(prefix + name))}
        assert {name for name in linears if not name.startswith("expert_")} <= set(seen[0])
    logits = decoder.logits(hidden, {name: snapshot.read(name) for name in decoder.output_names})
    assert float((logits[0] - model.logits).abs().max()) < tolerance(model.one, model.logits)


def tolerance(one: Tiny, logits: torch.Tensor) -> float:
    """Four standard deviations of the noise that rounding leaves in a logit.

    At most sixteen products in a layer and the head round what they read; the errors are independent and add in
    squares.
    """
    layers = one.config.num_hidden_layers
    error = (16 * layers + 1) * F32_ERROR**2 + 2 * layers * one.table_gelu * F16_ERROR**2
    return 4 * math.sqrt(error) * float(logits.std())


@pytest.mark.parametrize("name", names_of("causal", quick=QUICK))
def test_llama_cpp_computes_what_transformers_does(saved: Callable[[str], Saved], name: str, tmp_path: Path) -> None:
    model = saved(name)
    one, folder = model.one, model.folder
    tiny.write(folder, tiny.target("F32"), tmp_path)
    with Llama(next(tmp_path.glob("*.gguf"))) as reader:
        found = reader.next_logprobs(PROMPT, count=20)
    logits = (logits_of(one.load(folder, **one.read_as)) if one.read_as else model.logits)[-1]
    expected = logits.log_softmax(-1)
    worst = max(abs(value - float(expected[token])) for token, value in found.items())
    assert len(found) == 20
    assert worst < tolerance(one, logits), f"{worst} against {tolerance(one, logits)}"
