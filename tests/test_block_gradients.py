"""How far a block's output is off, and what that owes to its weights: of every family, and whoever computes it."""

# N sequences, T tokens, D hidden width
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny_families
from converter.adapt import adapt
from converter.architecture import Architecture, find
from converter.blocks import Decoder
from converter.caches import CacheRounding
from converter.schemes import CACHES, TOKEN_INT8
from converter.source import Snapshot, open_folder

QUICK = ("qwen3_moe", "gpt2", "bert")
ROWS = torch.arange(36).reshape(3, 12) + 5


def opened(name: str, folder: Path) -> tuple[Snapshot, Architecture]:
    """The tiny model of this name, written to `folder`."""
    tiny_families.tiny_models()[name].save(folder)
    snapshot = open_folder(folder, name)
    return adapt(snapshot, find(snapshot.config, name), name)


def first_block(
    snapshot: Snapshot, architecture: Architecture, decoder: Decoder
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Its tensors moved away from the original's, and hidden states [N, T, D]: in front, and the original's behind."""
    outer = {name: snapshot.read(name).float() for name in decoder.input_names}
    hidden = decoder.embed(ROWS, outer)
    prefix = architecture.prefix(0)
    tensors = {name.removeprefix(prefix): snapshot.read(name).float() for name in snapshot.tensors if prefix in name}
    wanted = decoder.run_block(0, tensors, hidden)
    random = torch.Generator().manual_seed(1)
    moved = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=random) if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }
    return moved, hidden, wanted


def linears(architecture: Architecture, tensors: Mapping[str, Tensor]) -> list[str]:
    """The weights of the block's linears."""
    return [name for tap in architecture.taps for one in tap.linears if (name := f"{one}.weight") in tensors]


@pytest.mark.parametrize("name", tiny_families.names_of("causal", "encoder", "text", "relaid", quick=QUICK))
def test_the_gradient_is_the_slope_of_the_error(name: str, tmp_path: Path) -> None:
    snapshot, architecture = opened(name, tmp_path)
    if architecture.runs == "none":
        pytest.skip("is not run")
    dtype = torch.float32 if architecture.name == "mamba" else torch.float64  # Mamba's scan is f32 inside
    decoder = Decoder(tmp_path, architecture, name, stored=snapshot.tensors, dtype=dtype)
    moved, hidden, wanted = first_block(snapshot, architecture, decoder)
    tensors = {one: tensor.to(dtype) for one, tensor in moved.items()}
    names = linears(architecture, tensors)
    errors_N, gradients = decoder.errors(0, tensors, hidden, wanted, names)
    assert list(gradients) == names and bool((errors_N > 0).all())
    behind = decoder.run_block(0, tensors, hidden)
    torch.testing.assert_close(errors_N, (behind - wanted).double().square().sum((1, 2)), rtol=1e-12, atol=0)
    # Up and down the hill, so little that hardly a token changes its expert, so much that sums in f32 do not matter.
    norm = torch.stack([gradients[one].square().sum() for one in names]).sum().sqrt()
    length = 2e-6 * torch.stack([tensors[one].square().sum() for one in names]).sum().sqrt()
    off = []
    for sign in (1, -1):
        there = {one: tensors[one] + sign * length / norm * gradients[one] for one in names}
        off.append(float(decoder.errors(0, {**tensors, **there}, hidden, wanted)[0].sum()))
    assert (off[0] - off[1]) / 2 == pytest.approx(float(norm * length), rel=0.02)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_workers_and_torch_threads_change_no_bit(name: str, tmp_path: Path) -> None:
    snapshot, architecture = opened(name, tmp_path)
    found = []
    for workers, threads in ((1, 1), (3, 1), (2, 2)):
        torch.set_num_threads(threads)
        decoder = Decoder(tmp_path, architecture, name, stored=snapshot.tensors, workers=workers)
        tensors, hidden, wanted = first_block(snapshot, architecture, decoder)
        found.append(decoder.errors(0, tensors, hidden, wanted, linears(architecture, tensors)))
    torch.set_num_threads(1)
    for errors_N, gradients in found[1:]:
        assert torch.equal(errors_N, found[0][0])
        assert all(torch.equal(gradients[one], found[0][1][one]) for one in gradients)


def test_an_expert_that_no_row_reached_has_no_slope(tmp_path: Path) -> None:
    snapshot, architecture = opened("qwen3_moe", tmp_path)
    decoder = Decoder(tmp_path, architecture, "tiny", stored=snapshot.tensors)
    tensors, hidden, wanted = first_block(snapshot, architecture, decoder)
    seen: set[str] = set()
    decoder.run_block(0, tensors, hidden[:1, :1], lambda _, taps: seen.update(taps))
    names = linears(architecture, tensors)
    _, gradients = decoder.errors(0, tensors, hidden[:1, :1], wanted[:1, :1], names)
    taps = {f"{linear}.weight": tap.name for tap in architecture.taps for linear in tap.linears}
    reached = {one for one in names if taps[one] in seen}
    assert {one for one in names if bool(gradients[one].any())} == reached and len(reached) < len(names)


def test_weights_that_are_given_stay_as_they_are_and_need_no_gradient(tmp_path: Path) -> None:
    snapshot, architecture = opened("qwen3", tmp_path)
    decoder = Decoder(tmp_path, architecture, "tiny", stored=snapshot.tensors)
    tensors, hidden, wanted = first_block(snapshot, architecture, decoder)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    decoder.errors(0, tensors, hidden, wanted, linears(architecture, tensors))
    assert all(torch.equal(tensors[name], before[name]) and not tensors[name].requires_grad for name in tensors)
    behind = decoder.run_block(0, tensors, hidden)
    assert not behind.requires_grad


def test_rounding_of_inputs_and_of_the_cache_has_slope_one(tmp_path: Path) -> None:
    """The error is that of what is rounded, and the gradient nearly that without: eight bits change little."""
    snapshot, architecture = opened("qwen3", tmp_path)
    decoder = Decoder(tmp_path, architecture, "tiny", stored=snapshot.tensors)
    tensors, hidden, wanted = first_block(snapshot, architecture, decoder)
    names = linears(architecture, tensors)
    activations = {name.removesuffix(".weight"): TOKEN_INT8 for name in names}
    how = replace(CACHES["FP8"].how, lowest=-448.0, largest=448.0)
    rounding = CacheRounding(keys=(how,), values=(how,))
    _, plain = decoder.errors(0, tensors, hidden, wanted, names)
    errors_N, rounded = decoder.errors(0, tensors, hidden, wanted, names, activations, rounding)
    behind = decoder.run_block(0, tensors, hidden, activations=activations, rounding=rounding)
    # x + (rounded - x) is rounded to an eps of f32, and sums of 256 products carry some of those
    torch.testing.assert_close(errors_N, (behind - wanted).double().square().sum((1, 2)), rtol=1e-4, atol=0)
    for name in names:
        away = (rounded[name] - plain[name]).norm() / plain[name].norm()
        assert 0 < float(away) < 0.25
