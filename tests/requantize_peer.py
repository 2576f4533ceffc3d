"""llama-quantize on a real file: `llama_model_quantize` of the peer in quantize_peer.py, in a process of its own."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import quantize_peer as peer
from patience import PATIENCE_SECONDS


def requantize(
    source: Path,
    out: Path,
    number: int,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    allow: bool = False,
) -> str:
    """Let llama.cpp convert the GGUF file `source` to the file type `number`; gives its words when it refuses.

    importance [M, I] by the tensor's name; allow: whether quantized tensors may be quantized again.
    """
    folder = peer.library_folder()
    assert folder is not None
    weights = out.with_suffix(".npz")
    np.savez(weights, **dict(importance or {}))
    command = [sys.executable, __file__, str(folder), str(source), str(out), str(number), str(weights), str(int(allow))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    if done.returncode:
        return f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}"
    said: str = json.loads(done.stdout.splitlines()[-1])
    return said


def main(folder: str, source: str, out: str, number: str, weights: str, allow: str) -> None:
    library = peer.Library(Path(folder))
    params = library.llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.allow_requantize = 1, int(number), bool(int(allow))
    kept = {name: np.ascontiguousarray(values, np.float32) for name, values in np.load(weights).items()}
    entries = [
        peer.ImatrixEntry(name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size)
        for name, values in kept.items()
    ]
    array = (peer.ImatrixEntry * (len(entries) + 1))(*entries, peer.ImatrixEntry(None, None, 0))
    params.imatrix = ctypes.addressof(array) if entries else None
    failed = library.llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(params))
    sys.stdout.write("\n" + json.dumps(" ".join("".join(library.log).split()) if failed else ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
