"""The comparison report that started this project, done again with hubmill's Parquet, beside the report's own figures.

The report (February 2026) quantized three linear layers, 128x64, 64x32 and 32x16 with biases in fp16, by per-channel
symmetric rounding and stored them in Parquet. It measured INT8 at 1.41x, cosine 1.0000, 0.12 s and INT2 at 2.39x,
cosine 0.9142, 0.06 s, and forecast for a model of 0.6 B: INT8 1.8-1.9x above 0.98, INT2 6-7x at 0.85-0.90. It asked for
a medium model of about 1 M and a large one of about 100 M parameters next.

Ratios are given twice: against the fp16 model as our own Parquet (as in the report, Parquet to Parquet) and as
safetensors (smaller, hence the stricter). Weights are drawn as nn.Linear draws them (uniform) and, harder to round,
from a normal distribution of the same spread. Seconds cover reading, rounding and writing, on one thread, compiled.
The forecast's sizes are planned from the shapes of Qwen3-0.6B, exactly; its cosines are measured on normal rows of the
same lengths, which are worse than trained ones.

usage: python benchmarks/original_report.py [--size small|medium|large|all] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "kernels")]

from converter.containers import ArtifactPlan
from converter.containers.parquet import Parquet
from converter.manifest import Rule, Target
from converter.source import Header, Snapshot, open_folder

# O out, I in

SHAPES = {
    "small": ((128, 64), (64, 32), (32, 16)),
    "medium": ((1024, 512), (512, 512), (512, 512)),
    "large": ((5120, 5120),) * 4,
}
TARGETS = {
    "INT8": Target(name="int8", format="parquet", scheme="INT8"),
    "INT2": Target(name="int2", format="parquet", scheme="INT2"),
    "INT2 g32": Target(name="int2-g32", format="parquet", scheme="INT2", group_size=32),
}
FP16 = Target(name="fp16", format="parquet", scheme="INT8", rules=(Rule(pattern=".", type="F16"),))
# Of the report: size ratio, cosine, seconds; of the forecast the best it expected. It had no groups.
Figures = tuple[float | None, float | None, float | None]
REPORT: dict[str, Figures] = {"INT8": (1.41, 1.0000, 0.12), "INT2": (2.39, 0.9142, 0.06)}
FORECAST: dict[str, Figures] = {"INT8": (1.9, 0.98, None), "INT2": (7.0, 0.90, None)}
NOTHING: Figures = (None, None, None)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement; the report's figures are None where it has none. meets: none is worse than the report's."""

    model: str
    params: int
    scheme: str
    size_bytes: int
    ratio_parquet: float | None
    ratio_safetensors: float
    cosine: float
    seconds: float | None
    report_ratio: float | None
    report_cosine: float | None
    report_seconds: float | None

    @property
    def meets(self) -> bool | None:
        if self.report_ratio is None or self.report_cosine is None:
            return None
        ratio = min(self.ratio_safetensors, self.ratio_parquet or math.inf)
        fast = self.seconds is None or self.report_seconds is None or self.seconds <= self.report_seconds
        return ratio >= self.report_ratio and round(self.cosine, 4) >= self.report_cosine and fast


def draw(shape: tuple[int, int], distribution: str, generator: torch.Generator) -> Tensor:
    """A weight [O, I] fp16 with the spread of nn.Linear's, or a bias when O or I is 1."""
    bound = 1 / math.sqrt(shape[1])
    if distribution == "normal":
        return (torch.randn(shape, generator=generator) * bound / math.sqrt(3)).half()
    return (torch.rand(shape, generator=generator) * 2 - 1).mul(bound).half()


def write_model(folder: Path, shapes: tuple[tuple[int, int], ...], distribution: str) -> Snapshot:
    """A plain state dict in fp16 and nothing else, as the report's test models are."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for number, shape in enumerate(shapes, start=1):
        tensors[f"fc{number}.weight"] = draw(shape, distribution, generator)
        tensors[f"fc{number}.bias"] = draw(shape, distribution, generator)[:, 0].contiguous()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_folder(folder, "benchmark")


def convert(snapshot: Snapshot, target: Target, folder: Path) -> tuple[ArtifactPlan, int, float]:
    """Plan, round to nearest and write; the bytes of the table and the seconds it took."""
    folder.mkdir()
    begin = time.perf_counter()
    container = Parquet()
    plan = container.plan(snapshot, None, target)
    grids = {tensor.name: tensor.grid for tensor in plan.tensors}
    container.write(
        plan, snapshot, None, target, lambda name: grids[name].encode(snapshot.read(name).float(), None), folder
    )
    seconds = time.perf_counter() - begin
    return plan, sum(path.stat().st_size for path in folder.glob("*.parquet")), seconds


def cosine(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    """The cosine of the angle between two models, all their tensors as one vector; summed in f64."""
    dot = left = right = 0.0
    for a, b in pairs:
        dot += float((a.double() * b.double()).sum())
        left += float(a.double().square().sum())
        right += float(b.double().square().sum())
    return dot / math.sqrt(left * right)


def measure(size: str, distribution: str, work: Path) -> Iterator[Row]:
    """The report's comparison on one model."""
    snapshot = write_model(work / f"{size}-{distribution}", SHAPES[size], distribution)
    safetensors_bytes = snapshot.files["model.safetensors"]
    _, parquet_bytes, _ = convert(snapshot, FP16, work / f"{size}-{distribution}-fp16")
    for scheme, target in TARGETS.items():
        out = work / f"{size}-{distribution}-{target.name}"
        _, size_bytes, seconds = convert(snapshot, target, out)
        opened = Parquet().open(out, None)
        ratio, least, limit = REPORT.get(scheme, NOTHING) if size == "small" else NOTHING
        yield Row(
            model=f"{size} {distribution}",
            params=sum(math.prod(header.shape) for header in snapshot.tensors.values()),
            scheme=scheme,
            size_bytes=size_bytes,
            ratio_parquet=parquet_bytes / size_bytes,
            ratio_safetensors=safetensors_bytes / size_bytes,
            cosine=cosine((snapshot.read(name).float(), opened.read(name)) for name in opened.names),
            seconds=seconds,
            report_ratio=ratio,
            report_cosine=least,
            report_seconds=limit,
        )


def qwen3_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of Qwen3-0.6B (28 blocks, hidden size 1024, tied head)."""
    block = {
        "self_attn.q_proj": (2048, 1024),
        "self_attn.k_proj": (1024, 1024),
        "self_attn.v_proj": (1024, 1024),
        "self_attn.o_proj": (1024, 2048),
        "self_attn.q_norm": (128,),
        "self_attn.k_norm": (128,),
        "mlp.gate_proj": (3072, 1024),
        "mlp.up_proj": (3072, 1024),
        "mlp.down_proj": (1024, 3072),
        "input_layernorm": (1024,),
        "post_attention_layernorm": (1024,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (151936, 1024), "model.norm.weight": (1024,)}
    for number in range(28):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def forecast() -> Iterator[Row]:
    """What the report forecast for 0.6 B: sizes as planned, cosines on normal rows of the model's lengths."""
    shapes = qwen3_shapes()
    headers = {
        name: Header(name=name, dtype="BF16", shape=shape, file="model.safetensors", start=0, end=2 * math.prod(shape))
        for name, shape in shapes.items()
    }
    snapshot = Snapshot(
        source="", repo="Qwen3-0.6B", commit="0" * 40, config={}, tensors=headers, files={}, folder=Path()
    )
    params = sum(map(math.prod, shapes.values()))
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(256, length, generator=generator) for length in (1024, 2048, 3072)]
    for scheme, target in TARGETS.items():
        plan = Parquet().plan(snapshot, None, target)
        size_bytes = sum(plan.files.values())
        grid = next(tensor.grid for tensor in plan.tensors if tensor.quantized)
        ratio, least, _ = FORECAST.get(scheme, NOTHING)
        yield Row(
            model="Qwen3-0.6B (plan)",
            params=params,
            scheme=scheme,
            size_bytes=size_bytes,
            ratio_parquet=None,
            ratio_safetensors=2 * params / size_bytes,
            cosine=min(cosine(iter([(row, grid.decode(grid.encode(row, None)))])) for row in rows),
            seconds=None,
            report_ratio=ratio,
            report_cosine=least,
            report_seconds=None,
        )


def show(rows: list[Row]) -> str:
    """The rows as a table for people."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        f"{'model':<18} {'scheme':<9} {'bytes':>11} {'/parquet':>9} {'/safet.':>8} {'cosine':>7} {'seconds':>8}"
        f"   report: {'ratio':>5} {'cosine':>7} {'s':>5}  met"
    ]
    lines += [
        f"{row.model:<18} {row.scheme:<9} {row.size_bytes:>11} {number(row.ratio_parquet, '.2f'):>9}"
        f" {row.ratio_safetensors:>8.2f} {row.cosine:>7.4f} {number(row.seconds, '.3f'):>8}"
        f"           {number(row.report_ratio, '.2f'):>5} {number(row.report_cosine, '.4f'):>7}"
        f" {number(row.report_seconds, '.2f'):>5}  {'-' if row.meets is None else 'yes' if row.meets else 'NO'}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=[*SHAPES, "all"], default="medium", help="this model and the smaller ones")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = list(SHAPES)
    if arguments.size != "all":
        sizes = sizes[: sizes.index(arguments.size) + 1]
    with tempfile.TemporaryDirectory() as folder:
        warm = Path(folder) / "warm"
        warm.mkdir()
        list(measure("small", "normal", warm))  # compiles the kernels
        rows = [
            row
            for size in sizes
            for distribution in ("uniform", "normal")
            for row in measure(size, distribution, Path(folder))
        ]
    rows += forecast()
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"meets": row.meets} for row in rows], indent=2) + "\n")
    print(show(rows))


if __name__ == "__main__":
    main()
