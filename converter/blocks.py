"""Any transformers decoder, one block at a time: only the block that runs has weights.

The model is built whole by transformers with its parameters on the meta device, where they take no memory, and its
buffers (rotary frequencies, embedding scales) real. Its own forward then tells what each block is called with: a
stand-in for each block records the masks and rotary embeddings that the model hands to it, sliding windows and local
rope included. Blocks run alone with those arguments; final norm, head and soft-capping are the model's own forward
around stand-ins that hand our hidden state on. The alternative, a forward per family written here, would need no
transformers but drift from it; its price would be paid at every new model.
"""

# N sequences, T tokens of a sequence, D hidden width, V vocabulary, I inputs of a linear
from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from converter.architecture import Architecture
from converter.errors import SourceError, UnsupportedError
from converter.experts import SeparateExperts
from converter.workers import Workers

# Number of the sequence and, by tap name, the hidden state [T, I] that the tap's linears read.
Observer = Callable[[int, Mapping[str, Tensor]], None]
# What a stand-in does when the model calls block b: (b, hidden, further arguments, keyword arguments) -> hidden.
Visit = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class _EnoughError(Exception):
    """Ends a forward pass whose remainder is not wanted."""


class Decoder:
    """A decoder whose blocks run one by one; results do not depend on the number of workers.

    blocks is their number. input_names and output_names are the checkpoint names of the tensors outside the blocks that
    `embed` and `logits` read; a tied head reads the embedding.
    """

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        where: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        workers: int = 1,
        stored: Collection[str] = (),
    ) -> None:
        """Build the model that folder/config.json describes, without weights; `where` names the model in errors.

        stored: names of the checkpoint's tensors; a head among them is the head, whatever config.json says of tying.
        Raises SourceError when the config cannot be read and UnsupportedError when it needs code of its own or its
        blocks are not where `architecture` says.
        """
        self.where = where
        self.dtype = dtype
        self.device = torch.device(device)
        self.workers = Workers(workers)
        self._architecture = architecture
        self._model = _skeleton(folder, dtype, self.device, where)
        self._thread = threading.local()  # .visit and .seen: what the call running in this thread is after
        # No way leads from the model back to this Decoder: in a circle it would outlive its task, with its threads and
        # what they hold, until Python looks for circles. That is some ten tasks later and was measured as 300 MB.
        self._layers = _stand_in(self._model, architecture, partial(_visit_block, self._thread), where)
        for layer in self._layers if architecture.experts else ():
            _separate_experts(layer, architecture, dtype, where)
        self._arguments: tuple[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None
        self.blocks = len(self._layers)
        self._embedding = f"{architecture.embedding}.weight"
        embedding = _submodule(self._model, architecture.embedding, where)
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # matters to gradients only, and may lie outside the table that `embed` gives
        inputs, outputs = _outer_names(self._model, architecture, stored)
        self._outputs = outputs
        self.input_names = inputs
        self.output_names = tuple(sorted(set(outputs.values())))

    def check(self, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> None:
        """Raise SourceError unless these shapes, by checkpoint name, are what the model is made of.

        Outside of the blocks there may be more; inside, a tensor too many would change what a block computes.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        remedy = "Config.json and weights are of different models, or a file is missing: fetch both again"
        for name in (*self.input_names, *self.output_names):
            if name not in shapes:
                raise SourceError(self.where, f"the weights hold no {name}, which config.json calls for", remedy)
            if shapes[name] != expected[name]:
                what = f"{name} has the shape {list(shapes[name])}, and config.json makes it {list(expected[name])}"
                raise SourceError(self.where, what, remedy)
        blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in self._layers]
        for name, shape in shapes.items():
            b = architecture.block_of(name)
            if b is not None:
                blocks[b][architecture.inner(name.removeprefix(architecture.prefix(b)))] = shape
        for b, (layer, given) in enumerate(zip(self._layers, blocks, strict=True)):
            _check_names(layer, given, f"{self.where} block {b}")

    def embed(self, rows: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The hidden state in front of block 0, [N, T, D], for token rows [N, T] i64.

        outer holds the tensors of `input_names`, in any float type. Only the rows of the embedding that occur are
        converted: the table of a large vocabulary is never held twice.
        """
        tensors = {name: _take(outer, name, self.where) for name in self.input_names}
        table = tensors[self._embedding]
        if int(rows.max()) >= len(table):
            raise SourceError(
                self.where,
                f"the tokenizer gives token {int(rows.max())} but the embedding has {len(table)} rows",
                "Tokenizer and weights do not belong together: fetch both from the same commit",
            )
        used, numbers = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        tensors[self._embedding] = table[used.to(table.device)]

        def run(n: int) -> Tensor:
            seen: list[Tensor] = []

            def visit(b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                seen.append(hidden)
                raise _EnoughError

            self._forward(visit, input_ids=numbers[n : n + 1].to(self.device))
            return seen[0][0]

        with self._loaded(self._model, tensors):
            return self._stack(run, len(rows), rows.device)

    def run_block(
        self,
        b: int,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        observe: Observer | None = None,
        activation_bits: Mapping[str, int] | None = None,
    ) -> Tensor:
        """The hidden state [N, T, D] behind block b for `hidden` in front of it, one sequence at a time.

        tensors: the block's, by checkpoint name relative to the block. observe is called in order of the sequences, in
        the caller's thread; what it is given may be kept. activation_bits: linears whose input is quantized per token
        as `quantize_tokens` does, by module name relative to the block; taps are observed before that.
        Raises SourceError when names or shapes are not those of the block.
        """
        layer = self._layers[b]
        tensors = {self._architecture.inner(name): tensor for name, tensor in tensors.items()}
        _check_names(layer, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, f"{self.where} block {b}")
        args, kwargs = self._arguments_for(hidden.shape[1], hidden.shape[2])[b]

        def run(n: int) -> tuple[Tensor, dict[str, Tensor]]:
            seen: dict[str, Tensor] = {}
            self._thread.seen = seen
            with torch.no_grad():
                outcome = layer(hidden[n : n + 1].to(self.device, self.dtype), *args, **kwargs)
            del self._thread.seen
            return (outcome[0] if isinstance(outcome, tuple) else outcome)[0], seen

        behind = torch.empty_like(hidden, dtype=self.dtype)
        with self._loaded(layer, tensors), self._hooked(b, observe is not None, activation_bits or {}):
            for n, (one, seen) in enumerate(self.workers.map(run, range(len(hidden)))):
                behind[n] = one
                if observe is not None:
                    observe(n, seen)
        return behind

    def logits(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The model's logits [N, T, V] for the hidden state [N, T, D] behind the last block.

        outer holds the tensors of `output_names`; a head already in the decoder's type and place is used as it is.
        The result takes N x T x V values: give a few sequences at a time.
        """
        tensors = {inside: _take(outer, name, self.where) for inside, name in self._outputs.items()}

        def run(n: int) -> Tensor:
            ours = hidden[n : n + 1].to(self.device, self.dtype)
            outcome = self._forward(lambda b, theirs, args, kwargs: theirs if b else ours, inputs_embeds=ours)
            logits: Tensor = outcome.logits[0]
            return logits

        with self._loaded(self._model, tensors):
            return self._stack(run, len(hidden), hidden.device)

    def _stack(self, run: Callable[[int], Tensor], count: int, device: torch.device) -> Tensor:
        """run(0), run(1) ... in one tensor, without holding them twice."""
        stacked: Tensor | None = None
        for n, one in enumerate(self.workers.map(run, range(count))):
            stacked = torch.empty(count, *one.shape, dtype=one.dtype, device=device) if stacked is None else stacked
            stacked[n] = one
        assert stacked is not None, "no rows were given"
        return stacked

    def _forward(self, visit: Visit, **inputs: Tensor) -> Any:
        """The model's own forward with `visit` in place of every block; None when it ended with _EnoughError."""
        self._thread.visit = visit
        try:
            with torch.no_grad():
                return self._model(use_cache=False, **inputs)
        except _EnoughError:
            return None
        finally:
            del self._thread.visit

    def _arguments_for(self, length: int, width: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model passes to each block beside the hidden state, for one sequence of this length; kept."""
        if self._arguments is None or self._arguments[0] != length:
            calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def visit(b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                calls.append((args, kwargs))
                if b == self.blocks - 1:
                    raise _EnoughError
                return hidden

            self._forward(visit, inputs_embeds=torch.zeros(1, length, width, dtype=self.dtype, device=self.device))
            self._arguments = (length, calls)
        return self._arguments[1]

    @contextmanager
    def _loaded(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, `module` has these weights; afterwards it is back on the meta device."""
        empty = {name: one for name, one in module.named_parameters(remove_duplicate=False) if name in tensors}
        try:
            for name, tensor in tensors.items():
                _put(module, name, tensor.to(self.device, self.dtype))
            yield
        finally:
            for name, parameter in empty.items():
                _put(module, name, parameter)

    @contextmanager
    def _hooked(self, b: int, observed: bool, activation_bits: Mapping[str, int]) -> Iterator[None]:
        """Inside, the block's linears report what they read, if `observed`, and then quantize it."""

        def see(tap: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._thread.seen[tap] = inputs[0].reshape(-1, inputs[0].shape[-1])

        def quantize(bits: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (quantize_tokens(inputs[0], bits), *inputs[1:])

        hooks: list[tuple[str, Callable[..., Any]]] = []
        if observed:
            hooks += [(tap.linears[0], partial(see, tap.name)) for tap in self._architecture.taps]
        hooks += [(linear, partial(quantize, bits)) for linear, bits in activation_bits.items()]
        handles = []
        try:
            for linear, hook in hooks:
                module = _submodule(self._layers[b], self._architecture.inner(linear), f"{self.where} block {b}")
                handles.append(module.register_forward_pre_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def quantize_tokens(hidden: Tensor, bits: int) -> Tensor:
    """`hidden` [..., I] rounded to a symmetric integer grid per token, as a server with dynamic scales does.

    Range -2^(bits-1) to 2^(bits-1)-1, scale = max|x| / ((2^bits - 1) / 2), so 127.5 at 8 bits; zeros
    stay zeros.
    Source: compressed-tensors 0.20, quantization/utils/helpers.py, calculate_qparams with strategy token.
    """
    scale = hidden.abs().amax(-1, keepdim=True) / ((2**bits - 1) / 2)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return (hidden / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """What calibration needs of a tokenizer.

    encode: text -> token numbers, without special tokens added. prefix: what the model expects in front of every
    sequence (the begin token of Llama and Gemma, nothing for Qwen). chat: messages -> text by the chat template.
    """

    encode: Callable[[str], list[int]]
    prefix: tuple[int, ...]
    chat: Callable[[list[dict[str, str]]], str]


def tokenizer(folder: Path, where: str) -> Tokenizer:
    """The tokenizer in a model's folder. Raises SourceError when there is none or it cannot be read."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise SourceError(
            where,
            "no tokenizer: none of tokenizer.json, tokenizer.model, vocab.json, vocab.txt is there",
            "Put the tokenizer of the original model beside the weights",
        )
    try:
        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise types of their own
        what = f"the tokenizer cannot be read: {_reason(error)}"
        raise SourceError(where, what, "Fetch the tokenizer files again") from error

    def encode(text: str) -> list[int]:
        numbers: list[int] = loaded(text, add_special_tokens=False, verbose=False)["input_ids"]
        return numbers

    def chat(messages: list[dict[str, str]]) -> str:
        if loaded.chat_template is None:
            remedy = 'Give the text under "text" instead of "messages"'
            raise SourceError(where, "the tokenizer has no chat template", remedy)
        return str(loaded.apply_chat_template(messages, tokenize=False))

    plain, full = encode("a"), loaded("a")["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return Tokenizer(encode=encode, prefix=tuple(full[:start]), chat=chat)


def _skeleton(folder: Path, dtype: torch.dtype, device: torch.device, where: str) -> Any:
    """The transformers model of folder/config.json: parameters on meta, buffers real and on `device`, in eval mode."""
    config = _config(folder, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # KeyError, ZeroDivisionError and others: whatever a wrong value leads to
        what = f"transformers cannot build a model from config.json: {_reason(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            # NaN, so that a buffer which the next step forgets shows; integers have none
            fill = torch.nan if buffer.is_floating_point() else 0
            setattr(module, name, torch.full(buffer.shape, fill, dtype=buffer.dtype, device=device))
    model.initialize_weights()  # on meta parameters this does nothing: it computes the buffers, as from_pretrained does
    stored = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in stored and bool(torch.isnan(buffer).any()):
            raise UnsupportedError(where, f"transformers does not initialise buffer {name}", "Use a newer transformers")
    return model.eval()


def _config(folder: Path, where: str) -> Any:
    try:
        written = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        remedy = "Fetch the model's config.json again"
        raise SourceError(where, f"config.json cannot be read: {error}", remedy) from error
    if "auto_map" in written:
        raise UnsupportedError(
            where,
            "config.json asks for code that comes with the model (auto_map), which is never run",
            "Use a version of the model that transformers knows itself; if it is one, take auto_map out of config.json",
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers or the model's config class makes of a wrong value
        what = f"transformers cannot use config.json: {_reason(error)}"
        raise SourceError(where, what, "Mend config.json") from error
    if "quantization_config" in written:
        del config.quantization_config  # weights come to us decoded
    return config


def _reason(error: Exception) -> str:
    """A stranger's error in one line, with its type where the text alone says little, as for KeyError."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


def _stand_in(model: Any, architecture: Architecture, visit: Visit, where: str) -> list[nn.Module]:
    """Put stand-ins that call `visit` in place of the model's blocks; the blocks themselves, in order."""
    layers = _submodule(model, architecture.block.partition(".{b}")[0], where)
    if not isinstance(layers, nn.ModuleList):
        what = f"transformers keeps no list of blocks at {architecture.block} in {type(model).__name__}"
        raise UnsupportedError(where, what, "Mend `block` in the family's YAML in converter/architectures")
    blocks = list(layers)
    for b, block in enumerate(blocks):
        # A shallow copy keeps attributes that a model's forward may look up on its blocks, such as attention_type
        layers[b] = copy.copy(block)
        layers[b].forward = partial(_call, visit, b)
    return blocks


def _separate_experts(layer: nn.Module, architecture: Architecture, dtype: torch.dtype, where: str) -> None:
    """Give each expert of the block linears of its own, where transformers fuses them."""
    assert architecture.experts is not None
    parent, _, name = architecture.inner(architecture.experts.module).rpartition(".")
    holder = _submodule(layer, parent, where)
    fused = _submodule(holder, name, where)
    holder.register_module(name, SeparateExperts(fused, architecture.experts, dtype))


def _call(visit: Visit, b: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return visit(b, hidden, args, kwargs)


def _visit_block(
    thread: threading.local, b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Do what the call that runs in this thread is after."""
    visit: Visit = thread.visit
    return visit(b, hidden, args, kwargs)


def _outer_names(
    model: Any, architecture: Architecture, stored: Collection[str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names outside the blocks: those in front of block 0, and those behind the last by name in the model."""
    blocks = architecture.block.partition("{b}")[0]
    names = [name for name in model.state_dict() if not name.startswith(blocks)]
    behind = [name for name in names if name.startswith((f"{architecture.final_norm}.", f"{architecture.head}."))]
    head, embedding = f"{architecture.head}.weight", f"{architecture.embedding}.weight"
    tied = head not in stored and model.get_parameter(head) is model.get_parameter(embedding)
    outputs = {name: embedding if tied and name == head else name for name in behind}
    return tuple(name for name in names if name not in behind), outputs


def _submodule(module: nn.Module, name: str, where: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        what = f"transformers has no module {name} in {type(module).__name__}"
        raise UnsupportedError(where, what, "Mend the family's YAML in converter/architectures") from error


def _take(outer: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in outer:
        raise SourceError(where, f"tensor {name} is missing", "Fetch the model again, or mend the family's YAML")
    return outer[name]


def _check_names(layer: nn.Module, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise SourceError unless `given`, shapes by name, are exactly the block's tensors."""
    expected = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    shapes = [
        f"{name} is {given[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    problems = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected] + shapes
    if problems:
        raise SourceError(
            where,
            "its tensors are not those that transformers expects: " + "; ".join(problems),
            "Check that config.json belongs to these weights; a family whose tensors transformers fuses on load is not "
            "supported yet",
        )


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    is_parameter = leaf in dict(owner.named_parameters(recurse=False))
    setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
