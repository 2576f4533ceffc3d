"""The lattices of the i-quants: points, codes and neighbours, against their definition done slowly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from patience import PATIENCE_SECONDS
from quantkernels.ggml.lattice import SHELLS, UNREACHABLE, Lattice, lattice

SIZES = {
    "IQ1": (2048, 8),
    "IQ2_XXS": (256, 8),
    "IQ2_XS": (512, 8),
    "IQ2_S": (1024, 8),
    "IQ3_XXS": (256, 4),
    "IQ3_S": (512, 4),
}


def levels_of(code: int, dimensions: int) -> list[int]:
    bits = 2 if dimensions == 8 else 3
    return [(code >> (bits * i)) & ((1 << bits) - 1) for i in range(dimensions)]


def levels_of_points(known: Lattice, name: str) -> NDArray[np.int64]:
    return known.points.astype(np.int64) + 1 if name == "IQ1" else (known.points.astype(np.int64) - 1) // 2


@pytest.mark.parametrize("name", SIZES)
def test_points_are_those_of_the_gguf_package(name: str) -> None:
    known = lattice(name)
    theirs = {"IQ1": gguf.quants.IQ1_S}.get(name) or getattr(gguf.quants, name)
    theirs.init_grid()
    assert known.points.shape == known.values.shape == SIZES[name]
    assert np.array_equal(known.values, theirs.grid.reshape(SIZES[name]))
    assert sorted(set(known.points.flat)) == (
        [-1, 0, 1] if name == "IQ1" else list(range(1, 6 if "2" in name else 16, 2))
    )
    assert (np.argsort(known.points[:, 0], kind="stable") == np.argsort(known.values[:, 0], kind="stable")).all()


@pytest.mark.parametrize("name", SIZES)
def test_every_code_is_a_point_a_row_or_unreachable(name: str) -> None:
    known = lattice(name)
    count, dimensions = SIZES[name]
    points = levels_of_points(known, name)
    assert [
        known.index_of[sum(level << (2 if dimensions == 8 else 3) * i for i, level in enumerate(point))]
        for point in points.tolist()
    ] == list(range(count))
    rows = [-1 - index for index in known.index_of.tolist() if UNREACHABLE < index < 0]
    assert rows == list(range(len(known.neighbour_start) - 1))
    top = 2 if dimensions == 8 else 7
    unreachable = [max(levels_of(code, dimensions)) > top for code in range(len(known.index_of))]
    assert np.array_equal(known.index_of == UNREACHABLE, unreachable)
    assert len(rows) + count == (top + 1) ** dimensions


@pytest.mark.parametrize("name", SIZES)
def test_neighbours_are_the_nearest_shells_by_distance_then_index(name: str) -> None:
    known = lattice(name)
    points = levels_of_points(known, name)
    off = np.flatnonzero((known.index_of < 0) & (known.index_of != UNREACHABLE))
    for code in np.random.default_rng(0).choice(off, 200, replace=False).tolist():
        distances = ((points - levels_of(code, SIZES[name][1])) ** 2).sum(axis=1).tolist()
        reach = sorted(set(distances))[SHELLS[name] - 1]
        wanted = [
            index for distance, index in sorted(zip(distances, range(len(points)), strict=True)) if distance <= reach
        ]
        row = -1 - known.index_of[code]
        got = known.neighbours[known.neighbour_start[row] : known.neighbour_start[row + 1]]
        assert got.tolist() == wanted


def test_neighbour_counts_are_those_of_ggml() -> None:
    counts = {name: np.diff(lattice(name).neighbour_start) for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S")}
    assert {name: (round(float(count.mean()), 1), int(count.max())) for name, count in counts.items()} == {
        "IQ2_XXS": (17.9, 150),
        "IQ2_XS": (30.0, 292),
        "IQ2_S": (8.1, 70),
    }


def test_a_shared_table_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        lattice("IQ2_XXS").neighbours[0] = 1


PROGRAM = """
import sys
import numpy as np
from quantkernels.ggml.lattice import lattice
if sys.argv[1] == "without":
    sys.modules["gguf"] = None
print(int(lattice("IQ3_S").neighbours.astype(np.int64).sum()))
"""


def run(folder: Path, how: str) -> str:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", PROGRAM, how]
    return subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    ).stdout


def test_what_is_kept_on_disk_is_used_without_gguf_and_rebuilt_when_cut_off(tmp_path: Path) -> None:
    built = run(tmp_path, "with")
    (kept,) = tmp_path.glob("lattice-IQ3_S-*.npz")
    assert not list(tmp_path.glob("*.part"))
    assert run(tmp_path, "without") == built
    kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.raises(subprocess.CalledProcessError):
        run(tmp_path, "without")
    assert run(tmp_path, "with") == built
    assert run(tmp_path, "without") == built


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert int(run(tmp_path / "file" / "folder", "with")) > 0
