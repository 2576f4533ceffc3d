"""The ggml kernels beside stock ggml, one thread each, in one run.

    python benchmarks/ggml_kernels.py [--types Q4_K Q6_K] [--rows 256] [--columns 4096] [--repeats 7] [--json FILE]

Both quantize the same rows through their public call (ours: `quantize`, checks included; theirs: `ggml_quantize_chunk`
of the `xllamacpp` wheel), by turns, and the best of the repeats counts. Time is the thread's own processor time: on a
busy machine the clock on the wall favours whoever is short enough to fit between two interruptions.
Weights are Student's t with four degrees of freedom, importance is log-normal. The error is the importance-weighted
square error over the weighted square sum. Equal bytes are checked, not assumed.
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

import ggml_peer
from quantkernels.ggml import TYPES, dequantize, quantize

Floats = NDArray[np.float32]
QUANTIZED = [name for name, known in TYPES.items() if known.weights > 1]


def main() -> None:
    """Measure, print the table, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--types", nargs="+", default=QUANTIZED, choices=QUANTIZED, metavar="TYPE")
    arguments.add_argument("--rows", type=int, default=256)
    arguments.add_argument("--columns", type=int, default=4096)
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    if ggml_peer.library() is None:
        sys.exit("the peer is missing: install the wheel `xllamacpp`")
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    rows = (random.standard_t(4, (given.rows, given.columns)) * 0.02).astype(np.float32)
    importance = np.exp(random.normal(size=given.columns)).astype(np.float32)
    print(f"{given.rows} x {given.columns} weights, one thread, best of {given.repeats}; Mweights/s")
    print(f"{'type':<9}{'importance':<12}{'ours':>9}{'ggml':>9}{'ratio':>8}{'our error':>13}{'ggml error':>13}  bytes")
    figures = []
    for name in given.types:
        for weights in chosen_importance(name, importance):
            figure = measure(name, rows, weights, importance, given.repeats)
            figures.append(figure)
            print(
                f"{name:<9}{'yes' if weights is not None else 'no':<12}{figure['ours']:>9.1f}{figure['ggml']:>9.1f}"
                f"{figure['ratio']:>8.2f}{figure['our_error']:>13.4e}{figure['ggml_error']:>13.4e}"
                f"  {'equal' if figure['equal_bytes'] else 'DIFFERENT'}",
                flush=True,
            )
    if given.json is not None:
        given.json.write_text(json.dumps({"rows": given.rows, "columns": given.columns, "types": figures}, indent=1))


def chosen_importance(name: str, importance: Floats) -> tuple[Floats | None, ...]:
    """With and without importance, as far as ggml makes the type so."""
    known = TYPES[name]
    return ((importance,) if known.needs_importance else (None, importance)) if known.uses_importance else (None,)


def measure(
    name: str, rows: Floats, weights: Floats | None, importance: Floats, repeats: int
) -> dict[str, str | bool | float]:
    """Speeds in million weights a second, errors weighted by `importance`, for one type."""
    ours, theirs = quantize(rows, name, weights), ggml_peer.quantize(rows, name, weights)
    our_seconds, their_seconds = float("inf"), float("inf")
    for _ in range(repeats):
        start = thread_time()
        quantize(rows, name, weights)
        middle = thread_time()
        ggml_peer.quantize(rows, name, weights, theirs)
        end = thread_time()
        our_seconds, their_seconds = min(our_seconds, middle - start), min(their_seconds, end - middle)
    return {
        "type": name,
        "importance": weights is not None,
        "ours": rows.size / our_seconds / 1e6,
        "ggml": rows.size / their_seconds / 1e6,
        "ratio": their_seconds / our_seconds,
        "our_error": relative_error(rows, dequantize(ours, name), importance),
        "ggml_error": relative_error(rows, dequantize(theirs, name), importance),
        "equal_bytes": bool(np.array_equal(ours, theirs)),
    }


def relative_error(rows: Floats, stored: Floats, importance: Floats) -> float:
    """Weighted square error over the weighted square sum, in float64."""
    wide, weight = rows.astype(np.float64), importance.astype(np.float64)
    return float((weight * (stored - wide) ** 2).sum() / (weight * wide**2).sum())


if __name__ == "__main__":
    main()
