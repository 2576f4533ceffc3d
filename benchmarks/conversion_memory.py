"""Peak memory of whole conversions at 4 and at 32 blocks of the same size: it must not follow the depth.

    python benchmarks/conversion_memory.py [--blocks 4 32] [--hidden 512] [--intermediate 3584] [--json FILE]

Each depth gets a random Qwen3 checkpoint on the disk, one shard per block, with the quickstart's tokenizer, and a fresh
process that converts, measures and compares it like `hubmill convert --executor inprocess`: Q4_K_M with imatrix, W4A16
by GPTQ, INT8 as Parquet. Two peaks are taken: the highest that a task recorded, and the highest resident memory seen
from outside, which also counts planning and what lies between tasks; the larger one is "peak". Of it some 600 MB are
libraries, more than a small model, so the ratio of the peaks alone would hide a leak; growth per byte of model does
not: 0 when memory does not follow the depth, 1 when bf16 weights stay, 2 when they stay in f32.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from converter import manifest, tensor_file
from converter.progress import Event
from jobs.convert import Run, convert

TOKENIZER = ROOT / "manifests" / "quickstart" / "model"
VOCABULARY = 4096
TARGETS = """targets:
  q4-k-m: {format: gguf, type: Q4_K_M, imatrix: true}
  w4a16: {format: compressed-tensors, scheme: W4A16, method: gptq, group_size: 128}
  int8: {format: parquet, scheme: INT8}
"""
POLL_SECONDS = 0.02


def main() -> None:
    """Convert a model of each depth in a process of its own and print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--intermediate", type=int, default=3584)
    arguments.add_argument("--sequences", type=int, default=8)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments.add_argument("--folder", type=Path, help="convert what lies in this folder, in this process")
    given = arguments.parse_args()
    if given.folder is not None:
        run_here(given.folder)
        return
    found = []
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = write_model(folder / "model", blocks, given.hidden, given.intermediate)
            write_manifest(folder, given.sequences, given.length)
            found.append({"blocks": blocks, "model_bytes": size} | measure(folder))
        print(as_text(found[-1]), flush=True)
    first, last = found[0], found[-1]
    ratios = {
        "peak_ratio": last["peak_bytes"] / first["peak_bytes"],
        "model_ratio": last["model_bytes"] / first["model_bytes"],
        "growth_per_model_byte": (last["peak_bytes"] - first["peak_bytes"])
        / max(1, last["model_bytes"] - first["model_bytes"]),
    }
    print("from the first to the last: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))
    if given.json is not None:
        given.json.write_text(json.dumps({"runs": found, **ratios}, indent=1) + "\n", "utf-8")


def write_model(folder: Path, blocks: int, hidden: int, intermediate: int) -> int:
    """Write a random bf16 Qwen3 checkpoint, block by block; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    heads, key_heads, head_width = hidden // 64, max(1, hidden // 256), 64
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_width,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)
    shapes = {
        "self_attn.q_proj": (heads * head_width, hidden),
        "self_attn.k_proj": (key_heads * head_width, hidden),
        "self_attn.v_proj": (key_heads * head_width, hidden),
        "self_attn.o_proj": (hidden, heads * head_width),
        "self_attn.q_norm": (head_width,),
        "self_attn.k_norm": (head_width,),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * 0.02
        return (values if len(shape) == 2 else 1 + values).bfloat16()

    for b in range(blocks):
        block = {f"model.layers.{b}.{name}.weight": random(shape) for name, shape in shapes.items()}
        tensor_file.save(folder / f"model-block-{b:03d}.safetensors", block)
    outer = {"model.embed_tokens.weight": random((VOCABULARY, hidden)), "model.norm.weight": random((hidden,))}
    tensor_file.save(folder / "model-outer.safetensors", outer)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_manifest(folder: Path, sequences: int, length: int) -> None:
    """Write the manifest of the model beside it."""
    texts = (
        f"calibration: {{sequences: {sequences}, length: {length}}}\nevaluation: {{sequences: 4, length: {length}}}\n"
    )
    (folder / "memory.yaml").write_text(f"name: memory\nmodels:\n  - source: folder:model\n{TARGETS}{texts}", "utf-8")


def measure(folder: Path) -> dict[str, Any]:
    """Convert in a fresh process, watch its memory from outside, and read what its tasks recorded."""
    begin = time.perf_counter()
    # Without this the allocator keeps freed blocks of a few megabytes: 60 MB of noise, and of peak, are its habits.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
    command = [sys.executable, __file__, "--folder", str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    highest = 0
    while process.poll() is None:
        highest = max(highest, resident_bytes(process.pid, "VmHWM"))
        time.sleep(POLL_SECONDS)
    assert process.stdout is not None
    said = process.stdout.read()
    if process.returncode:
        sys.exit(f"the conversion failed:\n{said}")
    events = [
        json.loads(line) for line in (folder / "out" / "memory" / ".work" / "events.jsonl").read_text().splitlines()
    ]
    by_kind: dict[str, int] = {}
    for event in events:
        kind = event["task"].partition("-")[0]
        by_kind[kind] = max(by_kind.get(kind, 0), event["peak_bytes"])
    return {
        "peak_bytes": max(highest, *by_kind.values()),
        "task_peak_bytes": by_kind,
        "seconds": round(time.perf_counter() - begin, 1),
    }


class Quiet:
    """A display that shows nothing."""

    def show(self, event: Event) -> None: ...

    def close(self) -> None: ...


def run_here(folder: Path) -> None:
    """Convert the manifest in `folder` in this process."""
    run = Run(manifest=manifest.load(folder / "memory.yaml"), out=folder / "out", executor="inprocess")
    result = convert(run, Quiet())
    for title, error in result.failures:
        print(f"{title}: {error}")
    sys.exit(result.exit_code)


def resident_bytes(process: int, field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of a process; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text("utf-8")
    except OSError:
        return 0
    found = status.partition(f"{field}:")[2].split()
    return int(found[0]) * 1024 if found else 0


def as_text(figures: dict[str, Any]) -> str:
    """One depth in words, megabytes of a million bytes."""
    kinds = ", ".join(f"{kind} {size / 1e6:.0f}" for kind, size in figures["task_peak_bytes"].items() if size)
    model, peak = figures["model_bytes"] / 1e6, figures["peak_bytes"] / 1e6
    return f"{figures['blocks']:3d} blocks, {model:.0f} MB: peak {peak:.0f} MB in {figures['seconds']:.0f} s ({kinds})"


if __name__ == "__main__":
    main()
