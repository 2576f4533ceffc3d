"""Beside llm-compressor and auto-round: the same model, calibration rows and evaluation, in one run.

    make quantizers && python benchmarks/peers.py [--only gptq-w4 ...] [--repeats 2] [--threads 1] [--json FILE]
    python benchmarks/peers.py --model FOLDER --train 1000      # a model of 14.7 M parameters, trained into FOLDER once

Each case is one method and scheme, by the peer and by ours in turn, every one in a fresh process: seconds are from
before the model is read until the checkpoint is written, imports left out; the best of the repeats counts. On a
machine with other work beside, processor seconds are what compares. Memory is the highest resident one of the process,
and beside it what its libraries take once they are imported. Both checkpoints are opened by our readers of such
checkpoints and measured by our own evaluation beside the original, so that figures differ by what is in the files
alone. The peers run as they come: each block sees what the quantized blocks before it gave; ours see the original's,
but for the rows that say "chain".
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from converter import manifest, tensor_file
from converter.architecture import Tap
from converter.blocks import Decoder
from converter.compare import evaluation
from converter.containers.safetensors_open import open_safetensors
from converter.grids.affine import AffineGrid
from converter.methods import Block, Options
from converter.methods.gptq import gptq
from converter.progress import Event
from converter.skeleton import skeleton
from converter.stats import observe
from jobs.convert import Run, plan
from jobs.drive import InProcess, drive
from jobs.prepare import prepare
from jobs.texts import text_rows

MODEL = ROOT / "manifests" / "quickstart" / "model"
TRAIN = ROOT / "manifests" / "quickstart" / "train.py"
PEERS = ROOT / ".venv" / "quantizers" / "bin" / "python"
WORKER = ROOT / "benchmarks" / "quantizers" / "worker.py"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method and scheme, as the peer and as a target of ours says it."""

    name: str
    scheme: str
    methods: tuple[str, ...]
    target: str
    group_size: int = 0
    tool: str = "llm-compressor"
    observer: str = ""


def weights_only(bits: int, group: int) -> list[Case]:
    """RTN, GPTQ and AutoRound at so many bits; beside the latter our GPTQ on a chain, and what is learned on one."""
    scheme, name = f"W{bits}A16", f"w{bits}" + ("" if group == 128 else f"g{group}")
    ours = f"scheme: {scheme}, group_size: {group}"
    same = {"scheme": scheme, "group_size": group}
    return [
        Case(name=f"rtn-{name}", methods=("rtn",), target=f"{ours}, method: rtn", **same),
        Case(name=f"gptq-{name}", methods=("gptq",), target=f"{ours}, method: gptq", **same),
        Case(name=f"autoround-{name}", methods=(), target=f"{ours}, method: gptq, propagate: quantized",
             tool="auto-round", **same),
        Case(name=f"learned-{name}", methods=(), target=f"{ours}, method: autoround, propagate: quantized",
             tool="auto-round", **same),
    ]  # fmt: skip


CASES = (
    *weights_only(4, 128),
    Case(name="awq-w4-asym", scheme="W4A16_ASYM", methods=("awq", "rtn"), group_size=128,
         target="scheme: W4A16_ASYM, group_size: 128, method: awq"),
    *weights_only(3, 128),
    *weights_only(2, 128),
    *weights_only(2, 64),
    *weights_only(2, 32),
    Case(name="smoothquant-gptq-w8a8", scheme="W8A8", methods=("smoothquant", "gptq"),
         target="scheme: W8A8, method: [smoothquant, gptq], smoothing_strength: 0.8"),
    Case(name="rtn-fp8-dynamic", scheme="FP8_DYNAMIC", methods=("rtn",), target="scheme: FP8_DYNAMIC, method: rtn"),
    Case(name="rtn-nvfp4", scheme="NVFP4", methods=("rtn",), target="scheme: NVFP4, method: rtn"),
    Case(name="rtn-mxfp4", scheme="MXFP4", methods=("rtn",), target="scheme: MXFP4, method: rtn"),
    Case(name="rtn-mxfp4a16", scheme="MXFP4A16", methods=("rtn",), target="scheme: MXFP4A16, method: rtn"),
)  # fmt: skip


def main() -> None:
    """Run the cases, print the table, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=MODEL)
    arguments.add_argument(
        "--train", type=int, default=0, metavar="STEPS", help="train --model first, if it is not there"
    )
    arguments.add_argument("--only", nargs="+", default=[], help="cases by name, or the beginning of it")
    arguments.add_argument("--repeats", type=int, default=2)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--sequences", type=int, default=32, help="calibration rows of 256 tokens, 128 at most")
    arguments.add_argument("--held-out", type=int, default=64, help="evaluation rows of 256 tokens, 111 at most")
    arguments.add_argument("--dtype", default="auto", help="what the peers load the model as")
    arguments.add_argument("--extended", action="store_true", help="auto-round with enable_alg_ext")
    arguments.add_argument("--observer", default="", help="the peer's observer of weights, such as imatrix_mse")
    arguments.add_argument("--python", type=Path, default=PEERS, help="the Python of the peers' environment")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments.add_argument("--ours", metavar="JSON", help="convert in this process")
    given = arguments.parse_args()
    if given.ours:
        convert(**json.loads(given.ours))
        return
    torch.set_num_threads(1)
    if not (given.model / "config.json").is_file():
        size = ("--hidden", "512", "--blocks", "4", "--steps", str(given.train))
        subprocess.run([sys.executable, TRAIN, *size, "--out", given.model], check=True)
    cases = [case for case in CASES if not given.only or case.name.startswith(tuple(given.only))]
    with tempfile.TemporaryDirectory() as name:
        found = compare(cases, given, Path(name))
    if given.json is not None:
        settings = {key: str(value) for key, value in vars(given).items() if key not in ("json", "ours")}
        given.json.write_text(json.dumps({"settings": settings, "cases": found}, indent=1) + "\n", "utf-8")


def compare(cases: Sequence[Case], given: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The figures of each case, printed as they come."""
    judge = Judge(given.model.resolve(), folder, given.sequences, given.held_out, given.threads)
    print(f"{'case':<24}{'by':<16}{'perplexity':>11}{'KL mean':>10}{'ratio':>7}{'processor s':>13}{'times':>7}"
          f"{'wall s':>8}{'peak MB':>9}{'imports':>9}")  # fmt: skip
    print(f"{'the original':<40}{judge.perplexity:>11.3f}", flush=True)
    found = []
    for case in cases:
        sides: dict[str, dict[str, Any]] = {}
        for repeat in range(given.repeats):
            for by, run in (("peer", run_peer), ("ours", run_ours)):
                if by == "peer" and not given.python.is_file():
                    continue
                out = folder / f"{case.name}-{by}-{repeat}"
                figures = run(case, given, judge.rows_file, out)
                best = sides.setdefault(by, figures)
                for key in ("seconds", "processor_seconds", "process_seconds", "peak_bytes"):
                    best[key] = min(best[key], figures[key])
                if not repeat:
                    best |= judge.measure(Path(figures["artifact"]))
        found.append({"case": case.name, **sides})
        for by, figures in sides.items():
            print(line_of(case, by, figures, sides), flush=True)
    return found


def line_of(case: Case, by: str, figures: dict[str, Any], sides: dict[str, dict[str, Any]]) -> str:
    """A row of the table; ratios are ours over the peer's KL, and the peer's seconds over ours."""
    ratios = f"{'':>7}", f"{'':>7}"
    if by == "ours" and "peer" in sides:
        peer = sides["peer"]
        ratios = (
            f"{figures['kl_mean'] / peer['kl_mean']:>7.2f}",
            f"{peer['processor_seconds'] / figures['processor_seconds']:>7.2f}",
        )
    title = case.tool if by == "peer" else "ours, chain" if "quantized" in case.target else "ours"
    return (
        f"{case.name:<24}{title:<16}{figures['perplexity']:>11.3f}{figures['kl_mean']:>10.5f}{ratios[0]}"
        f"{figures['processor_seconds']:>13.2f}{ratios[1]}{figures['seconds']:>8.1f}"
        f"{figures['peak_bytes'] / 1e6:>9.0f}{figures['imported_bytes'] / 1e6:>9.0f}"
    )


class Judge:
    """The original's hidden states on held-out rows, and the figures of written checkpoints beside them."""

    def __init__(self, model: Path, folder: Path, sequences: int, held_out: int, threads: int) -> None:
        self._folder = folder / "judge"
        self._folder.mkdir()
        path = write_manifest(folder / "judge.yaml", model, "scheme: W4A16", sequences, held_out)
        loaded = manifest.load(path)
        run = Run(manifest=loaded, out=folder / "judge-out", executor="inprocess")
        self._model = prepare(loaded, loaded.jobs(), run.store, 1, "cpu").plan.jobs[0].model
        architecture, snapshot = self._model.architecture, self._model.snapshot
        assert architecture is not None
        self._original = evaluation.Original(
            architecture=architecture,
            names=tuple(snapshot.tensors),
            read=lambda name: snapshot.read(name).float(),
            hidden_at=partial(evaluation.hidden_file, self._folder),
        )
        self._decoder = Decoder(snapshot.folder, architecture, "benchmark", workers=threads, stored=snapshot.tensors)
        self._rows = text_rows(loaded.evaluation, snapshot.folder, "benchmark", folder)
        calibration = text_rows(loaded.calibration, snapshot.folder, "benchmark", folder)
        self.rows_file = folder / "rows.safetensors"
        tensor_file.save(self.rows_file, {"calibration": calibration})
        with torch.no_grad():
            said = evaluation.reference(self._decoder, self._rows, self._original, self._folder, ignore)
        self.perplexity = float(said["perplexity"])

    def measure(self, artifact: Path) -> dict[str, float]:
        """Perplexity, KL divergence and agreement of a checkpoint, whoever wrote it."""
        opened = open_safetensors(artifact)
        with torch.no_grad():
            measured = evaluation.measure(self._original, opened, self._decoder, self._rows, ignore)
        return dict(measured["output"])


def ignore(fraction: float) -> None:
    """Tells nobody how far it is."""


def write_manifest(path: Path, model: Path, target: str, sequences: int, held_out: int) -> Path:
    """A manifest of one model and one target."""
    path.write_text(
        f"name: peers\nmodels:\n  - source: folder:{model}\n"
        f"targets:\n  ours: {{format: compressed-tensors, {target}}}\n"
        f"calibration: {{sequences: {sequences}, length: 256}}\nevaluation: {{sequences: {held_out}, length: 256}}\n",
        "utf-8",
    )
    return path


def run_peer(case: Case, given: argparse.Namespace, rows: Path, out: Path) -> dict[str, Any]:
    """The figures of the peer's run, and where its checkpoint is."""
    asked = {
        "tool": case.tool,
        "scheme": case.scheme,
        "methods": case.methods,
        "group_size": case.group_size,
        "observer": given.observer,
        "extended": given.extended,
        "dtype": given.dtype,
        "threads": given.threads,
        "model": str(given.model.resolve()),
        "rows": str(rows),
        "out": str(out),
    }
    figures = last_line([str(given.python), str(WORKER), json.dumps(asked)], given.threads)
    return figures | {"artifact": str(next(out.rglob("config.json")).parent)}


def run_ours(case: Case, given: argparse.Namespace, rows: Path, out: Path) -> dict[str, Any]:
    """The same by ours."""
    out.mkdir()
    asked = {
        "model": str(given.model.resolve()),
        "target": case.target,
        "sequences": given.sequences,
        "held_out": given.held_out,
        "threads": given.threads,
        "out": str(out),
    }
    return last_line([sys.executable, __file__, "--ours", json.dumps(asked)], given.threads)


def last_line(command: list[str], threads: int) -> dict[str, Any]:
    """What a command that ends well prints last, as JSON."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def convert(model: str, target: str, sequences: int, held_out: int, threads: int, out: str) -> None:
    """Convert up to the written checkpoint in this process, and print what it took."""
    path = write_manifest(Path(out) / "ours.yaml", Path(model), target, sequences, held_out)
    load_code(Path(model))
    imported = resident_bytes()
    start, processor = time.perf_counter(), processor_seconds()
    run = Run(manifest=manifest.load(path), out=Path(out), executor="inprocess")
    ready = plan(run)
    if ready.reasons:
        sys.exit("\n".join(ready.reasons))
    graph, store = ready.prepared.plan.graph, run.store
    peaks: list[int] = []  # of each task: steps reset what the system remembers of the process

    def show(event: Event) -> None:
        peaks.append(event.peak_bytes)

    wanted = [key for key in ready.needed if graph.tasks[key].kind not in ("reference", "evaluate", "finish")]
    state = drive(graph, wanted, set(), InProcess(threads), store, show)
    if state.failed:
        sys.exit("\n".join(state.failed.values()))
    figures = {
        "seconds": time.perf_counter() - start,
        "processor_seconds": processor_seconds() - processor,
        "process_seconds": processor_seconds(),
        "peak_bytes": max(peaks),
        "imported_bytes": imported,
        "artifact": str(store.output(next(key for key in wanted if graph.tasks[key].kind == "assemble"))),
    }
    print(json.dumps(figures))


def load_code(model: Path) -> None:
    """Import what is otherwise imported on its first use: the code of the model's family, and compiled kernels."""
    skeleton(model, "decoder", torch.float32, torch.device("cpu"), "benchmark")
    weight, grid = torch.randn(8, 32), AffineGrid(bits=4, granularity="group", group_size=32, observer="mse")
    block = Block(
        where="benchmark",
        tensors={"linear.weight": weight},
        stats={"tap": observe(torch.randn(64, 32), True)},
        taps=(Tap(name="tap", linears=("linear",)),),
    )
    gptq(block, {"linear.weight": grid}, Options(importance=True))


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def processor_seconds() -> float:
    """Processor time of this process and of children that ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


if __name__ == "__main__":
    main()
