"""Models of an encoder and a decoder in llama.cpp, through its C API in the `xllamacpp` wheel: its server runs none.

It runs in a process of its own, for what llama.cpp does not like can end in an abort. Run as a program it loads a file
and prints the logits behind the last token of a decoder that was given the encoded prompt.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patience import PATIENCE_SECONDS

PARAMETER_BYTES = 1024  # more than llama.cpp's parameter structs take; what is too much is not read
F16, F32 = 1, 0  # of enum ggml_type
OPEN, DISABLED = -1, 0  # of enum llama_flash_attn_type


class Parameters(ctypes.Structure):
    """A struct that llama.cpp fills with its defaults and takes by value; only the start of the context's is named."""

    _fields_ = (("n_ctx", ctypes.c_uint32), ("rest", ctypes.c_uint8 * (PARAMETER_BYTES - 4)))


class Batch(ctypes.Structure):
    """llama_batch of llama.h."""

    _fields_ = (("n_tokens", ctypes.c_int32), *((f"array_{number}", ctypes.c_void_p) for number in range(6)))


def next_logits(path: Path, prompt: Sequence[int], begun: Sequence[int]) -> list[float]:
    """Logits [V] of what follows `begun` in the decoder, for the encoder's `prompt`.

    Raises RuntimeError with llama.cpp's own words when it gives none.
    """
    command = [sys.executable, __file__, str(path), json.dumps([list(prompt), list(begun)])]
    run = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    if run.returncode:
        raise RuntimeError(f"llama.cpp gave no answer: {run.stderr[-2000:]}")
    logits: list[float] = json.loads(run.stdout.splitlines()[-1])
    return logits


def library() -> ctypes.CDLL:
    import xllamacpp

    loaded = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("*.so"))))
    pointers = ("llama_model_load_from_file", "llama_init_from_model", "llama_model_get_vocab")
    returned: dict[str, Any] = {
        **dict.fromkeys(("llama_model_default_params", "llama_context_default_params"), Parameters),
        **dict.fromkeys(pointers, ctypes.c_void_p),
        "llama_batch_get_one": Batch,
        "llama_get_logits_ith": ctypes.POINTER(ctypes.c_float),
    }
    for name, kind in returned.items():
        getattr(loaded, name).restype = kind  # loaded[name] would be another function each time
    return loaded


def ints(*values: int) -> bytes:
    """Values of an enum, or several, as a struct holds them."""
    return b"".join(value.to_bytes(4, "little", signed=True) for value in values)


def main(path: str, prompt: Sequence[int], begun: Sequence[int]) -> None:
    llama = library()
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    assert model, "the file does not load"
    settings = llama.llama_context_default_params()
    # The cache is f16 by default, and flash attention, left to llama.cpp, rounds keys and values of the encoder to f16.
    # The cache's two types stand side by side, the choice of attention behind three that are left open, too, and
    # nothing else of the struct does as they do.
    exact = bytes(settings).replace(ints(F16, F16), ints(F32, F32), 1)
    exact = exact.replace(ints(OPEN, OPEN, OPEN, OPEN), ints(OPEN, OPEN, OPEN, DISABLED), 1)
    context = llama.llama_init_from_model(ctypes.c_void_p(model), Parameters.from_buffer_copy(exact))
    assert context, "there is no context"
    for step, tokens in ((llama.llama_encode, prompt), (llama.llama_decode, begun)):
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        failed = step(ctypes.c_void_p(context), llama.llama_batch_get_one(held, len(tokens)))
        assert not failed, f"llama.cpp says {failed}"
    vocab = ctypes.c_void_p(llama.llama_model_get_vocab(ctypes.c_void_p(model)))
    count = llama.llama_vocab_n_tokens(vocab)
    print(json.dumps(llama.llama_get_logits_ith(ctypes.c_void_p(context), -1)[:count]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *json.loads(sys.argv[2]))
