"""What 1, 2, 4 and 8 calibrated targets cost in one run, and each of them alone: one calibration pass feeds all.

    python benchmarks/cost_curve.py [--model FOLDER] [--sequences 128] [--counts 1 2 4 8] [--json FILE]

Each run is a fresh process that plans, converts, measures and compares in-process, like `hubmill convert --executor
inprocess`, and sums the processor seconds of its tasks by kind; planning, imports and what lies between tasks are
"rest". The original alone is what calibrating and running it costs: a run of one target would be that and its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from converter import manifest
from jobs.convert import Run, plan
from jobs.drive import InProcess, drive
from jobs.steps import Tell
from jobs.store import Store
from jobs.task import Task

MODEL = ROOT / "manifests" / "quickstart" / "model"
TARGETS = {
    "w4a16": "{format: compressed-tensors, scheme: W4A16, method: gptq}",
    "w4a16-awq": "{format: compressed-tensors, scheme: W4A16_ASYM, method: awq}",
    "w8a8": "{format: compressed-tensors, scheme: W8A8, method: [smoothquant, gptq]}",
    "q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: true}",
    "w3a16": "{format: compressed-tensors, scheme: W3A16, method: gptq}",
    "w2a16": "{format: compressed-tensors, scheme: W2A16, group_size: 32, method: gptq}",
    "gptq-4": "{format: gptq, scheme: W4A16, group_size: 64, method: gptq}",
    "w4a16-rtn": "{format: compressed-tensors, scheme: W4A16, method: rtn, imatrix: true}",
}
ORIGINAL = ("fetch", "calibrate", "reference")


def main() -> None:
    """Run them all, print the figures, write the JSON file."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", type=Path, default=MODEL)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments.add_argument("--alone", action="store_true", help="also run every target alone")
    arguments.add_argument("--sequences", type=int, default=128, help="calibration rows of 256 tokens")
    arguments.add_argument("--held-out", type=int, default=16, help="evaluation rows of 256 tokens")
    arguments.add_argument("--repeats", type=int, default=1, help="the cheapest run counts")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--settings", default="", help="more of the manifest's calibration, such as ', seed: 1'")
    arguments.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments.add_argument("--run", nargs="+", metavar="TARGET", help="convert these in this process")
    given = arguments.parse_args()
    if given.run:
        convert(given, given.run)
        return
    names = list(TARGETS)
    runs = {f"{count} together": names[:count] for count in given.counts}
    if given.alone:
        runs |= {name: [name] for name in names}
    found: dict[str, dict[str, float]] = {}
    for _ in range(given.repeats):
        for title, targets in runs.items():
            figures = measure(given, targets)
            if title not in found or sum(figures.values()) < sum(found[title].values()):
                found[title] = figures
    one = sum(found[next(iter(found))].values())
    for title, figures in found.items():
        total = sum(figures.values())
        kinds = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in figures.items() if seconds >= 0.05)
        print(f"{title:<12}{total:>8.1f} s{total / one:>7.2f} times one   {kinds}")
    if given.alone and len(names) in given.counts:
        apart = sum(sum(found[name].values()) for name in names)
        together = sum(found[f"{len(names)} together"].values())
        print(f"each alone  {apart:>8.1f} s{apart / together:>7.2f} times all together")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def measure(given: argparse.Namespace, targets: Sequence[str]) -> dict[str, float]:
    """Processor seconds by kind of task of a run in a process of its own."""
    command = [sys.executable, __file__, "--model", str(given.model), "--sequences", str(given.sequences)]
    command += ["--held-out", str(given.held_out), "--threads", str(given.threads), "--settings", given.settings]
    done = subprocess.run([*command, "--run", *targets], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the run of {', '.join(targets)} failed:\n{done.stdout}{done.stderr}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


class Timed(InProcess):
    """Tasks in this process, and the processor seconds they took, by kind."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.seconds: dict[str, float] = {}

    def submit(self, task: Task, store: Store, tell: Tell) -> None:
        begin = processor_seconds()
        super().submit(task, store, tell)
        self.seconds[task.kind] = self.seconds.get(task.kind, 0.0) + processor_seconds() - begin


def convert(given: argparse.Namespace, targets: Sequence[str]) -> None:
    """Convert these targets in this process and print processor seconds by kind of task."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = "".join(f"  {target}: {TARGETS[target]}\n" for target in targets)
        (folder / "cost.yaml").write_text(
            f"name: cost\nmodels:\n  - source: folder:{given.model.resolve()}\ntargets:\n{lines}"
            f"calibration: {{sequences: {given.sequences}, length: 256{given.settings}}}\n"
            f"evaluation: {{sequences: {given.held_out}, length: 256}}\n",
            "utf-8",
        )
        run = Run(manifest=manifest.load(folder / "cost.yaml"), out=folder / "out", executor="inprocess")
        ready = plan(run)
        if ready.reasons:
            sys.exit("\n".join(ready.reasons))
        executor = Timed(given.threads)
        state = drive(ready.prepared.plan.graph, ready.needed, set(), executor, run.store, lambda event: None)
        if state.failed:
            sys.exit("\n".join(state.failed.values()))
    rest = processor_seconds() - sum(executor.seconds.values())
    print(json.dumps(executor.seconds | {"rest": rest}))


def processor_seconds() -> float:
    """Processor time of this process, all threads of it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
