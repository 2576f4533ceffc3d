"""GPTQ inside GGUF blocks beside ggml's own rounding with the same statistics: quality, seconds, and llama.cpp's word.

    python benchmarks/gguf_gptq.py [--model manifests/quickstart/model] [--types Q2_K Q3_K_M Q4_K_M ...] [--sweeps 0 4]
                                   [--blocks-only] [--sequences 32] [--llama 64] [--json FILE]

Each type is written three times and more, files of the same size: by ggml's search without statistics, by that search
with importance (an imatrix of the same calibration text), and by GPTQ on the scales of that search, followed by so many
sweeps over codes and scales. Each file is read back and run over held-out text: the mean KL divergence to the original,
its ratio to the one with importance, perplexity, and how often the likeliest token is the same. Seconds are of
processor time, for all weights of the blocks, after a first run that compiles. With --llama, llama.cpp reads each file
too: at so many places of the text, the mean KL divergence of its distribution to the original's and to our decoder's.
The latter is what its rounding of activations leaves.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from converter import calibration
from converter.architecture import Architecture, find
from converter.blocks import Decoder
from converter.calibrate import calibrate_block
from converter.compare import evaluation
from converter.containers import Opened
from converter.containers.gguf import GGUF
from converter.errors import NumericsError
from converter.grids import Coded
from converter.manifest import Target
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.source import Snapshot, open_folder
from converter.stats import TapStats
from converter.tokenizer import tokenizer
from llama_peer import Llama

LENGTH = 256
WEIGHED = "search with importance"
SHORTEST = 64  # tokens before the places where llama.cpp is asked


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model with what calibration gathered, block by block, and its hidden states over the held-out rows."""

    snapshot: Snapshot
    architecture: Architecture
    decoder: Decoder
    stats: list[Mapping[str, TapStats]]
    rows: Tensor
    original: evaluation.Original


def main() -> None:
    """Measure, print a table, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=ROOT / "manifests" / "quickstart" / "model")
    arguments.add_argument("--types", nargs="+", default=["Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q4_0", "Q6_K"])
    arguments.add_argument("--sweeps", type=int, nargs="+", default=[0, 2], help="passes over codes and scales")
    arguments.add_argument("--sequences", type=int, default=32, help=f"calibration rows of {LENGTH} tokens")
    arguments.add_argument("--blocks-only", action="store_true", help="keep embedding and head as they are")
    arguments.add_argument("--llama", type=int, default=0, help="at how many places to ask llama.cpp")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = prepare(given.model, given.sequences, Path(folder))
        figures = [
            figure
            for type in given.types
            for figure in measure_type(model, type, given.sweeps, given.blocks_only, given.llama, Path(folder))
        ]
    if given.json is not None:
        given.json.write_text(json.dumps(figures, indent=1))


def prepare(source: Path, sequences: int, folder: Path) -> Model:
    """Calibrate the model and run it over the held-out rows."""
    snapshot = open_folder(source, "the model")
    architecture = find(snapshot.config, "the model")
    decoder = Decoder(source, architecture, "the model", stored=snapshot.tensors)
    calibrating, held_out = (_rows(source, split, sequences) for split in ("calibration", "evaluation"))
    original = evaluation.Original(
        architecture=architecture,
        names=tuple(snapshot.tensors),
        read=lambda name: snapshot.read(name).float(),
        hidden_at=partial(evaluation.hidden_file, folder),
    )
    hidden = decoder.embed(calibrating, {name: original.read(name) for name in decoder.input_names})
    stats: list[Mapping[str, TapStats]] = []
    for b in range(decoder.blocks):
        taps = frozenset(tap.name for tap in architecture.taps)
        done = calibrate_block(decoder, b, evaluation.block_tensors(original, b), hidden, gram_for=taps)
        stats.append(done.stats)
        hidden = done.hidden
    evaluation.reference(decoder, held_out, original, folder, lambda share: None)
    return Model(
        snapshot=snapshot, architecture=architecture, decoder=decoder, stats=stats, rows=held_out, original=original
    )


def _rows(source: Path, split: str, sequences: int) -> Tensor:
    loaded = tokenizer(source, "the model")
    kind = "calibration" if split == "calibration" else "evaluation"
    texts = calibration.documents("builtin", source, kind, loaded.chat)
    count = sequences if split == "calibration" else 16
    return calibration.token_rows(texts, loaded.encode, count, LENGTH, 0, split, loaded.prefix)


def measure_type(
    model: Model, type: str, sweeps: list[int], blocks_only: bool, places: int, folder: Path
) -> list[dict[str, Any]]:
    """The figures of each way to write `type`, printed as they come."""
    rules = dict.fromkeys(("*embed_tokens*", "*lm_head*"), "F32") if blocks_only else {}
    target = Target.model_validate(
        {"name": "measured", "format": "gguf", "type": type, "rules": rules, "imatrix": True}
    )
    ways: dict[str, tuple[bool, int | None]] = {"search": (False, None), WEIGHED: (True, None)}
    ways |= {f"GPTQ, {count} sweeps": (True, count) for count in sweeps}
    print(
        f"\n{type:<26}{'bits':>6}{'KL':>10}{'ratio':>8}{'perplexity':>12}{'same top':>10}{'seconds':>9}"
        f"{'llama.cpp: KL':>15}{'to ours':>10}"
    )
    figures: list[dict[str, Any]] = []
    for number, (way, (importance, count)) in enumerate(ways.items()):
        out = folder / f"{type}-{number}"
        out.mkdir()
        try:
            round_model(model, target, importance, count)
        except NumericsError:  # a type of one or two bits, which there is only with importance
            continue
        start = process_time()
        coded = round_model(model, target, importance, count)
        seconds = process_time() - start
        opened = write(model, target, coded, out)
        measured = evaluation.measure(model.original, opened, model.decoder, model.rows, lambda share: None)
        output = measured["output"]
        size = sum(path.stat().st_size for path in out.glob("*.gguf"))
        read_by_llama, to_ours = by_llama(model, opened, out, places) if places else (math.nan, math.nan)
        figure = {"type": type, "way": way, "bits_per_weight": 8 * size / measured["parameters"], "seconds": seconds}
        figure |= {key: output[key] for key in ("kl_mean", "perplexity", "top1_agreement")}
        figure |= {"kl_of_llama_cpp": read_by_llama, "kl_of_llama_cpp_to_our_decoder": to_ours}
        figures.append(figure)
        weighed = next((one for one in figures if one["way"] == WEIGHED), figure)["kl_mean"]
        print(
            f"{way:<26}{figure['bits_per_weight']:>6.3f}{figure['kl_mean']:>10.5f}{figure['kl_mean'] / weighed:>8.3f}"
            f"{figure['perplexity']:>12.3f}{figure['top1_agreement']:>10.3f}{seconds:>9.2f}"
            f"{read_by_llama:>15.5f}{to_ours:>10.5f}",
            flush=True,
        )
    return figures


def round_model(model: Model, target: Target, importance: bool, sweeps: int | None) -> dict[str, Coded]:
    """Every tensor of the file, rounded; sweeps None is ggml's own search."""
    plan = GGUF.plan(model.snapshot, model.architecture, target)
    coded: dict[str, Coded] = {}
    for b in (None, *range(model.decoder.blocks)):
        prefix = "" if b is None else model.architecture.prefix(b)
        planned = {tensor.source.removeprefix(prefix): tensor for tensor in plan.tensors if tensor.block == b}
        block = Block(
            where=f"block {b}",
            tensors={name: model.original.read(tensor.source) for name, tensor in planned.items()},
            stats={} if b is None else model.stats[b],
            taps=() if b is None else model.architecture.taps,
        )
        grids = {name: tensor.grid for name, tensor in planned.items()}
        options = Options(importance=importance and b is not None, sweeps=sweeps or 0)
        rounded = (round_to_nearest if sweeps is None or b is None else gptq)(block, grids, options)
        coded |= {planned[name].name: one for name, one in rounded.coded.items()}
    return coded


def write(model: Model, target: Target, coded: Mapping[str, Coded], out: Path) -> Opened:
    """Write the file and open it again."""
    plan = GGUF.plan(model.snapshot, model.architecture, target)
    GGUF.write(plan, model.snapshot, model.architecture, target, lambda name: coded[name].parts, out)
    return GGUF.open(out, model.architecture)


def by_llama(model: Model, opened: Opened, out: Path, places: int) -> tuple[float, float]:
    """The mean KL divergence of llama.cpp's distributions to the original's, and to those of our decoder."""
    decoder = model.decoder
    picked = torch.linspace(SHORTEST, LENGTH - 1, places).long()
    sums = [0.0, 0.0]
    with Llama(next(out.glob("*.gguf"))) as reader:
        for n, end in enumerate(picked.tolist()):
            ids = model.rows[n % len(model.rows) : n % len(model.rows) + 1, :end]
            found = reader.next_logprobs(ids[0].tolist(), count=model.snapshot.config["vocab_size"])
            theirs = torch.full((model.snapshot.config["vocab_size"],), math.log(1e-12))
            theirs[list(found)] = torch.tensor(list(found.values()))
            for which, read in enumerate((model.original.read, opened.read)):
                hidden = decoder.embed(ids, {name: read(name) for name in decoder.input_names})
                for b in range(decoder.blocks):
                    prefix = model.architecture.prefix(b)
                    names = [name for name in model.original.names if name.startswith(prefix)]
                    hidden = decoder.run_block(b, {name.removeprefix(prefix): read(name) for name in names}, hidden)
                outer = {name: read(name) for name in decoder.output_names}
                ours = decoder.logits(hidden[:, -1:], outer)[0, -1].log_softmax(-1)
                sums[which] += float((ours.exp() * (ours - theirs)).sum())
    return sums[0] / places, sums[1] / places


if __name__ == "__main__":
    main()
