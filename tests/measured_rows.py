"""Rows as a finished run records them, for tests of what is made of measured figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)> | `x` [a](javascript:b) \n---\nlicense: evil'
VOID = ("meta", "br", "hr", "img", "link", "input", "base")
SOURCE = {
    "repo": "org/small",
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "size_bytes": 16_000_000,
    "parameters": 8_000_000,
    "perplexity": 20.0,
    "tokens": 4080,
}


def output_of(loss: float) -> dict[str, float]:
    """Model-level figures that go with a mean KL divergence."""
    return {
        "perplexity": 20.0 * (1 + loss),
        "kl_mean": loss,
        "kl_median": loss / 2,
        "kl_p99": loss * 9,
        "top1_agreement": 1 - loss,
    }


def row_of(target: str, format: str, scheme: str, bits: float, loss: float | None, **changes: Any) -> dict[str, Any]:
    """The row of a finished artifact of model "small"; without a loss: of a model that could not be run."""
    ending = {"gguf": "gguf", "parquet": "parquet"}.get(format, "safetensors")
    size_bytes = int(bits * 1_000_000)
    row = {
        "model": "small",
        "target": target,
        "format": format,
        "scheme": scheme,
        "method": ["rtn"],
        "status": "done",
        "bits_per_weight": bits,
        "size_bytes": size_bytes,
        "compression_ratio": 16 / bits,
        "weight": {"cosine": 1 - bits**-4, "relative_mse": 2 * bits**-4},
        "output": {} if loss is None else output_of(loss),
        "seconds": 12.5,
        "peak_rss_bytes": 500_000_000,
        "files": [{"path": f"model.{ending}", "bytes": size_bytes, "sha256": "ab" * 32}],
        "source": dict(SOURCE),
        "notes": {},
        "warnings": [],
    }
    return row | changes


def rows(known: bool = True) -> list[dict[str, Any]]:
    """Five finished artifacts of which w8a8 is beaten, and two that are not there."""
    made = [
        row_of("q8-0", "gguf", "Q8_0", 8.5, 2e-5 if known else None),
        row_of("q4-k-m", "gguf", "Q4_K_M", 5.5, 0.012 if known else None),
        row_of("w4a16", "compressed-tensors", "W4A16", 6.0, 0.008 if known else None, method=["gptq"]),
        row_of("w8a8", "compressed-tensors", "W8A8", 9.0, 7e-4 if known else None, method=["smoothquant", "gptq"]),
        row_of("int2", "parquet", "INT2", 2.5, 0.4 if known else None),
    ]
    gone = {"model": "small", "target": "broken", "format": "gguf", "status": "failed", "error": "block 3: not finite"}
    left = {"model": "small", "target": "later", "format": "gguf", "status": "skipped", "error": "left out by --only"}
    return [*made, gone, left]


def comparison_of(artifacts: Sequence[Mapping[str, Any]], model: str = "small", known: bool = True) -> dict[str, Any]:
    """What comparison.json would hold."""
    source = {"model": model, "source": "hub", **SOURCE}
    if not known:
        del source["perplexity"], source["tokens"]
    return {
        "format_version": 1,
        "name": "nightly",
        "sources": [source],
        "artifacts": [{key: value for key, value in row.items() if key != "source"} for row in artifacts],
        "texts": {
            "calibration": {"text": "builtin", "sequences": 32, "length": 256},
            "evaluation": {"text": "file:/home/someone/held-out.txt", "sequences": 16, "length": 256},
        },
    }


class Page(HTMLParser):
    """What a browser would make of HTML: elements with their attributes, text, scripts, and tags left open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.crossed: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open and self.open[-1] == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}

    def attributes(self, name: str) -> list[str]:
        return [found[name] for _, found in self.elements if name in found]
