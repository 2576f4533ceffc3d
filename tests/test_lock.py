"""The lock file: deterministic, portable, complete, and readable again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from converter.errors import ManifestError
from converter.lock import lock_text, read_lock
from converter.manifest import load

GOOD = """\
name: small
models:
  - source: folder:model
  - source: hub:org/name@0123456
    overrides: {int8: {group_size: 64, rules: {lm_head: BF16}}}
targets:
  q8-0: {format: gguf, type: Q8_0, imatrix: text.txt, metadata: {general.name: A}}
  int8: {format: parquet, scheme: INT8, rules: {embed: F16, lm_head: F32}}
calibration: {text: file:text.txt}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "m.yaml").write_text(GOOD)
    return tmp_path


def test_the_lock_is_deterministic_and_reads_back(folder: Path) -> None:
    manifest = load(folder / "m.yaml")
    commits = {"model": "folder", "name": "1234567"}
    text = lock_text(manifest, commits, {"name/int8": {"size_bytes": 12}})
    assert text == lock_text(load(folder / "m.yaml"), commits, {"name/int8": {"size_bytes": 12}})
    assert str(folder) not in text, "paths of one machine do not belong into a lock"
    path = folder / "manifest.lock.yaml"
    path.write_text(text)
    lock = read_lock(path)
    assert lock is not None
    assert (lock.manifest, lock.manifest_sha256, lock.commits) == ("small", manifest.sha256, commits)
    assert lock.sources == {"model": "folder:model", "name": "hub:org/name@0123456"}
    assert lock.jobs == tuple(job.key for job in manifest.jobs())
    rows = {f"{row['model']}/{row['target']}": row for row in yaml.safe_load(text)["jobs"]}
    assert rows["name/int8"]["size_bytes"] == 12
    assert (rows["name/int8"]["group_size"], rows["name/int8"]["granularity"]) == (64, "group")
    assert rows["name/int8"]["rules"] == {"lm_head": "BF16", "embed": "F16"}
    assert (rows["name/q8-0"]["imatrix"], rows["name/q8-0"]["metadata"]) == ("file:text.txt", {"general.name": "A"})
    assert rows["name/q8-0"]["search"] == "ggml" and "search" not in rows["name/int8"]
    assert "group_size" not in rows["name/q8-0"] and "damping" not in rows["name/int8"]


@pytest.mark.parametrize("text", ["version: 2\n", "version: 1\n", "version: 1\nmanifest: 3\n", "a: [", "version: [1]"])
def test_a_damaged_lock_is_refused_with_the_way_out(folder: Path, text: str) -> None:
    path = folder / "damaged.lock.yaml"
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_lock(path)
    assert all(line.startswith(f"{path}:1:") for line in caught.value.problems)


def test_no_lock_is_none(folder: Path) -> None:
    assert read_lock(folder / "nothing.lock.yaml") is None
