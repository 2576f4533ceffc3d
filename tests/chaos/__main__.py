"""Inject faults, one after the other, until each was repeated often enough or the time is over; print a table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from chaos.faults import FAULTS, Trial
from chaos.runs import Place


@dataclass(kw_only=True)
class Row:
    """What came of a fault: repetitions, how often it was injected, tasks that it cut, promises that were broken."""

    fault: str
    repetitions: int = 0
    injected: int = 0
    cut: int = 0
    broken: int = 0
    seconds: float = 0.0


def main() -> int:
    """Exit with 1 when a promise was broken; the folder of that run is kept and named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--times", type=int, default=2, help="repetitions of each fault")
    parser.add_argument("--injections", type=int, default=0, help="go on until each was injected so often, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0, help="begin no repetition after this time")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args()
    begin = time.monotonic()
    rows = [Row(fault=name) for name in options.only]
    with tempfile.TemporaryDirectory(prefix="hm-chaos-", ignore_cleanup_errors=True) as folder:
        place = Place(folder=Path(folder))
        place.prepare()
        print(f"undisturbed: {place.tasks} tasks, {place.seconds:.1f} s", flush=True)
        for row in rows:
            while row.repetitions < options.times or row.injected < options.injections:
                if time.monotonic() - begin > options.seconds:
                    break
                repeat(place, row, options.seed)
            print(json.dumps(asdict(row)), flush=True)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    return int(any(row.broken for row in rows))


def repeat(place: Place, row: Row, seed: int) -> None:
    """One repetition. What it draws depends on the seed, the fault and its number alone."""
    name = f"{row.fault}-{row.repetitions}"
    trial = Trial(place=place, name=name, dice=Random(f"{seed} {name}"))
    begin = time.monotonic()
    place.write(name)
    try:
        FAULTS[row.fault](trial)
        shutil.rmtree(place.folder / name)
    except Exception:
        row.broken += 1
        kept = Path(tempfile.mkdtemp(prefix=f"broken-{name}-"))
        shutil.copytree(place.folder / name, kept, dirs_exist_ok=True, symlinks=True)
        print(f"{name} (kept in {kept}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    row.repetitions += 1
    row.injected += trial.injected
    row.cut += trial.cut
    row.seconds += time.monotonic() - begin


def print_table(rows: list[Row]) -> None:
    """As docs/results.md shows it."""
    print("| fault | runs | times injected | tasks cut | promises broken | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        numbers = (row.repetitions, row.injected, row.cut, row.broken, round(row.seconds))
        print(f"| {row.fault} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    sys.exit(main())
