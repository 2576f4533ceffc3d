"""From safetensors to GGUF, the whole way: hubmill beside llama.cpp's converter and quantizer, same machine, by turns.

    python benchmarks/gguf_end_to_end.py [--types Q4_K_M Q2_K IQ2_XS] [--blocks 20] [--llama-cpp CHECKOUT] [--json FILE]

The model is a random Qwen3 of 1 B parameters in bf16, one shard per block. Ours is the work of `hubmill convert` up to
the verified file: plan, rounding of every block, assembly; measuring the result beside the original, which llama.cpp
does not do, is left out. Theirs is convert_hf_to_gguf.py to BF16 and then llama_model_quantize on as many threads as
there are cores; the converter runs once and its time is added to each type. The tokenizer's hash, which the
converter does not know, is given to it. Types that need an imatrix get the same random one on both sides.
Peak memory is the highest resident set of the process and its children, which counts pages of mapped files.

The peers are left out when they are not there: the checkout by --llama-cpp, the library by HUBMILL_LLAMA_LIB or
`make peers`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests"), str(ROOT / "benchmarks")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from conversion_memory import write_model

import quantize_peer
from converter import manifest
from converter.containers.gguf.imatrix import Sums, open_imatrix, write_imatrix
from converter.containers.gguf.mixture import MIXTURES
from jobs.convert import Run, plan
from jobs.drive import drive

POLL_SECONDS = 0.05
# What convert_hf_to_gguf.py is run as: with answers to what it cannot know of this tokenizer.
CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
base.TextModel._set_vocab_sentencepiece = base.TextModel._set_vocab_gpt2  # tried first, though no such file is there
sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
runpy.run_path(sys.path[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def main() -> None:
    """Make the model, convert it both ways, print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--types", nargs="+", default=["Q4_K_M", "Q2_K", "IQ2_XS"], metavar="TYPE")
    arguments.add_argument("--blocks", type=int, default=20)
    arguments.add_argument("--hidden", type=int, default=2048)
    arguments.add_argument("--intermediate", type=int, default=6144)
    arguments.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp, for its converter")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments.add_argument("--ours", nargs=2, metavar=("FOLDER", "TYPE"), help="convert in this process")
    arguments.add_argument("--theirs", nargs=3, metavar=("SOURCE", "OUT", "IMATRIX"), help="quantize in this process")
    given = arguments.parse_args()
    if given.ours:
        convert(Path(given.ours[0]), given.ours[1])
    elif given.theirs:
        quantize(*map(Path, given.theirs))
    else:
        compare(given)


def needs_imatrix(type: str) -> bool:
    """Whether the file type asks for importance."""
    return type.startswith(("IQ1", "IQ2", "IQ3_XX"))


def compare(given: argparse.Namespace) -> None:
    """The table, a row for each type."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_model(folder / "model", given.blocks, given.hidden, given.intermediate)
        print(f"{size / 2e9:.2f} B weights, {given.blocks} blocks, {os.cpu_count()} cores", flush=True)
        write_random_imatrix(folder / "imatrix.gguf", given.blocks, given.hidden, given.intermediate)
        peer = quantize_peer.library_folder() is not None and given.llama_cpp is not None
        bf16, converted = folder / "bf16.gguf", {"seconds": 0.0, "peak_bytes": 0}
        if peer:
            checkout = str(given.llama_cpp)
            command = [sys.executable, "-c", CONVERTER, checkout, str(folder / "model"), "--outtype", "bf16"]
            converted = watch([*command, "--outfile", str(bf16)])
            print(f"convert_hf_to_gguf.py: {as_text(converted)}", flush=True)
        rows = []
        for type in given.types:
            row: dict[str, Any] = {"type": type, "ours": watch(command_for("--ours", folder, type))}
            if peer:
                out = folder / f"theirs.{type}.gguf"
                quantized = watch(command_for("--theirs", bf16, out, folder / "imatrix.gguf"))
                row["theirs"] = {
                    "quantize_seconds": quantized["seconds"],
                    "seconds": converted["seconds"] + quantized["seconds"],
                    "peak_bytes": max(converted["peak_bytes"], quantized["peak_bytes"]),
                }
                row["ratio"] = row["theirs"]["seconds"] / row["ours"]["seconds"]
                out.unlink()
            rows.append(row)
            print(f"{type:<9} ours {as_text(row['ours'])}" + text_of_theirs(row), flush=True)
        if given.json is not None:
            figures = {"weights": size // 2, "cores": os.cpu_count(), "convert": converted, "types": rows}
            given.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")


def command_for(option: str, *values: object) -> list[str]:
    return [sys.executable, __file__, option, *map(str, values)]


def as_text(figures: dict[str, Any]) -> str:
    return f"{figures['seconds']:.1f} s, peak {figures['peak_bytes'] / 1e6:.0f} MB"


def text_of_theirs(row: dict[str, Any]) -> str:
    if "theirs" not in row:
        return ", no peer"
    return (
        f"; theirs {as_text(row['theirs'])} ({row['theirs']['quantize_seconds']:.1f} s of it llama-quantize): "
        f"{row['ratio']:.2f} times as fast"
    )


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command to its end: seconds on the wall, and the highest resident memory of it and its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(resident_bytes(number) for number in family(process.pid)))
        time.sleep(POLL_SECONDS)
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{' '.join(command[:4])} failed:\n{process.stderr.read()[-3000:]}")
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak}


def family(number: int) -> list[int]:
    """The process and all its descendants."""
    try:
        children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
    except OSError:
        return []
    return [number, *(one for child in children for one in family(int(child)))]


def resident_bytes(number: int) -> int:
    try:
        pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def write_random_imatrix(path: Path, blocks: int, hidden: int, intermediate: int) -> None:
    """An imatrix with log-normal importance for every linear of the model."""
    generator = torch.Generator().manual_seed(1)
    widths = dict.fromkeys(("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"), hidden)
    widths |= {"attn_output": hidden, "ffn_down": intermediate}
    sums = {
        f"blk.{b}.{name}.weight": Sums(
            sum_squares=torch.randn(1, width, generator=generator).exp() * 512, counts=torch.tensor([512.0])
        )
        for b in range(blocks)
        for name, width in widths.items()
    }
    write_imatrix(path, sums, ["random"], 1, 512)


def quantize(source: Path, out: Path, imatrix: Path) -> None:
    """What llama-quantize does to `source`, on all cores; the type stands in the name of `out`."""
    type = out.name.split(".")[1]
    folder = quantize_peer.library_folder()
    assert folder is not None
    library = quantize_peer.Library(folder)  # kept: llama.cpp calls back into it
    params = library.llama.llama_model_quantize_default_params()
    params.nthread, params.ftype = os.cpu_count(), MIXTURES[type].number
    stored = open_imatrix(imatrix)
    entries = []
    for name in stored.entries if needs_imatrix(type) else ():
        sums = stored.read(name)
        means = (sums.sum_squares / sums.counts[:, None]).float().flatten().tolist()
        values = (ctypes.c_float * len(means))(*means)
        entries.append(quantize_peer.ImatrixEntry(name.encode(), values, len(means)))
    array = (quantize_peer.ImatrixEntry * (len(entries) + 1))(*entries, quantize_peer.ImatrixEntry(None, None, 0))
    params.imatrix = ctypes.addressof(array) if entries else None
    if library.llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(params)):
        sys.exit(f"llama-quantize failed for {type}")


def convert(folder: Path, type: str) -> None:
    """What `hubmill convert` does up to the verified file."""
    weights = "imatrix: imatrix.gguf, " if needs_imatrix(type) else ""
    path = folder / f"{type}.yaml"
    path.write_text(
        f"name: {type.lower()}\nmodels:\n  - source: folder:model\ntargets:\n"
        f"  it: {{format: gguf, {weights}type: {type}}}\n",
        "utf-8",
    )
    assert type in MIXTURES
    from jobs.cluster import RayExecutor

    run = Run(manifest=manifest.load(path), out=folder / "out")
    ready = plan(run)
    if ready.reasons:
        sys.exit("\n".join(ready.reasons))
    graph = ready.prepared.plan.graph
    wanted = [key for key in ready.needed if graph.tasks[key].kind in ("fetch", "quantize", "assemble")]
    executor = RayExecutor(None, ready.room.cpus, ready.room.usable_memory_bytes)
    try:
        state = drive(graph, wanted, ready.done, executor, run.store, lambda event: None)
    finally:
        executor.close()
    if state.failed:
        sys.exit("\n".join(state.failed.values()))


if __name__ == "__main__":
    main()
