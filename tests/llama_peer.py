"""llama.cpp, run inside the test through the `xllamacpp` wheel: the reader that GGUF files are made for."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import xllamacpp


class Llama:
    """A loaded GGUF file. Its HTTP side listens on loopback only; the server ends with this object."""

    def __init__(self, path: Path, context: int = 512) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx = context
        settings.n_parallel = 1
        settings.n_gpu_layers = 0
        settings.cpuparams.n_threads = 1
        settings.cpuparams_batch.n_threads = 1
        settings.hostnames = ["127.0.0.1"]
        settings.port = 0
        settings.warmup = False
        settings.verbosity = 0
        # The cache is f16 by default, which alone moves log-probabilities by 1e-3.
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(settings)

    def next_logprobs(self, ids: Sequence[int], count: int = 20) -> dict[int, float]:
        """Log-probabilities of the `count` likeliest next tokens after `ids`, by token id."""
        request = {"prompt": list(ids), "n_predict": 1, "n_probs": count, "cache_prompt": False, "temperature": 0.0}
        answer = self.server.handle_completions(request)
        assert isinstance(answer, dict), answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {int(entry["id"]): float(entry["logprob"]) for entry in top}

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """The ids of `text`; with `special`, the special tokens in it and around it count as such."""
        body = json.dumps({"content": text, "add_special": special, "parse_special": special}).encode()
        address = self.server.listening_address
        request = urllib.request.Request(f"{address}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens
