"""What stands in a model of transformers for its blocks, embeddings and fused experts, and where they are found."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from converter.architecture import Architecture
from converter.errors import UnsupportedError
from converter.experts import SeparateExperts

# What a stand-in does when the model calls block b: (b, hidden, further arguments, keyword arguments) -> hidden.
Visit = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


def stand_in(model: Any, architecture: Architecture, visit: Visit, where: str) -> list[nn.Module]:
    """Put stand-ins that call `visit` in place of the model's blocks; returns the blocks themselves, in order.

    Raises UnsupportedError, with `where`, when they are not where `architecture` says.
    """
    layers = submodule(model, architecture.canonical(architecture.block).partition(".{b}")[0], where)
    if not isinstance(layers, nn.ModuleList):
        what = f"transformers keeps no list of blocks at {architecture.block} in {type(model).__name__}"
        raise UnsupportedError(where, what, "Mend `block` in the family's YAML in converter/architectures")
    blocks = list(layers)
    for b, block in enumerate(blocks):
        # A shallow copy keeps attributes that a model's forward may look up on its blocks, such as attention_type
        layers[b] = copy.copy(block)
        layers[b].forward = partial(_call, visit, b)
    return blocks


def stand_in_for_embeddings(model: Any, embedding: str, where: str) -> None:
    """Let an encoder's module of embeddings hand on a hidden state that the model is given in place of tokens."""
    name = embedding.rpartition(".")[0]
    if not name:
        return  # the table alone, which the model itself leaves out then
    embeddings = submodule(model, name, where)
    stand_in = copy.copy(embeddings)
    stand_in.forward = partial(_hand_on, embeddings)
    parent, _, child = name.rpartition(".")
    setattr(submodule(model, parent, where), child, stand_in)


def _hand_on(embeddings: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point()]
    hidden: Tensor = given[0] if given else embeddings(*args, **kwargs)
    return hidden


def separate_experts(layer: nn.Module, architecture: Architecture, dtype: torch.dtype, where: str) -> None:
    """Give each expert of the block linears of its own, where transformers fuses them."""
    assert architecture.experts is not None
    parent, _, name = architecture.inner(architecture.experts.module).rpartition(".")
    if not hasattr(submodule(layer, parent, where), name):
        return  # a dense block among them, as the first ones of DeepSeek
    holder = submodule(layer, parent, where)
    fused = submodule(holder, name, where)
    holder.register_module(name, SeparateExperts(fused, architecture.experts, dtype))


def _call(visit: Visit, b: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return visit(b, hidden, args, kwargs)


def visit_block(
    thread: threading.local, b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Do what the call that runs in this thread is after."""
    visit: Visit = thread.visit
    return visit(b, hidden, args, kwargs)


def submodule(module: nn.Module, name: str, where: str) -> nn.Module:
    """The module of this name inside `module`; raises UnsupportedError, with `where`, when there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        what = f"transformers has no module {name} in {type(module).__name__}"
        raise UnsupportedError(where, what, "Mend the family's YAML in converter/architectures") from error


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Set the parameter or buffer of this name inside `module`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
