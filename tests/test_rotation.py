"""Rotation: models compute the same in another basis, statistics follow, and what cannot be turned is refused."""

# N rows, T tokens, D width of what is turned.
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gguf_models as tiny
from converter.adapt import untied
from converter.architecture import Architecture, families
from converter.blocks import Decoder
from converter.containers.selection import choose
from converter.containers.small_files import original_config
from converter.grids.affine import AffineGrid
from converter.grids.micro import MicroGrid
from converter.manifest import Target
from converter.methods import Block, Options
from converter.methods.rotation import rotation, rotation_of, unrotated, why_fixed
from converter.source import Snapshot
from converter.stats import Collector, TapStats, observe
from test_architectures import PROMPT, logits_of, tolerance
from tiny_families import few, tiny_models

TINY = {name: one for name, one in tiny_models().items() if one.kind in ("causal", "relaid")}
# Those of the default suite: each is turned otherwise.
QUICK = ("llama", "gemma", "phi3", "mixtral", "deepseek_v3", "gpt_oss", "lfm2", "mamba", "granitemoe")
OPTIONS = Options(seed="0123456789abcdef0123456789abcdef01234567")


def turning() -> list[str]:
    """The tiny models of families whose residual stream can be turned."""
    fixed = {family.name for family in families() if family.residual.fixed}
    return [name for name, one in TINY.items() if one.family not in fixed and one.kind == "causal"]


def pieces(snapshot: Snapshot, architecture: Architecture) -> Iterator[tuple[str, Block]]:
    """What a run gives to transforms: each block with what its names begin with, and what lies outside, without."""
    for b in [None, *range(architecture.blocks)]:
        prefix = architecture.prefix(b) if b is not None else ""
        names = [name for name in snapshot.tensors if architecture.block_of(name) == b]
        yield (
            prefix,
            Block(
                where="test",
                tensors={name.removeprefix(prefix): snapshot.read(name).float() for name in names},
                stats={},
                taps=architecture.taps if prefix else (),
                foldings=architecture.foldings if prefix else (),
                residual=architecture.inner_residual if prefix else architecture.outer_residual,
            ),
        )


def turned_tensors(snapshot: Snapshot, architecture: Architecture) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for prefix, block in pieces(snapshot, architecture):
        after = rotation(block, {}, OPTIONS)
        found |= {prefix + name: values.contiguous() for name, values in after.tensors.items()}
    return found


def norms_of(architecture: Architecture, tensors: dict[str, Tensor]) -> list[Tensor]:
    inner = [norm for norm in architecture.inner_residual.reads]
    names = [architecture.prefix(b) + norm for b in range(architecture.blocks) for norm in inner]
    return [tensors[f"{name}.weight"] for name in (*names, architecture.final_norm) if f"{name}.weight" in tensors]


@pytest.mark.parametrize("name", few(turning(), QUICK))
def test_a_turned_model_gives_the_logits_of_the_original(name: str, tmp_path: Path) -> None:
    expected = logits_of(TINY[name].save(tmp_path))
    snapshot, architecture = tiny.load(tmp_path)
    assert not why_fixed(architecture, {one.name: one.shape for one in snapshot.tensors.values()})
    snapshot = untied(snapshot, architecture)
    turned = turned_tensors(snapshot, architecture)
    head = f"{architecture.head}.weight"
    assert all(not torch.equal(turned[one], snapshot.read(one)) for one in (head, f"{architecture.embedding}.weight"))
    assert all(bool((gain == 1 - architecture.residual.offset).all()) for gain in norms_of(architecture, turned))
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    hidden = decoder.embed(torch.tensor([PROMPT]), turned)
    for b in range(decoder.blocks):
        prefix = architecture.prefix(b)
        own = {one.removeprefix(prefix): values for one, values in turned.items() if one.startswith(prefix)}
        hidden = decoder.run_block(b, own, hidden)
    logits = decoder.logits(hidden, turned)[0]
    # Beside the products' own rounding there is that of the weights, which were turned in f32 twice.
    assert float((logits - expected).abs().max()) < 2 * tolerance(TINY[name], expected)


def of_transformers(folder: Path, tensors: dict[str, Tensor], snapshot: Snapshot) -> None:
    """The model as a checkpoint of transformers, beside what else is in the folder."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(original_config(snapshot)))


@pytest.mark.parametrize("name", few(["llama", "llama-linear", "qwen2", "qwen3", "mixtral"], ["llama-linear"]))
def test_transformers_loads_a_turned_checkpoint_and_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    expected = logits_of(TINY[name].save(tmp_path))
    snapshot, architecture = tiny.load(tmp_path)
    snapshot = untied(snapshot, architecture)
    of_transformers(tmp_path, turned_tensors(snapshot, architecture), snapshot)
    logits = logits_of(TINY[name].load(tmp_path))
    assert float((logits - expected).abs().max()) < 2 * tolerance(TINY[name], expected)


def one_block(name: str, folder: Path) -> tuple[Snapshot, Architecture, Block]:
    TINY[name].save(folder)
    snapshot, architecture = tiny.load(folder)
    (_, _), (_, block), *_ = pieces(untied(snapshot, architecture), architecture)
    return snapshot, architecture, block


def seen_by_taps(decoder: Decoder, tensors: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def observe(row: int, taps: Mapping[str, Tensor]) -> None:
        for tap, x_TI in taps.items():
            seen.setdefault(tap, []).append(x_TI.clone())

    decoder.run_block(0, tensors, hidden, observe=observe, watch_cache=True)
    return {tap: torch.cat(rows) for tap, rows in seen.items()}


FOLLOWED = ("qwen2", "phi3", "gemma", "qwen3_moe", "deepseek_v3", "lfm2")


@pytest.mark.parametrize("name", few(FOLLOWED, FOLLOWED[:3]))
def test_statistics_follow_without_a_second_forward(name: str, tmp_path: Path) -> None:
    snapshot, architecture, block = one_block(name, tmp_path)
    decoder = Decoder(tmp_path, architecture, "test", stored=snapshot.tensors)
    hidden = decoder.embed(torch.tensor([PROMPT]), {one: snapshot.read(one) for one in decoder.input_names})
    first = {tap: observe(rows, True) for tap, rows in seen_by_taps(decoder, dict(block.tensors), hidden).items()}
    after = rotation(replace(block, stats=first), {}, OPTIONS)
    turn = rotation_of(OPTIONS.seed, "residual", hidden.shape[-1]).turn
    second = seen_by_taps(decoder, dict(after.tensors), turn(hidden))
    assert second.keys() == first.keys() == after.stats.keys()
    moved: set[str] = set()
    for tap, rows in second.items():
        expected, found = observe(rows, True), after.stats[tap]
        assert found.gram is not None and expected.gram is not None
        # Each is off by the rounding of some hundred products in f32, relative to the power of the whole tap.
        power = float(expected.gram.diagonal().sum())
        assert float((found.gram - expected.gram).abs().max()) < 2**-18 * power
        assert float((found.sum_squares - expected.sum_squares).abs().max()) < 2**-18 * power
        assert bool((found.abs_max * (1 + 1e-4) >= expected.abs_max).all())
        assert bool((found.abs_sum * (1 + 1e-3) >= expected.abs_sum).all())
        before = first[tap].gram
        assert before is not None
        moved |= {tap} if float((before - expected.gram).norm()) > 0.1 * float(before.norm()) else set()
    readers = {linear for linears in architecture.inner_residual.reads.values() for linear in linears}
    reading = {tap.name for tap in architecture.taps if readers & {*tap.linears}}
    heads = {folding.tap for folding in architecture.foldings if folding.heads}
    assert (reading | heads) & second.keys() <= moved
    assert not moved & {"mlp_middle", "cached_keys"}


def test_a_drift_follows_as_the_gram_does() -> None:
    random = torch.Generator().manual_seed(3)
    rows, original = (torch.randn(40, 48, generator=random) for _ in range(2))
    rotated = rotation_of("seed", "residual", 48)

    def collected(hidden: Tensor, beside: Tensor) -> TapStats:
        collector = Collector(columns=48, gram=True, drift=True)
        collector.add(hidden, beside)
        return collector.stats()

    found = collected(rows, original).turned(rotated.turn)
    expected = collected(rotated.turn(rows), rotated.turn(original))
    # Sums of 40 products of about 1, turned twice: some 100 roundings of f32.
    torch.testing.assert_close(found.drift, expected.drift, rtol=0, atol=100 * 40 * 2**-24)
    torch.testing.assert_close(found.gram, expected.gram, rtol=0, atol=100 * 40 * 2**-24)


def test_without_a_gram_matrix_powers_are_their_mean() -> None:
    stats = observe(torch.randn(20, 48, generator=torch.Generator().manual_seed(3)), False)
    found = stats.turned(rotation_of("seed", "head", 16).turn, 3)
    mean = stats.sum_squares.reshape(3, 16).mean(1)
    torch.testing.assert_close(found.sum_squares, mean.repeat_interleave(16))
    assert found.gram is None


def test_columns_without_a_gain_have_the_power_that_is_left(tmp_path: Path) -> None:
    _, _, block = one_block("llama", tmp_path)
    gains = block.tensors["input_layernorm.weight"].clone()
    gains[[3, 70]] = 0
    gains[9] = -gains[9]
    normed = torch.randn(50, 256, generator=torch.Generator().manual_seed(4))
    normed = normed / normed.square().mean(1, keepdim=True).sqrt()
    given = replace(
        block,
        tensors={**block.tensors, "input_layernorm.weight": gains},
        stats={"attention_input": observe(normed * gains, True)},
    )
    found = rotation(given, {}, OPTIONS)
    stats = found.stats["attention_input"]
    assert stats.gram is not None
    assert float(stats.gram.diagonal().sum()) == pytest.approx(50 * 256, rel=1e-4)
    back = unrotated(given, found.tensors, OPTIONS.seed)
    for name, values in given.tensors.items():  # of columns that nothing reads the original's is given
        torch.testing.assert_close(back[name], values, rtol=0, atol=2**-18 * float(values.abs().max()))


@pytest.mark.parametrize("name", few(["llama", "gemma", "phi3", "mixtral", "gpt_oss"], ["llama", "gemma", "phi3"]))
def test_a_turned_model_comes_back(name: str, tmp_path: Path) -> None:
    TINY[name].save(tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    for _, block in pieces(untied(snapshot, architecture), architecture):
        back = unrotated(block, rotation(block, {}, OPTIONS).tensors, OPTIONS.seed)
        assert back.keys() == block.tensors.keys()
        for one, values in block.tensors.items():
            # Some thirty roundings of f32 of what a row holds; gains near 0 divide what there is of a column.
            torch.testing.assert_close(back[one], values, rtol=0, atol=2**-16 * float(values.abs().max()))


def test_every_place_of_every_model_has_signs_of_its_own() -> None:
    seen = [rotation_of(seed, place, 64) for seed in ("a", "b") for place in ("residual", "head")]
    assert len({tuple(one.sign_D.tolist()) for one in seen}) == 4
    assert all(set(one.sign_D.tolist()) == {-1.0, 1.0} for one in seen)
    again = rotation_of.__wrapped__("a", "residual", 64)
    assert torch.equal(again.sign_D, seen[0].sign_D)


@pytest.mark.parametrize("width", [16, 24])
@pytest.mark.parametrize(("shape", "dim"), [((5, 48), -1), ((48, 5), 0), ((3, 2, 48), -1), ((48,), 0), ((0, 48), -1)])
def test_vectors_are_turned_along_any_dimension(width: int, shape: tuple[int, ...], dim: int) -> None:
    one = rotation_of("seed", "head", width)
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    dense = one.turn(torch.eye(width))
    expected = (given.movedim(dim, -1).unflatten(-1, (-1, width)) @ dense).flatten(-2).movedim(-1, dim)
    torch.testing.assert_close(one.turn(given, dim), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.back(one.turn(given, dim), dim), given, rtol=0, atol=1e-5)


def shapes_of(snapshot: Snapshot) -> dict[str, tuple[int, ...]]:
    return {name: header.shape for name, header in snapshot.tensors.items()}


def test_a_tensor_that_nobody_thought_of_keeps_a_model_from_being_turned(tmp_path: Path) -> None:
    TINY["llama"].save(tmp_path)
    snapshot, architecture = tiny.load(tmp_path)
    shapes = shapes_of(snapshot)
    assert not why_fixed(architecture, shapes)
    for name in ("model.vision_tower.patch.weight", "model.layers.1.mlp.gate.weight", "model.layers.0.extra"):
        why = why_fixed(architecture, {**shapes, name: (4, 256)})
        assert "is not known to read or to leave the residual stream" in why
    less = {name: shape for name, shape in shapes.items() if name != "model.layers.1.input_layernorm.weight"}
    assert "reads input_layernorm, which has no 256 gains" in why_fixed(architecture, less)
    narrow = {**shapes, "model.layers.1.mlp.down_proj.weight": (128, 512)}
    assert "the stream has 256 columns" in why_fixed(architecture, narrow)


def test_every_family_says_what_its_residual_stream_is_or_why_it_is_fixed() -> None:
    for family in families():
        stream = family.residual
        assert bool(stream.fixed) != bool(stream.reads and stream.writes), family.name


@pytest.mark.parametrize("scheme", ["W3A16", "NVFP4A16", "MXFP4A16"])
def test_where_a_rotation_mixes_the_sizes_of_weights_scales_heed_them_no_more(scheme: str) -> None:
    for methods, heeded in ((["rotation", "gptq"], False), (["gptq"], True)):
        target = Target(name="t", format="compressed-tensors", scheme=scheme, method=methods)
        grid = choose(target, "model.layers.0.mlp.up_proj.weight").grid(group_size=128, scale_dtype="BF16")
        assert isinstance(grid, AffineGrid | MicroGrid) and grid.by_size is heeded
