"""One input at a time: what comes of it, and, without atheris, where the next one is from."""

from __future__ import annotations

import resource
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from converter.errors import HubmillError
from fuzz.targets import ROOT, Target

LIMIT_SECONDS = 5.0  # of processor time: machines are shared
LIMIT_BYTES = 1 << 30
EDGES = (0, 1, 2, 7, 31, 32, 127, 255, 1 << 15, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1)
TEXTS = (
    b"[",
    b"{",
    b"]}",
    b'"',
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"..",
    b"/",
    b"\0",
    b"true",
    b"[]",
    b"{}",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """An input that ended in something else than a refusal; `place` tells findings apart."""

    place: str
    said: str
    data: bytes


def examine(target: Target, data: bytes) -> Finding | None:
    """What is wrong with how a reader ends on this input; None: it reads it, or refuses it."""
    started, before = time.process_time(), peak_bytes()
    try:
        target.read(data)
    except HubmillError:
        pass
    except Exception as error:
        frames = [one for one in traceback.extract_tb(error.__traceback__) if str(ROOT) in one.filename]
        ours = [one for one in frames if "/.venv/" not in one.filename and "/tests/" not in one.filename]
        at = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "?"
        return Finding(place=f"{type(error).__name__} {at}", said=traceback.format_exc(limit=-4)[-1500:], data=data)
    if (seconds := time.process_time() - started) > LIMIT_SECONDS:
        return Finding(place="slow", said=f"{seconds:.1f} s", data=data)
    if (more := peak_bytes() - before) > LIMIT_BYTES:
        return Finding(place="large", said=f"{more >> 20} MiB", data=data)
    return None


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def mutated(seeds: Sequence[bytes], draw: Random) -> Iterator[bytes]:
    """Inputs without end: a seed with a few bytes, numbers or pieces changed, or the start of one and the end of
    another."""
    while True:
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.choice((1, 1, 2, 4, 8))):
            at = draw.randrange(len(data) + 1)
            match draw.randrange(8):
                case 0 if data:
                    data[at % len(data)] ^= 1 << draw.randrange(8)
                case 1 if data:
                    data[at % len(data)] = draw.randrange(256)
                case 2:
                    data[at:at] = draw.randbytes(draw.randrange(1, 9))
                case 3:
                    del data[at : at + draw.randrange(1, 40)]
                case 4:
                    data[at:at] = data[at : at + draw.randrange(1, 40)] * draw.choice((1, 1, 2, 50))
                case 5:
                    size = draw.choice((1, 2, 4, 8))
                    data[at : at + size] = (draw.choice(EDGES) % (1 << 8 * size)).to_bytes(size, "little")
                case 6:
                    data[at : at + draw.choice((0, 1, 4))] = draw.choice((*TEXTS, str(draw.choice(EDGES)).encode()))
                case 7:
                    other = draw.choice(seeds)
                    data = data[:at] + other[draw.randrange(len(other) + 1) :]
        yield bytes(data)
