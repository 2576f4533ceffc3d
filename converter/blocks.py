"""Any transformers decoder or encoder, one block at a time: only the block that runs has weights.

The model is built whole by transformers with its parameters on the meta device, where they take no memory, and its
buffers (rotary frequencies, embedding scales) real. Its own forward then tells what each block is called with: a
stand-in for each block records the masks and rotary embeddings that the model hands to it, sliding windows and local
rope included. Blocks run alone with those arguments; final norm, head and soft-capping are the model's own forward
around stand-ins that hand our hidden state on. An encoder differs at its ends: its embeddings are a module that reads
positions and types, too, and what it ends with is its hidden state. The alternative, a forward per family written here,
would need no transformers but drift from it; its price would be paid at every new model.
"""

# N sequences, T tokens of a sequence, D hidden width, V vocabulary, I inputs of a linear
from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from converter.architecture import MISMATCH, Architecture, ranges
from converter.caches import CacheRounding
from converter.errors import SourceError
from converter.hooks import Hooks
from converter.schemes import Activations
from converter.skeleton import skeleton
from converter.stand_ins import Visit, put, separate_experts, stand_in, stand_in_for_embeddings, submodule, visit_block
from converter.workers import Workers

# Number of the sequence and, by tap name, the hidden state [T, I] that the tap's linears read, or what was made of it.
Observer = Callable[[int, Mapping[str, Any]], None]
EMBEDDED_TOKENS = 4096  # looked up at a time: some thousand take no longer than one
SHOWN = 8  # differences of a block that a message names


class _EnoughError(Exception):
    """Ends a forward pass whose remainder is not wanted."""


class Decoder:
    """A decoder, or an encoder, whose blocks run one by one; results do not depend on the number of workers.

    blocks is their number; encodes tells an encoder; products is what linears multiply in. input_names and output_names
    are the checkpoint names of the tensors outside the blocks that `embed` and `logits` (`final` of an encoder) read; a
    tied head reads the embedding.
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
        products: torch.dtype = torch.float32,
    ) -> None:
        """Build the model that folder/config.json describes, without weights; `where` names the model in errors.

        products: the type in which the blocks' linears multiply; all that lies between them stays in `dtype`. stored:
        names of the checkpoint's tensors; a head among them is the head, whatever config.json says of tying.
        Raises SourceError when the config cannot be read and UnsupportedError when it needs code of its own or its
        blocks are not where `architecture` says.
        """
        self.where = where
        self.dtype = dtype
        self.products = products
        self.device = torch.device(device)
        self.workers = Workers(workers)
        self._architecture = architecture
        self._model = skeleton(folder, architecture.runs, dtype, self.device, where)
        self._thread = threading.local()  # .visit and .seen: what the call running in this thread is after
        # No way leads from the model back to this Decoder: in a circle it would outlive its last use, with its threads
        # and what they hold, until Python looks for circles. That is some ten tasks later and was measured as 300 MB.
        self._layers = stand_in(self._model, architecture, partial(visit_block, self._thread), where)
        self._separated: set[int] = set()
        self._kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], Mapping[str, tuple[int, ...]]] = {}
        self._arguments: tuple[int, list[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None
        self.blocks = len(self._layers)
        self._embedding = architecture.canonical(f"{architecture.embedding}.weight")
        embedding = submodule(self._model, self._embedding.removesuffix(".weight"), where)
        if isinstance(embedding, nn.Embedding):
            embedding.padding_idx = None  # matters to gradients only, and may lie outside the table that `embed` gives
        self.encodes = architecture.runs == "encoder"
        if self.encodes:
            stand_in_for_embeddings(self._model, self._embedding.removesuffix(".weight"), where)
        self._inputs, self._outputs = _outer_names(self._model, architecture, stored)
        self.input_names = tuple(self._inputs.values())
        self.output_names = tuple(sorted(set(self._outputs.values())))
        # What the model adds to a hidden state in front of block 0, such as a position's embedding, does not matter
        # where that hidden state is given: zeros that take no memory stand for it.
        shapes = {name: self._model.get_parameter(name).shape for name in self._inputs if name != self._embedding}
        self._unread = {} if self.encodes else {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
        self._unwraps = self._takes_first()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise SourceError, with all that differs, unless these shapes, by checkpoint name, are what the model is of.

        Outside of the blocks there may be more; inside, a tensor too many would change what a block computes.
        """
        architecture = self._architecture
        expected = {name: tuple(tensor.shape) for name, tensor in self._model.state_dict().items()}
        found: list[str] = []
        for name in dict.fromkeys((*self.input_names, *self.output_names)):
            inside = expected[architecture.canonical(name)]
            if name not in shapes:
                found.append(f"the weights hold no {name}, which config.json calls for")
            elif shapes[name] != inside:
                found.append(f"{name} has the shape {list(shapes[name])}, and config.json makes it {list(inside)}")
        blocks: list[dict[str, tuple[int, ...]]] = [{} for _ in self._layers]
        for name, shape in shapes.items():
            b = architecture.block_of(name)
            if b is not None:
                local = name.removeprefix(architecture.prefix(b))
                blocks[b][architecture.inner(local)] = shape[::-1] if self._is_transposed(local) else shape
        alike: dict[str, list[int]] = {}  # blocks by what is wrong with them
        for b, given in enumerate(blocks):
            if wrong := differences(self._expected(b), given):
                alike.setdefault(wrong, []).append(b)
        for wrong, numbers in alike.items():
            found.append(f"block {ranges(numbers)}: its tensors are not those that transformers expects: {wrong}")
        if found:
            raise SourceError(self.where, "; ".join(found), MISMATCH)

    def _expected(self, b: int) -> Mapping[str, tuple[int, ...]]:
        """The shapes of block b's tensors; of blocks that transformers makes alike, the experts are set apart once."""
        kind = tuple((name, tuple(tensor.shape)) for name, tensor in self._layers[b].state_dict().items())
        if kind not in self._kinds:
            self._kinds[kind] = {name: tuple(tensor.shape) for name, tensor in self._layer(b).state_dict().items()}
        return self._kinds[kind]

    def _layer(self, b: int) -> nn.Module:
        """Block b with a module of its own for each expert: a mixture has thousands, so only where one is run."""
        if self._architecture.experts and b not in self._separated:
            separate_experts(self._layers[b], self._architecture, self.dtype, self.where)
            self._separated.add(b)
        return self._layers[b]

    def _is_transposed(self, local: str) -> bool:
        """Whether transformers keeps this tensor of a block, a linear's weight, as [I, O]."""
        return local.removesuffix(".weight") in self._architecture.transposed

    def embed(self, rows: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The hidden state in front of block 0, [N, T, D], for token rows [N, T] i64.

        outer holds the tensors of `input_names`, in any float type. Only the rows of the embedding that occur are
        converted: the table of a large vocabulary is never held twice. Encoders take it whole, for some of them tell
        from a token's number where padding is.
        """
        tensors = {inside: _take(outer, name, self.where) for inside, name in self._inputs.items()}
        table = tensors[self._embedding]
        if int(rows.max()) >= len(table):
            raise SourceError(
                self.where,
                f"the tokenizer gives token {int(rows.max())} but the embedding has {len(table)} rows",
                "Tokenizer and weights do not belong together: fetch both from the same commit",
            )
        numbers = rows
        if not self.encodes:
            used, numbers = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
            tensors[self._embedding] = table[used.to(table.device)]

        def run(some: slice) -> Tensor:
            seen: list[Tensor] = []

            def visit(b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                seen.append(hidden)
                raise _EnoughError

            self._forward(visit, input_ids=numbers[some].to(self.device))
            return seen[0]

        with self._loaded(self._model, tensors):
            return self._stack(run, len(rows), rows.device, at_once=max(1, EMBEDDED_TOKENS // rows.shape[1]))

    def run_block(
        self,
        b: int,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        observe: Observer | None = None,
        activations: Mapping[str, Activations] | None = None,
        rounding: CacheRounding | None = None,
        watch_cache: bool = False,
        measure: Callable[[str, Tensor], Any] | None = None,
    ) -> Tensor:
        """The hidden state [N, T, D] behind block b for `hidden` in front of it, one sequence at a time.

        tensors: the block's, by checkpoint name relative to the block. observe is called in order of the sequences, in
        the caller's thread; what it is given may be kept. measure: what to make of a tap's hidden state before, given
        its name, in the thread that ran the sequence. activations: linears whose input is quantized, by module name
        relative to the block; taps are observed before that. rounding: of the keys and values that attention keeps;
        watch_cache: observe those, too, as the taps caches.KEYS and caches.VALUES, in blocks that have them.
        Raises SourceError when names or shapes are not those of the block.
        """

        def run(n: int) -> tuple[Tensor, dict[str, Any]]:
            seen: dict[str, Tensor] = {}
            self._thread.seen = seen
            with torch.no_grad():
                outcome = forward(hidden[n : n + 1])
            del self._thread.seen
            return outcome[0], {tap: measure(tap, rows) for tap, rows in seen.items()} if measure else seen

        behind = torch.empty_like(hidden, dtype=self.dtype)
        shape = hidden.shape[1:]
        with self._ready(b, tensors, shape, observe is not None, activations, rounding, watch_cache) as forward:
            for n, (one, seen) in enumerate(self.workers.map(run, range(len(hidden)))):
                behind[n] = one
                if observe is not None:
                    observe(n, seen)
        return behind

    def errors(
        self,
        b: int,
        tensors: Mapping[str, Tensor],
        hidden: Tensor,
        wanted: Tensor,
        of: Collection[str] = (),
        activations: Mapping[str, Activations] | None = None,
        rounding: CacheRounding | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How far the hidden state behind block b lies from `wanted` [N, T, D], and what that owes to its tensors.

        Gives the squared error of each sequence, f64 [N], and, summed over sequences in their order, the gradient f32
        of all with respect to each of the tensors named in `of`; zeros where no row reached one. Rounding on the way,
        of activations, keys and values, counts as slope 1. Otherwise as run_block.
        """
        layer = self._layer(b)
        inner = {name: self._architecture.inner(name) for name in of}

        def run(n: int) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.set_grad_enabled(bool(inner)):
                away = forward(hidden[n : n + 1])[0] - wanted[n].to(self.device, self.dtype)
                error = away.square().sum()
                slopes = torch.autograd.grad(error, leaves, allow_unused=True) if inner else ()
            return float(away.detach().double().square().sum()), slopes

        errors_N = torch.zeros(len(hidden), dtype=torch.float64)
        gradients = {name: torch.zeros_like(tensors[name], device=self.device) for name in of}
        with self._ready(b, tensors, hidden.shape[1:], False, activations, rounding, False) as forward:
            leaves = [layer.get_parameter(name).requires_grad_() for name in inner.values()]
            for n, (error, slopes) in enumerate(self.workers.map(run, range(len(hidden)))):
                errors_N[n] = error
                for name, slope in zip(inner, slopes, strict=False):
                    if slope is not None:
                        gradients[name] += slope.T if self._is_transposed(name) else slope
        return errors_N, gradients

    @contextmanager
    def _ready(
        self,
        b: int,
        tensors: Mapping[str, Tensor],
        shape: Sequence[int],
        observed: bool,
        activations: Mapping[str, Activations] | None,
        rounding: CacheRounding | None,
        watch_cache: bool,
    ) -> Iterator[Callable[[Tensor], Tensor]]:
        """Inside, what gives the hidden state [1, T, D] behind block b for one of this shape, [T, D], in front of it.

        The rest is run_block's. Raises SourceError when names or shapes are not those of the block.
        """
        layer, architecture = self._layer(b), self._architecture
        turned = {name: tensor.T if self._is_transposed(name) else tensor for name, tensor in tensors.items()}
        tensors = {architecture.inner(name): tensor for name, tensor in turned.items()}
        where = f"{self.where} block {b}"
        _check_names(layer, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
        args, kwargs = self._arguments_for(*shape)[b]

        def forward(hidden: Tensor) -> Tensor:
            outcome = layer(hidden.to(self.device, self.dtype), *args, **kwargs)
            first: Tensor = outcome[0] if isinstance(outcome, tuple) else outcome
            return first

        lowered = self._lowered(layer)
        types = {f"{name}.{part}": self.products for name in lowered for part in ("weight", "bias")}
        hooks = Hooks(layer=self._layers[b], architecture=architecture, thread=self._thread, where=where)
        with (
            self._loaded(layer, tensors, types),
            hooks.inputs(observed, activations or {}),
            hooks.products(lowered.values(), self.products, self.dtype),
            hooks.cache(rounding, watch_cache),
        ):
            yield forward

    def logits(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The model's logits [N, T, V] for the hidden state [N, T, D] behind the last block.

        outer holds the tensors of `output_names`; a head already in the decoder's type and place is used as it is.
        The result takes N x T x V values: give a few sequences at a time.
        """
        return self._behind(hidden, outer, "logits")

    def final(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """What an encoder ends with, [N, T, D], for the hidden state behind its last block; outer as in `logits`."""
        return self._behind(hidden, outer, "last_hidden_state")

    def _behind(self, hidden: Tensor, outer: Mapping[str, Tensor], answer: str) -> Tensor:
        """This part of the model's answer, [N, T, ...], for the hidden state behind the last block."""
        tensors = {inside: _take(outer, name, self.where) for inside, name in self._outputs.items()}

        def run(some: slice) -> Tensor:
            ours = hidden[some].to(self.device, self.dtype)
            outcome = self._forward(lambda b, theirs, args, kwargs: theirs if b else ours, inputs_embeds=ours)
            found: Tensor = outcome[answer]
            return found

        with self._loaded(self._model, self._unread | tensors):
            return self._stack(run, len(hidden), hidden.device)

    def _stack(self, run: Callable[[slice], Tensor], count: int, device: torch.device, at_once: int = 1) -> Tensor:
        """What `run` gives for so many of `count` sequences at a time, in one tensor, without holding it twice."""
        stacked: Tensor | None = None
        pieces = [slice(n, n + at_once) for n in range(0, count, at_once)]
        for some, found in zip(pieces, self.workers.map(run, pieces), strict=True):
            if stacked is None:
                stacked = torch.empty(count, *found.shape[1:], dtype=found.dtype, device=device)
            stacked[some] = found
        assert stacked is not None, "no rows were given"
        return stacked

    def _takes_first(self) -> bool:
        """Whether the model takes the first of what a block returns, as it does where blocks return tuples."""
        shapes: list[tuple[int, ...]] = []

        def visit(b: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            shapes.append(tuple(hidden.shape))
            if b or self.blocks == 1:
                raise _EnoughError
            return hidden

        width = self._model.get_parameter(self._embedding).shape[-1]
        with self._loaded(self._model, self._unread):
            self._run(visit, inputs_embeds=torch.zeros(1, 1, width, dtype=self.dtype, device=self.device))
        return shapes != shapes[:1] * len(shapes)

    def _forward(self, visit: Visit, **inputs: Tensor) -> Any:
        """The model's own forward with `visit` in place of every block; None when it ended with _EnoughError."""
        return self._run((lambda *given: (visit(*given),)) if self._unwraps else visit, **inputs)

    def _run(self, visit: Callable[..., Any], **inputs: Tensor) -> Any:
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

            with self._loaded(self._model, self._unread):
                self._forward(visit, inputs_embeds=torch.zeros(1, length, width, dtype=self.dtype, device=self.device))
            self._arguments = (length, calls)
        return self._arguments[1]

    def _lowered(self, layer: nn.Module) -> dict[str, nn.Linear]:
        """The block's linears that multiply in another type, by name."""
        if self.products == self.dtype:
            return {}
        return {name: module for name, module in layer.named_modules() if type(module) is nn.Linear}

    @contextmanager
    def _loaded(
        self, module: nn.Module, tensors: Mapping[str, Tensor], types: Mapping[str, torch.dtype] = MappingProxyType({})
    ) -> Iterator[None]:
        """Inside, `module` has these weights, some in types of their own; afterwards it is back on the meta device."""
        empty = {name: one for name, one in module.named_parameters(remove_duplicate=False) if name in tensors}
        try:
            for name, tensor in tensors.items():
                put(module, name, tensor.to(self.device, types.get(name, self.dtype)))
            yield
        finally:
            for name, parameter in empty.items():
                put(module, name, parameter)


def _outer_names(
    model: Any, architecture: Architecture, stored: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Names outside the blocks, by name in the model: those in front of block 0, and those behind the last."""
    canonical, spelled = architecture.canonical, architecture.spelled
    blocks = canonical(architecture.block.partition("{b}")[0])
    names = [name for name in model.state_dict() if not name.startswith(blocks)]
    last = tuple(canonical(f"{module}.") for module in (architecture.final_norm, architecture.head) if module)
    behind = [name for name in names if name.startswith(last)]
    head, embedding = canonical(f"{architecture.head}.weight"), canonical(f"{architecture.embedding}.weight")
    tied = (
        bool(architecture.head)
        and spelled(head) not in stored
        and model.get_parameter(head) is model.get_parameter(embedding)
    )
    outputs = {name: spelled(embedding if tied and name == head else name) for name in behind}
    return {name: spelled(name) for name in names if name not in behind}, outputs


def _take(outer: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in outer:
        raise SourceError(where, f"tensor {name} is missing", "Fetch the model again, or mend the family's YAML")
    return outer[name]


def _check_names(layer: nn.Module, given: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise SourceError unless `given`, shapes by name, are exactly the block's tensors."""
    if wrong := differences({name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}, given):
        raise SourceError(where, f"its tensors are not those that transformers expects: {wrong}", MISMATCH)


def differences(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with `given`, shapes by name, in words; empty when nothing is."""
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    shapes = [
        f"{name} is {given[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & given.keys())
        if given[name] != expected[name]
    ]
    found = [f"missing {name}" for name in missing] + [f"unexpected {name}" for name in unexpected] + shapes
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return ", ".join(found[:SHOWN] + more)
