"""How the kernels are compiled, and a disk cache that notices every change and stands several processes.

numba's cache renews a function when its own file changes, not when a file it calls into does: after an update of
`cpu/search.py` alone, the old search would go on running inside a cached kernel. So only the entry points are cached,
and each under a name with a digest of all the files and constants it reaches. The alternative, no cache, costs ten
seconds of compiling in every process. The price: an update leaves the old files in the cache, some 100 kB a kernel.

numba keeps the cache beside the code or, where that cannot be written, in the user's cache folder; NUMBA_CACHE_DIR
names another. Its files are renamed into place, so processes that start together on an empty cache compile the same
thing twice and no more. It numbers the signatures of a function though, and two processes that add different ones at
the same time may number them alike, after which one gets the other's machine code: a kernel must always be called with
the same types, layouts included (tested).
"""

from __future__ import annotations

import builtins
import dis
import hashlib
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, TypeVar

import numba
import numpy as np
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """`function` as a part of kernels: IEEE division, no fast-math, not cached by itself."""
    made: Function = numba.njit(nogil=True, error_model="numpy")(function)
    return made


def inlined(function: Function) -> Function:
    """`function` as a part of kernels that leaves no call behind, and cannot be called from Python.

    A call counts the references of every array, atomically: some 40 cycles each, more than an inner loop may cost.
    """
    made: Function = numba.njit(
        nogil=True, error_model="numpy", forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True
    )(function)
    return made


def kernel(function: Function) -> Function:
    """`function` as an entry point: like `compiled`, and cached on disk where any folder for that can be written.

    Raises NameError when a name that it or anything it calls uses is defined further down: the digest would miss it.
    """
    function.__qualname__ = f"{function.__qualname__}_{digest(function)}"
    try:
        made: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder; it says so at once, before anything is compiled
        warnings.warn("no folder for compiled kernels can be written: set NUMBA_CACHE_DIR to one", stacklevel=1)
        return compiled(function)
    return made


def instruction(function: Function) -> Callable[..., Any]:
    """A numba intrinsic: `function` gives the signature and the LLVM code; calls have the arguments after the first."""
    made: Callable[..., Any] = intrinsic(function)
    return made


def digest(function: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits that change with the files of all functions of ours that `function` reaches.

    And with the constants that these use, which may come from other files. Whole files, because what an operator does
    in a kernel stands in its module without a name.
    """
    package = function.__module__.partition(".")[0]
    texts = {__name__: inspect.getsource(sys.modules[__name__])}
    waiting: list[Any] = [function]
    while waiting:
        plain = waiting.pop()
        name = f"{plain.__module__}:{plain.__qualname__}"
        if name in texts:
            continue
        texts[plain.__module__] = inspect.getsource(sys.modules[plain.__module__])
        constants = []
        for used in _global_names(plain.__code__):
            if used not in plain.__globals__:
                if used not in vars(builtins):
                    raise NameError(f"{name} uses {used}, which must be defined above the kernel")
                continue
            value = inspect.unwrap(plain.__globals__[used])  # behind numba's wrapper lies the function
            if inspect.isfunction(value) and value.__module__.partition(".")[0] == package:
                waiting.append(value)
            elif isinstance(value, (int, float, str, tuple, np.generic)):
                constants.append(f"{used}={value!r}")
        texts[name] = " ".join(constants)
    everything = "\n".join(f"{name} {text}" for name, text in sorted(texts.items()))
    return hashlib.sha256(everything.encode()).hexdigest()[:16]


def _global_names(code: CodeType) -> Iterator[str]:
    """The names that a function's code, inner functions included, looks up in its module."""
    for step in dis.get_instructions(code):
        if step.opname == "LOAD_GLOBAL":
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)
