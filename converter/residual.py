"""Which tensors of a family touch the residual stream: what a change of its basis has to change.

Every tensor of a block is accounted for: it reads the stream behind a norm, it adds to the stream, or it lies between
the two. So a tensor that nobody thought of, such as the dense MLP of a block among mixtures, is refused in the plan in
place of being left as it was. The alternative, finding readers and writers by their widths, mistakes the square
matrices inside attention for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Residual:
    """What reads the residual stream and what adds to it; modules, without ".weight".

    reads: by norm, the linears whose columns are the stream's behind it; the embedding, whose rows are put on the
    stream, stands under "". writes: linears whose rows are added to the stream. inner: what does neither. A norm's gain
    is `offset + weight`. fixed: why the stream cannot be turned (empty: it can, the model computes the same).
    """

    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()
    offset: float = 0.0
    fixed: str = ""

    def named(self, linears_of: Callable[[str], Iterable[str]]) -> Residual:
        """The same with every entry replaced by the modules that `linears_of` finds it to mean."""

        def found(entries: Iterable[str]) -> tuple[str, ...]:
            return tuple(module for entry in entries for module in linears_of(entry))

        return replace(
            self,
            reads={norm: found(entries) for norm, entries in self.reads.items()},
            writes=found(self.writes),
            inner=found(self.inner),
        )

    def problems(self, tensors: Mapping[str, tuple[int, ...]], width: int) -> Iterator[str]:
        """What keeps a change of basis from being carried out on these tensors, shapes by name, in words."""
        known = {f"{norm}.weight" for norm in self.reads if norm}
        for norm, linears in self.reads.items():
            for linear in linears:
                shape = tensors.get(f"{linear}.weight")
                if shape is not None and norm and tensors.get(f"{norm}.weight") != (width,):
                    yield f"{linear} reads {norm}, which has no {width} gains"
                if shape is not None and (len(shape) != 2 or shape[1] != width):
                    yield f"{linear}.weight is {list(shape)}, and the stream has {width} columns"
        for linear in self.writes:
            shape = tensors.get(f"{linear}.weight")
            if shape is not None and (len(shape) != 2 or shape[0] != width):
                yield f"{linear}.weight is {list(shape)}, and the stream has {width} columns"
            known |= {f"{linear}.weight", f"{linear}.bias"}
        known |= {*self.inner}
        modules = {module for linears in self.reads.values() for module in linears} | {*self.inner}
        starts = tuple(f"{module}." for module in self.inner)
        for name in tensors:
            if name not in known and name.rpartition(".")[0] not in modules and not name.startswith(starts):
                yield f"{name} is not known to read or to leave the residual stream"


def parse_residual(data: Any) -> Residual:
    """What a family's YAML says under `residual`: entries are names of taps or modules; text says why it is fixed."""
    if isinstance(data, str):
        return Residual(reads={}, fixed=data)
    return Residual(
        reads={norm: tuple(entries) for norm, entries in data["reads"].items()},
        writes=tuple(data["writes"]),
        inner=tuple(data.get("inner", ())),
        offset=data.get("offset", 0.0),
    )
