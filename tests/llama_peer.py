"""llama.cpp, through the `xllamacpp` wheel: the reader that GGUF files are made for.

It runs in a process of its own that is killed in the end: a file that llama.cpp chokes on then fails one test instead
of ending them all, and the wheel's server was seen to wait for itself for ever on the way out (2 runs in 6 here).
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from patience import PATIENCE_SECONDS

QUIET = os.environ | {"GGML_NO_BACKTRACE": "1"}  # or it starts gdb to say where it failed, which takes a minute


class Llama:
    """A loaded GGUF file, to be used in a `with` statement. Its HTTP side listens on loopback only.

    pooling: how `embeddings` are made of hidden states, NONE or MEAN, CLS, LAST; the file's own with UNSPECIFIED. Empty
    for models that continue text. ramp: the bounds of YaRN's ramp, fast and slow, that it is told to compute with.
    Raises RuntimeError with llama.cpp's own words when the file does not load.
    """

    def __init__(self, path: Path, context: int = 512, pooling: str = "", ramp: tuple[float, float] = (-1, -1)) -> None:
        command = [sys.executable, __file__, str(path), str(context), pooling, *map(str, ramp)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=QUIET
        )
        self.address = str(self._answer())

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()

    def next_logprobs(self, ids: Sequence[int], count: int = 20) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest next tokens after `ids`, by token id."""
        request: dict[str, Any] = {"prompt": list(ids), "n_predict": 1, "n_probs": count, "temperature": 0.0}
        # Probabilities come from raw logits; what is said is a letter, because after a token that ends the text or a
        # piece of a character the answer would hold none.
        request |= {"cache_prompt": False, "logit_bias": [[self.tokenize("a", special=False)[-1], 1e6]]}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        top = self._answer()["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {int(entry["id"]): float(entry["logprob"]) for entry in top}

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, the special tokens in it and around it count as such."""
        answer = self._post("tokenize", {"content": text, "add_special": special, "parse_special": special})
        tokens: list[int] = answer["tokens"]
        return tokens

    def embeddings(self, ids: Sequence[int]) -> list[list[float]]:
        """What pooling makes of the hidden states of `ids`, not normalised; without pooling, a vector for each."""
        answer = self._post("embeddings", {"content": list(ids), "embd_normalize": -1})
        found: list[list[float]] = answer[0]["embedding"]
        return found

    def _post(self, place: str, content: dict[str, Any]) -> Any:
        body = json.dumps(content).encode()
        request = urllib.request.Request(f"{self.address}/{place}", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:
            return json.load(answer)

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE_SECONDS)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.process.kill()
            _, said = self.process.communicate()
            raise RuntimeError(f"llama.cpp gave no answer: {said[-2000:]}")
        return json.loads(line)


def serve(path: str, context: int, pooling: str, ramp: tuple[float, float]) -> None:
    """Load the file, say the server's address, then answer one completion request per line."""
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.cpuparams.n_threads = 1
    settings.cpuparams_batch.n_threads = 1
    settings.hostnames = ["127.0.0.1"]
    settings.port = 0
    settings.warmup = False
    # The cache is f16 by default, which alone moves log-probabilities by 1e-3.
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.yarn_beta_fast, settings.yarn_beta_slow = ramp
    if pooling:
        settings.embedding = True
        settings.pooling_type = xllamacpp.llama_pooling_type[f"LLAMA_POOLING_TYPE_{pooling}"]
    server = xllamacpp.Server(settings)
    print(json.dumps(server.listening_address), flush=True)
    for line in sys.stdin:
        print(json.dumps(server.handle_completions(json.loads(line))), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], (float(sys.argv[4]), float(sys.argv[5])))
