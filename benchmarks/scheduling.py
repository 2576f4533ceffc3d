"""What planning, scheduling and resuming cost beside the work itself.

    python benchmarks/scheduling.py [plan] [jobs] [resume] [scale] [--jobs 50] [--json FILE]

plan: seconds from a manifest of 1,000 jobs (20 models of the quickstart's size, 50 targets) to the list of tasks and
refusals. jobs: 50 jobs of one such model in this process; what the run took beside the seconds that its tasks were
given. resume: such a run killed in the middle and gone on with; what both parts took beyond an undisturbed one, a
second start and plan among it. scale: as many jobs of each of two models on one worker and on two, each bound to a core
of its own; meaningless unless two cores are idle, so the load is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "manifests" / "quickstart" / "model"
GGUF = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_M", "Q3_K_S")
MODELS = 20
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "cwd": ROOT}
RUN = [sys.executable, "-m", "converter.cli"]


def targets(count: int) -> dict[str, str]:
    """So many targets: GGUF of 12 types, integers of 2 to 8 bits in groups and channels, in three formats."""
    found = {f"gguf-{type.lower()}": f"{{format: gguf, type: {type}}}" for type in GGUF}
    for bits in (8, 4, 2):
        for group in (32, 64, 128, 256):
            found[f"pq-{bits}-{group}"] = f"{{format: parquet, scheme: INT{bits}, group_size: {group}}}"
    for bits in (8, 4):
        for group in (32, 64, 128):
            for method in ("rtn", "gptq"):
                fields = f"format: compressed-tensors, scheme: W{bits}A16, group_size: {group}, method: {method}"
                found[f"w{bits}-{group}-{method}"] = f"{{{fields}}}"
    for bits in (8, 4):
        for group in (32, 64, 128):
            fields = f"format: gptq, scheme: W{bits}A16, group_size: {group}, method: rtn"
            found[f"gptq-{bits}-{group}"] = f"{{{fields}}}"
    for number, damping in enumerate((0.005, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)):
        fields = f"format: compressed-tensors, scheme: W4A16, group_size: 128, method: gptq, damping: {damping}"
        found[f"damped-{number}"] = f"{{{fields}}}"
    assert len(found) >= count, len(found)
    return dict(list(found.items())[:count])


def manifest(folder: Path, count: int, models: int = 1) -> Path:
    """A manifest of models x targets beside copies of the quickstart's model; returns its path."""
    for number in range(models):
        shutil.copytree(MODEL, folder / f"model-{number:02d}")
    lines = ["name: bench", "models:", *(f"  - source: folder:model-{number:02d}" for number in range(models))]
    lines += ["targets:", *(f"  {name}: {text}" for name, text in targets(count).items())]
    lines += ["calibration: {sequences: 8, length: 256}", "evaluation: {sequences: 4, length: 256}"]
    path = folder / "bench.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def convert(path: Path, out: str, *options: str, cores: str = "") -> list[str]:
    bound = ["taskset", "-c", cores] if cores else []
    return [*bound, *RUN, "convert", str(path), "--json", "--out", str(path.parent / out), *options]


def events(path: Path, out: str) -> list[dict[str, object]]:
    """What the log says of tasks, not of the plan and the run as a whole."""
    log = path.parent / out / "bench" / ".work" / "events.jsonl"
    lines = log.read_text("utf-8").splitlines() if log.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [event for event in found if event["task"] not in ("plan", "run")]


def seconds(command: Sequence[str]) -> float:
    begin = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return time.monotonic() - begin


def task_seconds(found: list[dict[str, object]]) -> float:
    return sum(float(str(event["seconds"])) for event in found if event["state"] == "done" and "seconds" in event)


def span(found: list[dict[str, object]]) -> float:
    """Seconds from the start of the first task to the end of the last."""
    times = [float(str(event["time"])) for event in found]
    return max(times) - min(times)


def plan(folder: Path, jobs: int) -> dict[str, float]:
    """Planning 1,000 jobs: in all, of it processor time, and of it Python's and torch's imports."""
    path = manifest(folder, 50, MODELS)
    code = f"""
import time, json
begin = time.monotonic()
from pathlib import Path
from typing import Any
from converter import manifest
from jobs.convert import Run, plan
imported = time.monotonic()
run = Run(manifest=manifest.load(Path({str(path)!r})), out=Path({str(folder / "out")!r}), executor="inprocess")
ready = plan(run)
assert not ready.reasons, ready.reasons
print(json.dumps([imported - begin, time.monotonic() - imported, time.process_time(), len(ready.needed)]))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    imports, planning, processor, tasks = json.loads(done.stdout)
    return {"jobs": 50 * MODELS, "tasks": tasks, "imports_s": imports, "plan_s": planning, "processor_s": processor}


def jobs(folder: Path, count: int) -> dict[str, float]:
    """What the driver takes beside its tasks."""
    path = manifest(folder, count)
    wall = seconds(convert(path, "out", "--executor", "inprocess"))
    found = events(path, "out")
    tasks, whole = task_seconds(found), span(found)
    return {
        "jobs": count,
        "tasks": sum(event["state"] == "done" for event in found),
        "wall_s": wall,
        "tasks_s": tasks,
        "scheduling_share": (whole - tasks) / whole,
    }


def resume(folder: Path, count: int) -> dict[str, float]:
    """A kill in the middle of a run: what both parts take beyond an undisturbed run, from start to end of a process.

    In processor time, which other work on the machine changes little.
    """
    path = manifest(folder, count)
    whole = processor_seconds(subprocess.Popen(convert(path, "whole", "--executor", "inprocess"), **QUIET))
    total = sum(event["state"] == "start" for event in events(path, "whole"))
    begun = time.process_time()
    driver = subprocess.Popen(convert(path, "out", "--executor", "inprocess"), **QUIET)
    while sum(event["state"] == "done" for event in events(path, "out")) < total // 2:
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    until = processor_seconds(driver)
    after = processor_seconds(subprocess.Popen(convert(path, "out", "--executor", "inprocess"), **QUIET))
    nothing = processor_seconds(subprocess.Popen([*RUN, "plan", str(path), "--out", str(folder / "new")], **QUIET))
    return {
        "tasks": total,
        "whole_processor_s": whole,
        "until_kill_processor_s": until,
        "after_processor_s": after,
        "start_and_plan_processor_s": nothing,
        "started_twice": sum(event["state"] == "start" for event in events(path, "out")) - total,
        "overhead_share": (until + after - whole) / whole,
        "watching_processor_s": time.process_time() - begun,
    }


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """What a process and its threads took, once it has ended."""
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return usage.ru_utime + usage.ru_stime


def scale(folder: Path, count: int) -> dict[str, float]:
    """One worker on one core against two on two."""
    path = manifest(folder, count, models=2)
    found: dict[str, float] = {"load": os.getloadavg()[0]}
    for workers, cores in ((1, "0"), (2, "0,1")):
        seconds(convert(path, f"out{workers}", cores=cores))
        found[f"span_{workers}_s"] = span(events(path, f"out{workers}"))
        found[f"tasks_{workers}_s"] = task_seconds(events(path, f"out{workers}"))
    found["efficiency"] = found["span_1_s"] / (2 * found["span_2_s"])
    return found


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "plan": plan,
    "jobs": jobs,
    "resume": resume,
    "scale": scale,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=list(PARTS))
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for name in options.parts:
        with tempfile.TemporaryDirectory(prefix="hm-bench-") as folder:
            found[name] = PARTS[name](Path(folder), options.jobs)
        print(name, json.dumps({key: round(value, 3) for key, value in found[name].items()}), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
