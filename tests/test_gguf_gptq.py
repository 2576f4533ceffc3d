"""GPTQ inside GGUF blocks: less error in the same bytes, for every type with codes, and llama.cpp reads the file."""

# O out, I in, N rows.
from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gguf_models as tiny
from converter.architecture import Tap
from converter.blocks import Decoder
from converter.calibrate import calibrate_block
from converter.compare.evaluation import Original, block_tensors
from converter.containers.gguf import GGUF
from converter.grids import Coded, Grid
from converter.grids.ggml import GgmlGrid
from converter.grids.plain import PlainGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.stats import observe
from llama_peer import Llama
from quantkernels.ggml import TYPES
from test_gguf_consumer import PROMPT, decoded_model, tolerance
from tiny_families import few

WIDTH = 256
TYPED = [name for name in TYPES if name not in ("F32", "F16", "BF16")]
# Types whose codes ggml rounds to nearest on the stored scales when there is importance.
ROUNDED_LAST = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
WEIGHTED = Options(importance=True)


def hidden(rows: int = 700) -> Tensor:
    """Correlated rows [N, I] whose columns differ in power by a factor of thirty."""
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(WIDTH, WIDTH, generator=random) * 0.05 + torch.eye(WIDTH)
    return torch.randn(rows, WIDTH, generator=random) @ mix * torch.logspace(-1, 0.5, WIDTH)


def block(rows: Tensor) -> Block:
    random = torch.Generator().manual_seed(0)
    tensors = {f"{name}.weight": torch.randn(out, WIDTH, generator=random) for name, out in {"q": 40, "k": 9}.items()}
    tensors |= {"norm.weight": torch.ones(WIDTH)}
    taps = (Tap(name="input", linears=("q", "k")),)
    return Block(where="block 3", tensors=tensors, stats={"input": observe(rows, True)}, taps=taps)


def grids(of: Block, grid: Grid) -> dict[str, Grid]:
    return {name: grid if weight.ndim == 2 else PlainGrid(dtype="F32") for name, weight in of.tensors.items()}


def output_error(coded: Coded, weight: Tensor) -> float:
    return float((hidden().double() @ (coded.decode() - weight).double().T).square().sum())


@pytest.mark.parametrize("type", few(TYPED, ("Q4_K", "Q2_K", "Q8_0", "IQ4_XS", "IQ2_S")))
def test_gptq_has_far_less_output_error_than_the_search_in_as_many_bytes(type: str) -> None:
    given = block(hidden())
    chosen = grids(given, GgmlGrid(type=type))
    plain = round_to_nearest(given, chosen, WEIGHTED)
    solved = gptq(given, chosen, WEIGHTED)
    assert solved.notes == {} and list(solved.coded) == list(given.tensors)
    for name in ("q.weight", "k.weight"):
        before, after = plain.coded[name], solved.coded[name]
        assert after.parts["blocks"].shape == before.parts["blocks"].shape and after.grid == before.grid
        assert output_error(after, given.tensors[name]) < 0.8 * output_error(before, given.tensors[name])


@pytest.mark.parametrize("type", ["Q4_K", "Q2_K", "Q4_0", "IQ4_XS", "IQ2_S", "IQ3_XXS"])
def test_sweeps_over_codes_and_scales_take_off_more(type: str) -> None:
    given = block(hidden())
    chosen = grids(given, GgmlGrid(type=type))
    errors = []
    for sweeps in (0, 1, 3):
        solved = gptq(given, chosen, dataclasses.replace(WEIGHTED, sweeps=sweeps))
        errors.append(output_error(solved.coded["q.weight"], given.tensors["q.weight"]))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("type", ROUNDED_LAST)
def test_a_diagonal_hessian_leaves_the_codes_of_the_search(type: str) -> None:
    given = block(torch.eye(WIDTH) * torch.logspace(-1, 1, WIDTH))
    chosen = grids(given, GgmlGrid(type=type))
    plain = round_to_nearest(given, chosen, WEIGHTED)
    solved = gptq(given, chosen, dataclasses.replace(WEIGHTED, sweeps=0))
    for name in ("q.weight", "k.weight"):
        assert torch.equal(solved.coded[name].parts["blocks"], plain.coded[name].parts["blocks"])


def test_linears_of_a_tap_are_solved_together_as_if_alone() -> None:
    given = block(hidden())
    for types in (("Q4_K", "Q4_K"), ("Q4_K", "Q6_K"), ("IQ2_XS", "IQ2_XS"), ("IQ2_XS", "Q2_K")):
        chosen = {"q.weight": GgmlGrid(type=types[0]), "k.weight": GgmlGrid(type=types[1])}
        together = gptq(given, {**grids(given, chosen["q.weight"]), **chosen}, WEIGHTED)
        for name, grid in chosen.items():
            alone = dataclasses.replace(given, tensors={name: given.tensors[name]})
            expected = gptq(alone, {name: grid}, WEIGHTED).coded[name].parts["blocks"]
            assert torch.equal(together.coded[name].parts["blocks"], expected)


def test_what_cannot_be_solved_is_rounded_by_the_search_and_noted() -> None:
    given = dataclasses.replace(block(hidden()), stats={})
    chosen = grids(given, GgmlGrid(type="Q4_K"))
    solved, plain = gptq(given, chosen, Options()), round_to_nearest(given, chosen, Options())
    assert set(solved.notes) == {"q.weight", "k.weight"}
    assert all(note == "no Gram matrix: rounded to nearest" for note in solved.notes.values())
    for name in given.tensors:
        for part, values in plain.coded[name].parts.items():
            assert torch.equal(solved.coded[name].parts[part], values)


def test_floating_point_types_have_nothing_to_solve() -> None:
    given = block(hidden())
    for type in ("F32", "F16", "BF16"):
        chosen = grids(given, GgmlGrid(type=type))
        solved, plain = gptq(given, chosen, WEIGHTED), round_to_nearest(given, chosen, WEIGHTED)
        assert torch.equal(solved.coded["q.weight"].parts["blocks"], plain.coded["q.weight"].parts["blocks"])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_model(folder, "llama")
    tiny.save_tokenizer(tiny.byte_level(), folder, bos_token="<|endoftext|>", eos_token="<|im_end|>")
    return folder


def solved_parts(folder: Path, type: str) -> dict[str, Coded]:
    """Every tensor of the model's GGUF file, its linears solved on the model's own activations for random tokens."""
    snapshot, architecture = tiny.load(folder)
    original = Original(
        architecture=architecture,
        names=tuple(snapshot.tensors),
        read=lambda name: snapshot.read(name).float(),
        hidden_at=None,
    )
    decoder = Decoder(folder, architecture, "the test's model", stored=snapshot.tensors)
    tokens = torch.randint(0, 1000, (6, 64), generator=torch.Generator().manual_seed(2))
    state = decoder.embed(tokens, {name: original.read(name) for name in decoder.input_names})
    plan = GGUF.plan(snapshot, architecture, tiny.target(type, imatrix=True))
    coded: dict[str, Coded] = {}
    for b in (None, *range(decoder.blocks)):
        planned = {tensor.source: tensor for tensor in plan.tensors if tensor.block == b}
        prefix = architecture.prefix(b) if b is not None else ""
        own = Block(where="", tensors={name.removeprefix(prefix): original.read(name) for name in planned}, stats={})
        if b is not None:
            taps = frozenset(tap.name for tap in architecture.taps)
            done = calibrate_block(decoder, b, block_tensors(original, b), state, gram_for=taps)
            state, own = done.hidden, dataclasses.replace(own, stats=done.stats, taps=architecture.taps)
        wanted = {name.removeprefix(prefix): tensor.grid for name, tensor in planned.items()}
        rounded = (gptq if b is not None else round_to_nearest)(own, wanted, Options())
        coded |= {tensor.name: rounded.coded[name.removeprefix(prefix)] for name, tensor in planned.items()}
    return coded


@pytest.mark.parametrize("type", few(["Q4_K_M", "Q2_K", "IQ4_XS", "IQ2_XS", "IQ3_XXS"], ("Q4_K_M", "IQ2_XS")))
def test_llama_cpp_computes_with_a_solved_file_what_our_decoder_says(model: Path, type: str, tmp_path: Path) -> None:
    snapshot, architecture = tiny.load(model)
    coded = solved_parts(model, type)
    wanted = tiny.target(type, imatrix=True)
    plan = GGUF.plan(snapshot, architecture, wanted)
    GGUF.write(plan, snapshot, architecture, wanted, lambda name: coded[name].parts, tmp_path)
    reference = decoded_model(model, tmp_path)
    with torch.no_grad():
        logits = reference(torch.tensor([PROMPT])).logits[0, -1]
    expected = logits.log_softmax(-1)
    with Llama(next(tmp_path.glob("*.gguf"))) as reader:
        found = reader.next_logprobs(PROMPT, count=20)
    worst = max(abs(value - float(expected[token])) for token, value in found.items())
    assert worst < tolerance("Q4_K_M", logits, reference.config) and not math.isnan(worst)
