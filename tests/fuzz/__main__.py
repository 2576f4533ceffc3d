"""Fuzz each reader for a while, each in processes of its own; print a table, and keep what was found."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

SLOW_SECONDS = 20  # an input that takes longer ends its process
MEMORY_MB = 4096  # and one that takes more


@dataclass(kw_only=True)
class Row:
    """What came of a reader: inputs tried, and what was found, by its place."""

    target: str
    inputs: int = 0
    seconds: float = 0.0
    findings: dict[str, str] = field(default_factory=dict)


def main() -> int:
    """Exit with 1 when anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("out/fuzz"), help="inputs that were found, by reader")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return follow(arguments.child, arguments.seconds, arguments.seed, arguments.keep)
    from fuzz.targets import TARGETS

    rows = [watch(name, arguments.seconds, arguments.seed, arguments.keep) for name in arguments.only or TARGETS]
    print(f"{'reader':<12} {'inputs':>10} {'seconds':>8}  findings")
    for row in rows:
        print(f"{row.target:<12} {row.inputs:>10,} {row.seconds:>8.0f}  {len(row.findings)}")
        for place, path in row.findings.items():
            print(f"    {place}: {path}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(row.findings for row in rows))


def watch(name: str, seconds: float, seed: int, keep: Path) -> Row:
    """Run one reader's process, and another one when an input ends it, until the time is over."""
    row, started = Row(target=name), time.monotonic()
    folder = keep / name
    folder.mkdir(parents=True, exist_ok=True)
    while (left := seconds - (time.monotonic() - started)) > 5:
        command = [sys.executable, "-m", "fuzz", "--child", name, "--seconds", str(left), "--seed", str(seed)]
        # libFuzzer leaves without a goodbye, so its files lie in a folder of ours, in memory if it can be.
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as files:
            settings = os.environ | {"TMPDIR": files, "OMP_NUM_THREADS": "1"}
            command += ["--keep", str(keep)]
            ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=settings, check=False)
        counts = re.findall(r"stat::number_of_executed_units: (\d+)|^#(\d+)\s", ended.stderr, re.MULTILINE)
        row.inputs += max((int(one or other) for one, other in counts), default=0)
        if ended.returncode:
            last = ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else ""
            row.findings[f"process ended with {ended.returncode}"] = last[:200]
            (folder / "process.txt").write_text(ended.stderr[-20000:])
        seed += 1
    row.seconds = time.monotonic() - started
    row.findings |= {path.read_text().splitlines()[0]: str(path) for path in sorted(folder.glob("*.said"))}
    return row


def follow(name: str, seconds: float, seed: int, keep: Path) -> int:
    """Fuzz one reader in this process, which libFuzzer ends."""
    import atheris

    with atheris.instrument_imports(include=["converter", "jobs"]):
        from fuzz.engine import examine
        from fuzz.targets import TARGETS
    target, seen = TARGETS[name], set[str]()
    corpus = Path(tempfile.mkdtemp())
    for data in target.seeds():
        (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)

    def one(data: bytes) -> None:
        found = examine(target, data)
        if found is not None and found.place not in seen:
            seen.add(found.place)
            path = keep / name / hashlib.sha1(found.place.encode()).hexdigest()[:12]
            path.write_bytes(found.data)
            path.with_suffix(".said").write_text(f"{found.place}\n{found.said}\n")

    limits = [f"-max_total_time={int(seconds)}", f"-timeout={SLOW_SECONDS}", f"-rss_limit_mb={MEMORY_MB}"]
    settings = ["-max_len=16384", "-len_control=20", "-print_final_stats=1", f"-artifact_prefix={keep / name}/"]
    atheris.Setup([sys.argv[0], str(corpus), f"-seed={seed}", *limits, *settings], one)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
