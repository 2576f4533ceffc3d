"""Peak memory of one calibration pass at 4 and at 32 blocks of the same size: it must not follow the depth.

    python benchmarks/calibration_memory.py [--blocks 4 32] [--hidden 512] [--sequences 16] [--length 256]

Each depth gets a random Llama checkpoint on the disk, one shard per block, and a fresh process. That process reads one
block at a time, runs it, keeps its statistics (Gram matrices included) until the next block, and reports the highest
resident memory it reached above where it stood after the imports. Prints one JSON object per depth and their ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

os.environ["OMP_NUM_THREADS"] = "1"
# Without this the allocator keeps freed blocks of a few megabytes, and the peak shows its habits instead of ours.
os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from converter import architecture, tensor_file
from converter.blocks import Decoder
from converter.calibrate import calibrate_block

VOCABULARY = 512
TAPS = ("attention_input", "attention_output", "mlp_input", "mlp_middle")


def main() -> None:
    """Measure each depth in its own process and print the figures."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    arguments.add_argument("--hidden", type=int, default=512)
    arguments.add_argument("--sequences", type=int, default=16)
    arguments.add_argument("--length", type=int, default=256)
    arguments.add_argument("--folder", type=Path, help="measure the checkpoint in this folder, in this process")
    given = arguments.parse_args()
    if given.folder is not None:
        print(json.dumps(measure(given.folder, given.sequences, given.length)))
        return
    peaks = []
    for blocks in given.blocks:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), blocks, given.hidden)
            options = ["--folder", folder, "--sequences", str(given.sequences), "--length", str(given.length)]
            run = subprocess.run([sys.executable, __file__, *options], check=True, stdout=subprocess.PIPE, text=True)
        figures = json.loads(run.stdout)
        peaks.append(figures["peak_bytes"])
        print(json.dumps(figures), flush=True)
    print(json.dumps({"blocks": given.blocks, "peak_ratio": round(peaks[-1] / peaks[0], 3)}))


def write_model(folder: Path, blocks: int, hidden: int) -> None:
    """Write a random bf16 Llama checkpoint, block by block."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    narrow = max(1, hidden // 256) * 64
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (3 * hidden, hidden),
        "mlp.up_proj": (3 * hidden, hidden),
        "mlp.down_proj": (hidden, 3 * hidden),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    generator = torch.Generator().manual_seed(0)
    for b in range(blocks):
        block = {
            f"{name}.weight": (torch.randn(shape, generator=generator) * 0.02).bfloat16()
            for name, shape in shapes.items()
        }
        tensor_file.save(folder / f"block-{b}.safetensors", block)
    embedding = (torch.randn(VOCABULARY, hidden, generator=generator) * 0.02).bfloat16()
    tensor_file.save(folder / "outer.safetensors", {"model.embed_tokens.weight": embedding})


def measure(folder: Path, sequences: int, length: int) -> dict[str, float]:
    """Calibrate every block of the checkpoint and report the peak memory of this process above its start."""
    torch.set_num_threads(1)
    started, before = perf_counter(), resident_bytes("VmRSS")
    found = architecture.find(json.loads((folder / "config.json").read_text("utf-8")), str(folder))
    decoder = Decoder(folder, found, str(folder), workers=2)
    rows = torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))
    hidden = decoder.embed(rows, tensor_file.load(folder / "outer.safetensors"))
    for b in range(decoder.blocks):
        tensors = {name: one.clone() for name, one in tensor_file.load(folder / f"block-{b}.safetensors").items()}
        result = calibrate_block(decoder, b, tensors, hidden, frozenset(TAPS))
        hidden = result.hidden
    return {
        "blocks": decoder.blocks,
        "block_bytes": sum(tensor.numel() * 4 for tensor in tensors.values()),
        "gram_bytes": sum(one.gram.numel() * 4 for one in result.stats.values() if one.gram is not None),
        "hidden_bytes": hidden.numel() * 4,
        "before_bytes": before,
        "peak_bytes": resident_bytes("VmHWM") - before,
        "seconds_per_block": round((perf_counter() - started) / decoder.blocks, 3),
    }


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest so far) of this process."""
    status = Path("/proc/self/status").read_text("utf-8")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024


if __name__ == "__main__":
    main()
