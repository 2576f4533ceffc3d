"""Every kind of grid at few bits: what it costs, what it leaves of weights, and what of a trained model.

    python benchmarks/grids.py [--model FOLDER] [--methods rtn imatrix gptq hqq] [--grids INT4/64 ...] [--json FILE]

A grid is a scheme of Parquet and, behind a stroke, a group size. Bits of a weight are of what is stored, side data
included; error is squared error as a share of the weights' squares. Both, and the cosine, are of 256 x 4096 Gaussian
weights and of the model's linears, rounded to nearest without importance; speed is of one thread. KL divergence to the
original is that of the product's own run, embedding and head kept as they are, on held-out text. "imatrix" is rtn with
importance; hqq is left out where a grid has no offsets.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from converter import manifest
from converter.architecture import find
from converter.containers.parquet_layout import layout
from converter.containers.selection import choose
from converter.grids import Grid
from converter.manifest import Target
from converter.progress import Event
from converter.schemes import PARQUET_SCHEMES
from converter.source import open_folder
from jobs.convert import Run, convert

# By bits of a weight in rows of 256, so that neighbours cost about the same.
GRIDS = (
    *(
        "TERNARY",
        "TERNARY/64",
        "INT2",
        "SEQ2",
        "INT2/64",
        "SEQ2/64",
        "KMEANS2",
        "INT2_DOUBLE",
        "INT2/32",
        "INT2_OFFSET",
    ),
    *("LOG3/64", "INT3/64", "INT3_DOUBLE", "INT3/32", "KMEANS3", "INT3_OFFSET"),
    *(
        "NF4",
        "FP4",
        "INT4/64",
        "LOG4/64",
        "MXFP4",
        "INT4_DOUBLE",
        "INT4/32",
        "INT4_OFFSET",
        "NVFP4",
        "INT4/16",
        "KMEANS4",
    ),
)
METHODS = {"rtn": "rtn", "imatrix": "rtn, imatrix: true", "gptq": "gptq", "hqq": "hqq"}


class Progress:
    """Says which task is at work, on one line of the terminal."""

    def show(self, event: Event) -> None:
        """Show an event."""
        print(f"\r{(event.title or event.task)[:60]:<60}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        print(file=sys.stderr)


def main() -> None:
    """Measure weights, convert, print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=ROOT / "manifests" / "quickstart" / "model")
    arguments.add_argument("--grids", nargs="+", default=GRIDS)
    arguments.add_argument("--methods", nargs="*", choices=tuple(METHODS), default=tuple(METHODS))
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    gaussian = [torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))]
    linears = list(linears_of(given.model))
    found: dict[str, dict[str, Any]] = {}
    for name in given.grids:
        grid = grid_of(name)
        grid.encode(gaussian[0][:2], None)  # compiles what there is to compile
        found[name] = {"gaussian": measured(grid, gaussian), "linears": measured(grid, linears)}
    for (name, method), divergence in divergences(given.model, given.grids, given.methods).items():
        found[name][f"kl_{method}"] = divergence
    columns = ("bits", "cosine", "error", "Mweights/s", "bits", "cosine", "error")
    print(f"| grid | {' | '.join(columns)} | {' | '.join('KL ' + method for method in given.methods)} |")
    print("|---|" + "---:|" * (len(columns) + len(given.methods)))
    for name, one in found.items():
        cells = [f"{one['gaussian'][key]:{how}}" for key, how in SHOWN.items()]
        cells += [f"{one['linears'][key]:{how}}" for key, how in list(SHOWN.items())[:3]]
        cells += [f"{one[f'kl_{method}']:.4f}" if f"kl_{method}" in one else "–" for method in given.methods]
        print(f"| {name} | {' | '.join(cells)} |")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), "utf-8")


SHOWN = {"bits": ".3f", "cosine": ".4f", "error": ".4f", "speed": ".1f"}


def grid_of(name: str) -> Grid:
    """The grid that a target with this scheme has in a BF16 model."""
    scheme, _, size = name.partition("/")
    group_size = int(size) if size else None
    choice = choose(Target(name="t", format="parquet", scheme=scheme, group_size=group_size), "linear.weight")
    return choice.grid(group_size=choice.target.group_size, scale_dtype="BF16")


def linears_of(folder: Path) -> Iterable[Tensor]:
    """The weights of the model's blocks that are rounded."""
    snapshot = open_folder(folder, "model")
    architecture = find(snapshot.config, "model")
    for name, header in snapshot.tensors.items():
        if len(header.shape) == 2 and architecture.block_of(name) is not None:
            yield snapshot.read(name).float()


def measured(grid: Grid, weights: list[Tensor]) -> dict[str, float]:
    """Bits, cosine, error and speed over all the weights together."""
    size = stored = 0
    seconds = squares = errors = products = others = 0.0
    for weight in weights:
        start = process_time()
        parts = grid.encode(weight, None)
        seconds += process_time() - start
        decoded, wide = grid.decode(parts).double(), weight.double()
        size += weight.numel()
        stored += sum(part.size_bytes(len(weight)) for part in layout(grid, weight.shape[1]))
        squares, others = squares + float(wide.square().sum()), others + float(decoded.square().sum())
        errors, products = errors + float((decoded - wide).square().sum()), products + float((decoded * wide).sum())
    return {
        "bits": 8 * stored / size,
        "cosine": products / (squares * others) ** 0.5,
        "error": errors / squares,
        "speed": size / seconds / 1e6,
    }


def divergences(model: Path, grids: Iterable[str], methods: Iterable[str]) -> dict[tuple[str, str], float]:
    """The mean KL divergence of each grid with each method that it takes."""
    jobs = {
        f"t{number}": (name, method)
        for number, (name, method) in enumerate((name, method) for name in grids for method in methods)
        if method != "hqq" or PARQUET_SCHEMES[name.partition("/")[0]].offset
    }
    if not jobs:
        return {}
    lines = ["name: grids", f"models: [{{source: 'folder:{model.resolve()}', name: model}}]", "targets:"]
    for target, (name, method) in jobs.items():
        scheme, _, size = name.partition("/")
        more = f", group_size: {size}" if size else ""
        rules = "rules: {'embed|lm_head': BF16}"
        lines.append(f"  {target}: {{format: parquet, scheme: {scheme}{more}, method: {METHODS[method]}, {rules}}}")
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "grids.yaml"
        path.write_text("\n".join(lines) + "\n", "utf-8")
        run = Run(manifest=manifest.load(path), out=Path(place) / "out", executor="inprocess")
        return {jobs[row["target"]]: row["output"]["kl_mean"] for row in convert(run, Progress()).rows}


if __name__ == "__main__":
    main()
