"""Inject faults, one after the other, until each was repeated often enough or the time is over; print a table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from chaos import faults, faults_hub, faults_ray
from chaos.faults import Trial
from chaos.nodes import Cluster, cluster
from chaos.runs import Place, kill
from hub_server import serving

FAULTS: Mapping[str, Callable[[Trial], None]] = {
    "driver-killed": faults.driver_killed,
    "file-damaged": faults.file_damaged,
    "disk-full": faults.disk_full,
    "memory-short": faults.memory_short,
    "two-at-once": faults.two_at_once,
    "host-stalled": faults.host_stalled,
    "hub-in-trouble": faults_hub.hub_in_trouble,
    "stale-parent": faults_hub.stale_parent,
    "ray-killed": faults_ray.ray_killed,
    "worker-killed": faults_ray.worker_killed,
    "node-killed": faults_ray.node_killed,
    "ray-driver-killed": faults_ray.ray_driver_killed,
    "head-lost": faults_ray.head_lost,
    "memory-monitor": faults_ray.memory_monitor,
}


@dataclass(kw_only=True)
class Row:
    """What came of a fault: repetitions, how often it was injected, tasks cut, runs that hung, promises broken."""

    fault: str
    repetitions: int = 0
    injected: int = 0
    cut: int = 0
    hung: int = 0
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
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="hm-chaos-", ignore_cleanup_errors=True))
        sites = Sites(folder=Path(folder), stack=stack)
        for row in rows:
            while row.repetitions < options.times or row.injected < options.injections:
                if time.monotonic() - begin > options.seconds:
                    break
                repeat(sites, row, options.seed)
            print(json.dumps(asdict(row)), flush=True)
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    return int(any(row.broken for row in rows))


@dataclass(kw_only=True)
class Sites:
    """What faults need, made when one first asks for it."""

    folder: Path
    stack: ExitStack

    def place(self, fault: str) -> Place:
        """A folder with a model, or a hub."""
        return (
            self._on_hub if FAULTS[fault] in (faults_hub.hub_in_trouble, faults_hub.stale_parent) else self._in_folder
        )

    @cached_property
    def _in_folder(self) -> Place:
        (self.folder / "near").mkdir()
        return prepared(Place(folder=self.folder / "near"))

    @cached_property
    def _on_hub(self) -> Place:
        (self.folder / "far").mkdir()
        server = self.stack.enter_context(serving())
        return prepared(faults_hub.HubPlace(folder=self.folder / "far", targets=faults_hub.TARGETS, server=server))

    @cached_property
    def nodes(self) -> Cluster:
        """A cluster of three nodes."""
        return self.stack.enter_context(cluster())


def prepared(place: Place) -> Place:
    """The place, after an undisturbed run there."""
    place.prepare()
    print(f"undisturbed: {len(place.reads)} tasks, {place.seconds:.1f} s", flush=True)
    return place


def repeat(sites: Sites, row: Row, seed: int) -> None:
    """One repetition. What it draws depends on the seed, the fault and its number alone."""
    name, place = f"{row.fault}-{row.repetitions}", sites.place(row.fault)
    trial = Trial(place=place, name=name, dice=Random(f"{seed} {name}"), cluster=lambda: sites.nodes)
    begin = time.monotonic()
    place.write(name)
    try:
        FAULTS[row.fault](trial)
        shutil.rmtree(place.folder / name)
    except Exception:
        row.broken += 1
        kept = Path(tempfile.mkdtemp(prefix=f"broken-{name}-"))
        shutil.copytree(place.folder / name, kept, dirs_exist_ok=True, symlinks=True)
        for driver in trial.drivers:
            if driver.returncode is None:
                kill(driver)
        print(f"{name} (kept in {kept}):\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    row.repetitions += 1
    row.injected += trial.injected
    row.cut += trial.cut
    row.hung += trial.hung
    row.seconds += time.monotonic() - begin


def print_table(rows: list[Row]) -> None:
    """As docs/results.md shows it."""
    print("| fault | runs | times injected | tasks cut | hung, killed | promises broken | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        numbers = (row.repetitions, row.injected, row.cut, row.hung, row.broken, round(row.seconds))
        print(f"| {row.fault} | {' | '.join(map(str, numbers))} |")


if __name__ == "__main__":
    sys.exit(main())
