"""How the kernels here are compiled, and a disk cache that notices every change.

numba's cache renews a function when its own file changes, not when a file it calls into does: after an update of
`cpu_search.py` alone, the old search would go on running inside a cached kernel. So only the entry points are cached,
and each under a name with a digest of all the code and constants it reaches. The alternative, no cache, costs some ten
seconds of compiling in every process.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
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


def kernel(function: Function) -> Function:
    """`function` as an entry point: like `compiled`, without the interpreter lock, cached on disk."""
    function.__qualname__ = f"{function.__qualname__}_{digest(function)}"
    made: Function = numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    return made


def instruction(function: Function) -> Callable[..., Any]:
    """A numba intrinsic: `function` gives the signature and the LLVM code; calls have the arguments after the first."""
    made: Callable[..., Any] = intrinsic(function)
    return made


def digest(function: Callable[..., Any]) -> str:
    """Sixteen hexadecimal digits that change with the code and the constants of all of ours that `function` reaches."""
    texts: dict[str, str] = {}
    waiting: list[Any] = [function]
    while waiting:
        plain = waiting.pop()
        name = f"{plain.__module__}.{plain.__qualname__}"
        if name in texts:
            continue
        parts = []
        codes = [plain.__code__]
        while codes:
            code = codes.pop()
            parts.append(code.co_code.hex())
            for constant in code.co_consts:
                if isinstance(constant, CodeType):
                    codes.append(constant)
                else:
                    parts.append(repr(constant))
            for used in code.co_names:
                value = inspect.unwrap(plain.__globals__.get(used))  # behind numba's wrapper lies the function
                if inspect.isfunction(value) and value.__module__.startswith("quantkernels"):
                    waiting.append(value)
                elif isinstance(value, (int, float, str, tuple, np.generic)):
                    parts.append(f"{used}={value!r}")
        texts[name] = " ".join(parts)
    everything = "\n".join(f"{name} {text}" for name, text in sorted(texts.items()))
    return hashlib.sha256(everything.encode()).hexdigest()[:16]
