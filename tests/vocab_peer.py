"""llama.cpp's vocabulary alone, through the C functions that the `xllamacpp` wheel exports.

A GGUF file of metadata and no tensors is enough for it and loads in milliseconds, so hundreds of vocabularies can be
compared. As in llama_peer it runs in a process of its own: what llama.cpp asserts then fails one test.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from patience import PATIENCE_SECONDS

ROLES = ("bos", "eos", "eot", "sep", "pad", "mask", "fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep")
FLAGS = ("add_bos", "add_eos", "add_sep")


class Vocabularies:
    """Loads one vocabulary after another, to be used in a `with` statement.

    Raises RuntimeError with llama.cpp's own words when one does not load.
    """

    def __enter__(self) -> Vocabularies:
        self.said = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()

    def load(self, path: Path) -> None:
        self._ask(load=str(path))

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, the special tokens in it and around it count as such."""
        ids: list[int] = self._ask(text=text, special=special)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._ask(ids=list(ids)))

    def facts(self) -> dict[str, Any]:
        """What is put around a text, and the ids of the special tokens; -1 for none."""
        facts: dict[str, Any] = self._ask()
        return facts

    def _ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            self.said.seek(0)
            raise RuntimeError(f"llama.cpp gave no answer: {self.said.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["answer"]


class ModelParameters(ctypes.Structure):
    """`llama_model_params` of llama.h, of which only vocab_only is set here."""

    _fields_ = (
        ("devices", ctypes.c_void_p),
        ("tensor_buft_overrides", ctypes.c_void_p),
        ("n_gpu_layers", ctypes.c_int32),
        ("split_mode", ctypes.c_int),
        ("load_mode", ctypes.c_int),
        ("lazy_mode", ctypes.c_int),
        ("main_gpu", ctypes.c_int32),
        ("tensor_split", ctypes.c_void_p),
        ("progress_callback", ctypes.c_void_p),
        ("progress_callback_user_data", ctypes.c_void_p),
        ("kv_overrides", ctypes.c_void_p),
        ("vocab_only", ctypes.c_bool),
        ("others", ctypes.c_bool * 5),
    )


class Server:
    """The other side: answers one request a line."""

    def __init__(self) -> None:
        found = find_spec("xllamacpp")
        assert found is not None and found.submodule_search_locations is not None
        path = Path(found.submodule_search_locations[0]) / "xllamacpp.abi3.so"
        self.library = ctypes.CDLL(str(path))
        self.said: list[str] = []
        callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
        self.log = callback(lambda level, text, data: self.said.append(text.decode("utf-8", "replace")))
        self.library.llama_log_set(self.log, None)
        self.library.llama_model_default_params.restype = ModelParameters
        self.library.llama_model_load_from_file.argtypes = (ctypes.c_char_p, ModelParameters)
        self.library.llama_model_load_from_file.restype = ctypes.c_void_p
        self.library.llama_model_get_vocab.argtypes = (ctypes.c_void_p,)
        self.library.llama_model_get_vocab.restype = ctypes.c_void_p
        self.library.llama_backend_init()

    def answer(self, request: dict[str, Any]) -> Any:
        if "load" in request:
            parameters = self.library.llama_model_default_params()
            parameters.vocab_only = True
            self.said.clear()
            model = self.library.llama_model_load_from_file(request["load"].encode(), parameters)
            if not model:
                raise RuntimeError("".join(self.said)[-2000:])
            self.vocabulary = ctypes.c_void_p(self.library.llama_model_get_vocab(model))
            return True
        if "text" in request:
            text = request["text"].encode()
            room = (ctypes.c_int32 * (2 * len(text) + 16))()
            special = ctypes.c_bool(request["special"])
            count = self.library.llama_tokenize(self.vocabulary, text, len(text), room, len(room), special, special)
            return list(room[:count])
        if "ids" in request:
            ids = (ctypes.c_int32 * len(request["ids"]))(*request["ids"])
            space = ctypes.create_string_buffer(64 * len(ids) + 64)
            count = self.library.llama_detokenize(
                self.vocabulary, ids, len(ids), space, len(space), ctypes.c_bool(False), ctypes.c_bool(True)
            )
            return space.raw[:count].decode("utf-8", "replace")
        facts: dict[str, Any] = {role: self.library[f"llama_vocab_{role}"](self.vocabulary) for role in ROLES}
        for flag in FLAGS:
            ask = self.library[f"llama_vocab_get_{flag}"]
            ask.restype = ctypes.c_bool
            facts[flag] = ask(self.vocabulary)
        return facts


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    server = Server()
    for line in sys.stdin:
        try:
            said = {"answer": server.answer(json.loads(line))}
        except RuntimeError as error:
            said = {"error": str(error)}
        print(json.dumps(said), file=answers, flush=True)


if __name__ == "__main__":
    serve()
