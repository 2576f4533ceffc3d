"""Methods side by side on one trained model, through the product's own run: KL divergence to the original, and seconds.

    python benchmarks/methods.py [--model FOLDER] [--schemes W4A16 ...] [--methods rtn gptq ...] [--json FILE]

Every scheme with every method goes into one manifest, calibrated once and run in this process, so all see the same rows
of the built-in texts. "+chain" after a method calibrates a target on its own quantized blocks (propagate: quantized),
"+sums" lets round-to-nearest weigh columns. --outliers measures a model that computes the same, with so many columns in
the middle of each MLP 40 times as large.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from safetensors.torch import load_file, save_file

from converter import manifest
from converter.progress import Event
from jobs.convert import Run, convert

SCHEMES = ("W4A16", "W3A16", "W2A16", "W4A16_ASYM", "W3A16_ASYM")
METHODS = ("rtn", "rtn+sums", "awq", "gptq", "awq,gptq", "gptq+chain")


class Progress:
    """Says which task is at work, on one line of the terminal."""

    def show(self, event: Event) -> None:
        """Show an event."""
        print(f"\r{(event.title or event.task)[:60]:<60}", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line."""
        print(file=sys.stderr)


def main() -> None:
    """Convert, then print a table of schemes and methods."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=ROOT / "manifests" / "quickstart" / "model")
    arguments.add_argument("--schemes", nargs="+", default=SCHEMES)
    arguments.add_argument("--methods", nargs="+", default=METHODS)
    arguments.add_argument("--outliers", type=int, default=0, metavar="COLUMNS")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    targets = {
        f"t{number}": (scheme, method)
        for number, (scheme, method) in enumerate((s, m) for s in given.schemes for m in given.methods)
    }
    with tempfile.TemporaryDirectory() as place:
        path, model = Path(place) / "methods.yaml", given.model.resolve()
        if given.outliers:
            model = with_outliers(model, Path(place) / "outliers", given.outliers)
        lines = ["name: methods", f"models: [{{source: 'folder:{model}', name: model}}]", "targets:"]
        lines += [f"  {name}: {target(*what)}" for name, what in targets.items()]
        path.write_text("\n".join(lines) + "\n", "utf-8")
        run = Run(manifest=manifest.load(path), out=Path(place) / "out", executor="inprocess")
        rows = {row["target"]: row for row in convert(run, Progress()).rows}
    found = [
        {"scheme": scheme, "method": method, "seconds": rows[name].get("seconds"), **rows[name].get("output", {})}
        for name, (scheme, method) in targets.items()
    ]
    print("| |" + "".join(f" {scheme} |" for scheme in given.schemes))
    print("|---|" + "---:|" * len(given.schemes))
    for method in given.methods:
        cells = [one for one in found if one["method"] == method]
        print(f"| {method} |" + "".join(f" {one['kl_mean']:.5f} ({one['seconds']:.0f} s) |" for one in cells))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1), "utf-8")


def with_outliers(source: Path, folder: Path, count: int, times: float = 40.0) -> Path:
    """The model with `count` columns in the middle of each MLP that many times as large, and the same function."""
    shutil.copytree(source, folder)
    [file] = folder.glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith("mlp.up_proj.weight")]:
        columns = torch.randperm(len(tensors[name]), generator=random)[:count]
        tensors[name][columns] *= times
        tensors[name.replace("up_proj", "down_proj")][:, columns] /= times
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))
    return folder


def target(scheme: str, method: str) -> str:
    """A target of the manifest."""
    name, _, extra = method.partition("+")
    more = {"chain": ", propagate: quantized", "sums": ", imatrix: true"}.get(extra, "")
    return f"{{format: compressed-tensors, scheme: {scheme}, method: [{name}]{more}}}"


if __name__ == "__main__":
    main()
