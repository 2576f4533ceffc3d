"""Memory and disk that runs of Llama-shaped models ask for, by their plans.

    python benchmarks/sizing.py [--models 1b 8b 70b]

Layouts are written as in plan_70b.py: real names, shapes and types, weights that are holes. Each target is planned by
itself with 128 rows of 2048 tokens of calibration and 16 rows of evaluation, whose text is made up here; the memory is
that of the largest task, the disk what all tasks of the run may leave at once, without the model itself.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from plan_70b import LLAMA, cli, llama, write_layout

# hidden, middle, blocks, heads, vocabulary; key and value heads are 8 of 128 columns everywhere.
SHAPES = {
    "1b": (2048, 8192, 16, 16, 128256),
    "8b": (4096, 14336, 32, 32, 128256),
    "70b": (8192, 28672, 80, 64, 128256),
}
TARGETS = {
    "Q4_K_M, no importance": "{format: gguf, type: Q4_K_M}",
    "Q4_K_M, imatrix": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "INT8, RTN": "{format: parquet, scheme: INT8}",
    "W4A16, GPTQ": "{format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 128}",
}


def main() -> None:
    """Plan each target of each model by itself and print what it asks for."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    given = arguments.parse_args()
    for model in given.models:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            config = config_of(model)
            write_layout(folder / model, config, 4, list(llama(config)))
            chosen = random.Random(0)
            for text, words in (("calibration", 150_000), ("evaluation", 20_000)):
                made = (" ".join(str(chosen.randrange(1000)) for _ in range(100)) for _ in range(words // 100))
                (folder / f"{text}.txt").write_text("\n\n".join(made), "utf-8")
            for target, fields in TARGETS.items():
                print(f"{model:4s} {target:24s} {as_text(needs(folder, model, fields))}", flush=True)


def config_of(model: str) -> dict[str, Any]:
    """Llama 3.3's config.json with this model's shape."""
    hidden, middle, blocks, heads, vocabulary = SHAPES[model]
    return LLAMA | {
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }


def needs(folder: Path, model: str, fields: str) -> dict[str, Any]:
    """What the plan of one target says of memory and disk."""
    lines = ["name: sizing", f"models: [{{source: folder:{model}}}]", "targets:", f"  x: {fields}"]
    lines += ["calibration: {text: file:calibration.txt, sequences: 128, length: 2048}"]
    lines += ["evaluation: {text: file:evaluation.txt, sequences: 16, length: 2048}"]
    (folder / "sizing.yaml").write_text("\n".join(lines) + "\n", "utf-8")
    command = [cli(), "plan", str(folder / "sizing.yaml"), "--out", str(folder / "out"), "--json"]
    plan: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
    return plan["needs"] | {"files": sum(sum(job["files"].values()) for job in plan["jobs"])}


def as_text(figures: dict[str, Any]) -> str:
    """The figures in gigabytes of a billion bytes."""
    names = (("memory_bytes", "memory of a task"), ("disk_bytes", "disk"), ("files", "artifact"))
    return ", ".join(f"{text} {figures[key] / 1e9:.1f} GB" for key, text in names)


if __name__ == "__main__":
    main()
