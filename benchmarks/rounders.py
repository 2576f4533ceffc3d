"""Our GPTQ beside a plain torch GPTQ, and what each observer leaves of a weight, in one run.

    python benchmarks/rounders.py [--sizes 1024 2048] [--bits 4] [--repeats 3] [--threads 1] [--json FILE]

The plain GPTQ is the paper's blocked algorithm as it is usually written: minmax scales, damping by 1 % of the mean
diagonal, Cholesky, inverse and Cholesky again, then a loop of torch operations over columns in blocks of 128. Ours runs
once with the same scales, so that only the solver differs, once with searched scales, and once as a target gets it,
with sweeps over the codes behind. They take turns, seconds are of processor time (the machine may be busy) and the best
of the repeats counts. Errors are squared output errors over squared outputs, on the rows that calibrated and on
held-out ones. Weights are Gaussian, rows correlated, with columns of very different power.
"""

# O out, I in.
from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from converter.architecture import Tap
from converter.grids.affine import AffineGrid
from converter.methods import Block, Options, Rounder
from converter.methods.gptq import gptq
from converter.methods.rtn import round_to_nearest
from converter.stats import observe

GROUP = 128


def main() -> None:
    """Measure, print the tables, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    arguments.add_argument("--bits", type=int, default=4)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    solvers = [figure for size in given.sizes for figure in measure_solvers(size, given.bits, given.repeats)]
    observers = measure_observers(given.repeats)
    if given.json is not None:
        given.json.write_text(json.dumps({"solvers": solvers, "observers": observers}, indent=1))


def measure_solvers(size: int, bits: int, repeats: int) -> list[dict[str, object]]:
    """Seconds, and output errors on calibration and held-out rows, of each way to round a `size` x `size` weight."""
    random = torch.Generator().manual_seed(size)
    mix = torch.randn(size, size, generator=random) / size**0.5 + torch.eye(size)
    power = torch.logspace(-1, 1, size)[torch.randperm(size, generator=random)]
    rows, held_out = (torch.randn(4 * size, size, generator=random) @ mix * power for _ in range(2))
    weight = torch.randn(size, size, generator=random)
    block = Block(
        where="benchmark",
        tensors={"linear.weight": weight},
        stats={"tap": observe(rows, True)},
        taps=(Tap(name="tap", linears=("linear",)),),
    )
    minmax = AffineGrid(bits=bits, granularity="group", group_size=GROUP, observer="minmax")
    searched = replace(minmax, observer="mse")
    gram = block.stats["tap"].gram
    assert gram is not None
    ways: dict[str, Callable[[], Tensor]] = {
        "plain torch GPTQ, minmax": lambda: plain_gptq(weight, gram, bits),
        "GPTQ, minmax, no sweeps": lambda: decoded(gptq, block, minmax, sweeps=0),
        "GPTQ, searched, no sweeps": lambda: decoded(gptq, block, searched, sweeps=0),
        "GPTQ, searched": lambda: decoded(gptq, block, searched),
        "RTN, minmax": lambda: decoded(round_to_nearest, block, minmax),
        "RTN, searched": lambda: decoded(round_to_nearest, block, searched),
    }
    seconds = dict.fromkeys(ways, float("inf"))
    errors: dict[str, tuple[float, float]] = {}
    for _ in range(repeats):
        for way, round_weight in ways.items():
            start = process_time()
            rounded = round_weight()
            seconds[way] = min(seconds[way], process_time() - start)
            errors[way] = (output_error(rounded, weight, rows), output_error(rounded, weight, held_out))
    plain = seconds["plain torch GPTQ, minmax"]
    print(f"\n{size} x {size}, {bits} bits, groups of {GROUP}, best of {repeats}")
    print(f"{'':<28}{'seconds':>9}{'faster':>8}{'calibration':>13}{'held out':>10}")
    for way in ways:
        calibration, held = errors[way]
        print(f"{way:<28}{seconds[way]:>9.3f}{plain / seconds[way]:>8.2f}{calibration:>13.5f}{held:>10.5f}")
    return [
        {"size": size, "bits": bits, "way": way, "seconds": seconds[way], "faster_than_plain": plain / seconds[way],
         "error_calibration": errors[way][0], "error_held_out": errors[way][1]}
        for way in ways
    ]  # fmt: skip


def decoded(rounder: Rounder, block: Block, grid: AffineGrid, sweeps: int | None = None) -> Tensor:
    """The block's one weight, rounded."""
    rounded = rounder(block, {"linear.weight": grid}, Options(importance=True, sweeps=sweeps))
    return rounded.coded["linear.weight"].decode()


def output_error(rounded: Tensor, weight: Tensor, rows: Tensor) -> float:
    """The squared output error on `rows`, as a share of the squared output."""
    return float((rows @ (rounded - weight).T).square().sum() / (rows @ weight.T).square().sum())


def plain_gptq(weight: Tensor, gram: Tensor, bits: int) -> Tensor:
    """GPTQ in plain torch operations: the weight [O, I] as a reader would decode it."""
    left, hessian = weight.clone(), gram.clone()
    columns = weight.shape[1]
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    order = hessian.diagonal().argsort(descending=True)
    left, hessian = left[:, order], hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    scale = weight.unflatten(1, (-1, GROUP)).abs().amax(2) / ((2**bits - 1) / 2)
    result = torch.empty_like(left)
    for first in range(0, columns, 128):
        last = min(first + 128, columns)
        inside, upper = left[:, first:last].clone(), factor[first:last, first:last]
        pushed = torch.empty_like(inside)
        for i in range(last - first):
            step = scale[:, order[first + i] // GROUP]
            value = inside[:, i]
            rounded = (value / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step
            push = (value - rounded) / upper[i, i]
            inside[:, i:] -= push[:, None] * upper[i, i:]
            result[:, first + i], pushed[:, i] = rounded, push
        left[:, last:] -= pushed @ factor[first:last, last:]
    return result[:, order.argsort()]


def measure_observers(repeats: int) -> list[dict[str, object]]:
    """The squared error, as a share of the squared weight, and the speed of each observer on Gaussian weights."""
    weight = torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    figures: list[dict[str, object]] = []
    print(f"\n{'256 x 4096 Gaussian weights':<36}{'relative error':>15}{'Mweights/s':>12}")
    for bits in (8, 4, 2):
        for granularity, size in (("tensor", None), ("channel", None), ("group", 128)):
            for symmetric in (True, False):
                for observer in ("minmax", "percentile", "kl", "mse"):
                    if observer == "kl" and size:
                        continue
                    grid = AffineGrid(
                        bits=bits, symmetric=symmetric, granularity=granularity, group_size=size, observer=observer
                    )  # fmt: skip
                    seconds = float("inf")
                    for _ in range(repeats):
                        start = process_time()
                        parts = grid.encode(weight, None)
                        seconds = min(seconds, process_time() - start)
                    error = float((grid.decode(parts) - weight).square().sum() / weight.square().sum())
                    speed = weight.numel() / seconds / 1e6
                    print(f"{grid.name + ', ' + observer:<36}{error:>15.3e}{speed:>12.1f}")
                    figures.append(
                        {"grid": grid.name, "observer": observer, "error": error, "mweights_per_second": speed}
                    )
    return figures


if __name__ == "__main__":
    main()
