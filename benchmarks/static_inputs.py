"""Ranges fixed beforehand, side by side: observers of inputs, as they are and with outliers; keys and values.

    python benchmarks/static_inputs.py [--model manifests/quickstart/model] [--columns 4] [--times 40]

Whole conversions by one manifest, so every figure is from the written files: mean KL divergence to the original on
held-out text, inputs rounded as the files say. The second model computes the same as the first, but some columns behind
each norm are made larger there and smaller in the weights that read them, as large models have them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file

from converter import manifest as manifests
from converter.progress import Event
from jobs.convert import Run, convert

SCHEMES = {
    "W8A8_STATIC": ("minmax", "percentile", "kl", "mse"),
    "W8A8_STATIC_ASYM": ("minmax", "percentile", "kl", "mse"),
    "FP8": ("minmax", "percentile", "kl", "mse"),
    "NVFP4": ("minmax", "percentile"),
}
CACHES = ("FP8", "FP8_HEAD", "INT8", "INT8_HEAD")
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


class Quiet:
    """A display that tells failures alone."""

    def show(self, event: Event) -> None:
        if event.state == "failed":
            print(event.title, event.note, file=sys.stderr)

    def close(self) -> None:
        pass


def main() -> None:
    """Convert and print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=ROOT / "manifests" / "quickstart" / "model")
    arguments.add_argument("--columns", type=int, default=4, help="columns of each norm that get outliers")
    arguments.add_argument("--times", type=float, default=40.0, help="how many times as large they become")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(given.model, place / "plain")
        write_outliers(given.model, place / "outliers", given.columns, given.times)
        rows = run(place)
    print(f"| scheme | observer | {' | '.join(['plain', 'outliers', 'outliers, smoothquant'])} |")
    print("|---|---|---:|---:|---:|")
    for scheme, observers in SCHEMES.items():
        for observer in observers:
            names = [("plain", ""), ("outliers", ""), ("outliers", "-folded")]
            figures = [rows[model, f"{scheme}-{observer}{folded}".lower()] for model, folded in names]
            print(f"| {scheme} | {observer} | {' | '.join(f'{figure:.5f}' for figure in figures)} |")
    dynamic = [rows[model, "w8a8"] for model in ("plain", "outliers")]
    print(f"| W8A8 | a scale for each token | {dynamic[0]:.5f} | {dynamic[1]:.5f} | |")
    print("\n| kv_cache, with W8A16 | KL mean |\n|---|---:|")
    for cache in ("as they are", *CACHES):
        print(f"| {cache} | {rows['plain', f'cache-{cache}'.lower().replace(' ', '-')]:.5f} |")


def write_outliers(source: Path, target: Path, count: int, times: float) -> None:
    """The model with `count` columns behind each norm that many times as large, and the same function."""
    shutil.copytree(source, target)
    [file] = target.glob("*.safetensors")
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    random = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.rpartition(".")[0].endswith(tuple(READERS))]:
        norm = name.removesuffix(".weight")
        prefix, _, own = norm.rpartition(".")
        columns = torch.randperm(len(tensors[name]), generator=random)[:count]
        tensors[name][columns] *= times
        for reader in READERS[own]:
            tensors[f"{prefix}.{reader}.weight"][:, columns] /= times
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"dtype": "float32", "torch_dtype": "float32"}))


def run(place: Path) -> dict[tuple[str, str], float]:
    """Mean KL divergence by model and target."""
    targets: dict[str, dict[str, Any]] = {"w8a8": {"format": "compressed-tensors", "scheme": "W8A8"}}
    for scheme, observers in SCHEMES.items():
        for observer in observers:
            name = f"{scheme}-{observer}".lower()
            targets[name] = {"format": "compressed-tensors", "scheme": scheme, "activation_observer": observer}
            targets[f"{name}-folded"] = targets[name] | {"method": ["smoothquant", "rtn"]}
    for cache in CACHES:
        targets[f"cache-{cache}".lower()] = {"format": "compressed-tensors", "scheme": "W8A16", "kv_cache": cache}
    targets["cache-as-they-are"] = {"format": "compressed-tensors", "scheme": "W8A16"}
    manifest: dict[str, Any] = {
        "name": "static",
        "models": [{"source": f"folder:{model}"} for model in ("plain", "outliers")],
        "targets": targets,
    }
    (place / "static.yaml").write_text(json.dumps(manifest))
    loaded = manifests.load(place / "static.yaml")
    result = convert(Run(manifest=loaded, out=place / "out", executor="inprocess"), Quiet())
    return {(row["model"], row["target"]): row["output"]["kl_mean"] for row in result.rows}


if __name__ == "__main__":
    main()
