"""The error of the thorough search beside ggml's and beside the format's own optimum, and what it costs.

    python benchmarks/thorough_error.py [--types Q4_K] [--rows 64] [--columns 4096] [--weights FILE] [--json FILE]

Errors are importance-weighted square errors of what a decoder reads, over the weighted square sum: on Gaussian rows, on
rows of Student's t with four degrees of freedom, and on a model's matrices (--weights, any safetensors file; the
default is the quickstart model); importance is log-normal or left out. `of ggml` is our error over ggml's, `of optimum`
our error over the least that the format allows, on the first --sample weights (`tests/ggml_optimum.py` says how it is
found, and for which types it is exact). Speeds are of one thread on the t rows: stock ggml through
`ggml_quantize_chunk` of the `xllamacpp` wheel, then ours, comparison with ggml's own bytes included; the best of
--repeats, by turns, in the thread's own processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from time import thread_time

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests")]

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import ggml_peer
from ggml_optimum import block_errors, optimum
from quantkernels.ggml import TYPES, dequantize, quantize
from quantkernels.ggml.thorough import THOROUGH_TYPES

Floats = NDArray[np.float32]
MODEL = ROOT / "manifests" / "quickstart" / "model" / "model.safetensors"


def main() -> None:
    """Measure, print the table, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--types", nargs="+", default=list(THOROUGH_TYPES), choices=THOROUGH_TYPES, metavar="TYPE")
    arguments.add_argument("--rows", type=int, default=64)
    arguments.add_argument("--columns", type=int, default=4096)
    arguments.add_argument("--sample", type=int, default=1 << 14, help="weights whose optimum is searched")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--weights", type=Path, default=MODEL, help="a safetensors file")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    if ggml_peer.library() is None:
        sys.exit("the peer is missing: install the wheel `xllamacpp`")
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    shape = (given.rows, given.columns)
    heavy = (random.standard_t(4, shape) * 0.02).astype(np.float32)
    sources = {"gaussian": (random.normal(size=shape) * 0.02).astype(np.float32), "t4": heavy}
    sources |= {"model": model_rows(given.weights, given.rows * given.columns)}
    print(f"{'type':<9}{'rows':<10}{'importance':<12}{'ggml error':>11}{'ours':>11}", end="")
    print(f"{'of ggml':>9}{'of optimum':>12}{'ggml Mw/s':>11}{'ours Mw/s':>11}")
    figures = []
    for name in given.types:
        for weighed in (True,) if TYPES[name].needs_importance else (False, True):
            rates = speeds(name, heavy, importance_of(heavy) if weighed else None, given.repeats)
            for source, rows in sources.items():
                importance = importance_of(rows) if weighed else None
                figure = {"type": name, "rows": source, "importance": weighed, **measure(name, rows, importance)}
                figure["of_optimum"] = over_optimum(name, rows, importance, given.sample)
                figure |= {"ggml_speed": rates[0], "speed": rates[1]}
                figures.append(figure)
                show(figure)
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1))


def show(figure: dict[str, str | bool | float | None]) -> None:
    """One line of the table."""
    optimum = "-" if figure["of_optimum"] is None else f"{figure['of_optimum']:.4f}"
    print(
        f"{figure['type']:<9}{figure['rows']:<10}{'yes' if figure['importance'] else 'no':<12}"
        f"{figure['ggml_error']:>11.4e}{figure['error']:>11.4e}{figure['of_ggml']:>9.4f}{optimum:>12}"
        f"{figure['ggml_speed']:>11.1f}{figure['speed']:>11.1f}",
        flush=True,
    )


def importance_of(rows: Floats) -> Floats:
    """Log-normal importance for the columns of `rows`."""
    return np.exp(np.random.default_rng(1).normal(size=rows.shape[1])).astype(np.float32)


def model_rows(path: Path, weights: int) -> Floats:
    """Rows from every matrix of a model that super-blocks fit, evenly spaced; about `weights` weights, 256 a row."""
    parts = [
        tensor.float().reshape(-1, 256)
        for tensor in load_file(path).values()
        if tensor.ndim == 2 and tensor.is_floating_point() and tensor.shape[1] % 256 == 0
    ]
    if not parts:
        sys.exit(f"{path} holds no matrix whose rows are multiples of 256")
    step = max(1, sum(part.numel() for part in parts) // weights)
    return torch.cat([part[::step] for part in parts]).numpy()


def measure(name: str, rows: Floats, importance: Floats | None) -> dict[str, float]:
    """The relative errors of ggml's bytes and of ours, and their ratio."""
    stock_importance = importance if TYPES[name].uses_importance else None
    stored = {
        "ggml_error": ggml_peer.quantize(rows, name, stock_importance),
        "error": quantize(rows, name, importance, search="thorough"),
    }
    size = TYPES[name].weights
    whole = block_errors(rows, np.zeros_like(rows), importance, size).sum()
    errors = {
        key: float(block_errors(rows, dequantize(blocks, name), importance, size).sum() / whole)
        for key, blocks in stored.items()
    }
    return errors | {"of_ggml": errors["error"] / errors["ggml_error"]}


def over_optimum(name: str, rows: Floats, importance: Floats | None, sample: int) -> float | None:
    """Our error over the optimum's, on rows with about `sample` weights from all over `rows`."""
    some = np.ascontiguousarray(rows[:: max(1, rows.size // sample)])
    least = optimum(some, name, importance)
    if least is None:
        return None
    stored = dequantize(quantize(some, name, importance, search="thorough"), name)
    return float(block_errors(some, stored, importance, TYPES[name].weights).sum() / least.sum())


def speeds(name: str, rows: Floats, importance: Floats | None, repeats: int) -> tuple[float, float]:
    """Million weights a second of stock ggml and of the thorough search."""
    stock_importance = importance if TYPES[name].uses_importance else None
    out = ggml_peer.quantize(rows, name, stock_importance)
    quantize(rows[:1], name, importance, search="thorough")
    best = [float("inf")] * 2
    for _ in range(repeats):
        start = thread_time()
        ggml_peer.quantize(rows, name, stock_importance, out)
        middle = thread_time()
        quantize(rows, name, importance, search="thorough")
        best = [min(best[0], middle - start), min(best[1], thread_time() - middle)]
    return rows.size / best[0] / 1e6, rows.size / best[1] / 1e6


if __name__ == "__main__":
    main()
