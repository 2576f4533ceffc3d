"""GPTQ on experts that few rows reached, with their own statistics and with those filled up from their layer.

    python benchmarks/rare_experts.py [--steps 500] [--sequences 1 2 4 8] [--bits 4 3] [--out FOLDER]

Trains a small Qwen3 mixture (16 experts of which a token takes 2, 2 blocks) on the standard library as the quickstart's
model was, or takes it from --out; calibrates it on few rows of 256 tokens, so that many experts are rare; rounds every
expert in groups of 32; and measures the relative squared error of each linear's output on the rows that reach its
expert in the held-out text. Experts are put together by how many calibration rows they had for each of their columns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "manifests" / "quickstart"
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(QUICKSTART)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from converter import calibration, rare_experts
from converter.adapt import adapt
from converter.architecture import Tap, find
from converter.blocks import Decoder
from converter.calibrate import calibrate_block
from converter.grids.affine import AffineGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.source import open_folder
from converter.stats import TapStats
from converter.tokenizer import tokenizer

LENGTH, HELD_OUT = 256, 48  # tokens in a row, rows of the held-out text
FILLS = (0.125, 0.25, 0.5, 1.0, 2.0)  # wanted rows for each column
BOUNDS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0)
KINDS = (rare_experts.EXPERT_INPUT, rare_experts.EXPERT_MIDDLE)


def main() -> None:
    """Train if need be, measure, print a table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--steps", type=int, default=500)
    arguments.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    arguments.add_argument("--out", type=Path, help="where the model is, or is put")
    given = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = given.out or Path(folder)
        if not (model / "config.json").is_file():
            train(model, given.steps)
        found = measure(model, given.sequences, given.bits)
    names = ["rtn", "own statistics", *(f"filled to {fill:g}" for fill in FILLS)]
    print(f"| tap | bits | rows a column | linears | {' | '.join(names)} |")
    print(f"|---|---:|---|---:|{'---:|' * len(names)}")
    for (kind, bits, bound), errors in sorted(found.items()):
        means = [sum(errors[name]) / len(errors[name]) for name in names]
        print(f"| {kind} | {bits} | {bound} | {len(errors['rtn'])} | {' | '.join(f'{mean:.5f}' for mean in means)} |")


def train(folder: Path, steps: int) -> None:
    """Train the mixture and save it with the quickstart's tokenizer."""
    import train as quickstart
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    encode = AutoTokenizer.from_pretrained(QUICKSTART / "model")
    documents, _ = quickstart.read_standard_library()
    tokens = torch.tensor([token for text in documents[::2] for token in encode(text)["input_ids"]])
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        router_aux_loss_coef=0.0,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * max(0.05, 1 - step / steps)
        rows = torch.stack([tokens[at : at + 128] for at in torch.randint(len(tokens) - 128, (8,)).tolist()])
        loss = model(rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"trained {steps} steps to a loss of {float(loss):.2f}", file=sys.stderr)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(QUICKSTART / "model" / name, folder / name)


def measure(folder: Path, sequences: list[int], bits: list[int]) -> dict[tuple[str, int, str], dict[str, list[float]]]:
    """Errors by kind of tap, bits, and how many rows a column its expert had; then by how it was rounded."""
    snapshot = open_folder(folder, "model")
    snapshot, architecture = adapt(snapshot, find(snapshot.config, "model"), "model")
    decoder = Decoder(folder, architecture, "model", stored=snapshot.tensors)
    outer = {name: snapshot.read(name).float() for name in decoder.input_names}
    held_out = decoder.embed(token_rows(folder, "evaluation", HELD_OUT), outer)
    hidden = {count: decoder.embed(token_rows(folder, "calibration", count), outer) for count in sequences}
    every = frozenset(tap.name for tap in architecture.taps)
    found: dict[tuple[str, int, str], dict[str, list[float]]] = {}
    for block in range(decoder.blocks):
        prefix = architecture.prefix(block)
        names = [name for name in snapshot.tensors if name.startswith(prefix)]
        tensors = {name.removeprefix(prefix): snapshot.read(name).float() for name in names}
        expected = calibrate_block(decoder, block, tensors, held_out, gram_for=every)
        held_out = expected.hidden
        for count in sequences:
            done = calibrate_block(decoder, block, tensors, hidden[count], gram_for=every)
            hidden[count] = done.hidden
            for kind in KINDS:
                taps = [tap for tap in architecture.taps if tap.name.startswith(f"{kind}.")]
                for width in bits:
                    for method, weights in rounded(tensors, taps, done.stats, width).items():
                        for tap in taps:
                            if tap.name in expected.stats:
                                own = done.stats[tap.name].rows if tap.name in done.stats else 0
                                bound = bucket(own / len(expected.stats[tap.name].sum_squares))
                                errors = found.setdefault((kind, width, bound), {}).setdefault(method, [])
                                errors += [
                                    error(tensors[name], weights[name], expected.stats[tap.name]) for name in of(tap)
                                ]
    return found


def token_rows(folder: Path, split: str, count: int) -> Tensor:
    """Rows of the built-in text of this split."""
    loaded = tokenizer(folder, "model")
    texts = calibration.documents("builtin", Path(), split, loaded.chat)  # type: ignore[arg-type]
    return calibration.token_rows(texts, loaded.encode, count, LENGTH, 0, split, loaded.prefix)


def of(tap: Tap) -> list[str]:
    return [f"{linear}.weight" for linear in tap.linears]


def rounded(
    tensors: Mapping[str, Tensor], taps: list[Tap], stats: Mapping[str, TapStats], bits: int
) -> dict[str, dict[str, Tensor]]:
    """The linears of these taps as each method rounds them."""
    own = {name: tensors[name] for tap in taps for name in of(tap)}
    grids = dict.fromkeys(own, AffineGrid(bits=bits, granularity="group", group_size=32))
    block = Block(where="measured", tensors=own, stats=stats, taps=tuple(taps))
    nearest = Block(where="measured", tensors=own, stats={})
    found = {"rtn": round_to_nearest(nearest, grids, Options()), "own statistics": gptq(block, grids, Options())}
    usual = dict(rare_experts.ROWS_PER_COLUMN)
    for fill in FILLS:
        rare_experts.ROWS_PER_COLUMN.update(dict.fromkeys(usual, fill))
        filled, _ = rare_experts.blended(stats, taps)
        found[f"filled to {fill:g}"] = gptq(
            Block(where="measured", tensors=own, stats=filled, taps=tuple(taps)), grids, Options()
        )
    rare_experts.ROWS_PER_COLUMN.update(usual)
    return {method: {name: one.decode() for name, one in made.coded.items()} for method, made in found.items()}


def error(weight: Tensor, decoded: Tensor, stats: TapStats) -> float:
    """The relative squared error of the output on the rows that the statistics are of."""
    assert stats.gram is not None
    away = decoded - weight
    return float(((away @ stats.gram) * away).sum() / ((weight @ stats.gram) * weight).sum())


def bucket(rows_per_column: float) -> str:
    """The range that an expert's rows for each column lie in."""
    if rows_per_column == 0:
        return "none"
    above = [bound for bound in BOUNDS if bound >= rows_per_column]
    return f"to {above[0]:g}" if above else f"more than {BOUNDS[-1]:g}"


if __name__ == "__main__":
    main()
