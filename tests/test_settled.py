"""A run that finds nothing changed says so in a moment; and whatever a run depends on, a change of it is noticed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import jobs.convert
from converter import manifest as manifests
from converter.cli import NOTHING_TO_DO
from jobs import settled
from jobs.convert import Run, convert
from jobs.store import Store
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_manifest, write_model
from test_layer_report import Quiet
from test_status import LOOK


def write_everything(folder: Path) -> Path:
    """A manifest that depends on a folder, a text, an imatrix file, a key and a folder to publish to."""
    (folder / "model").mkdir()
    for name in ("model/config.json", "text.txt", "importance.gguf", "key.pem"):
        (folder / name).write_text(name)
    targets = {"q4-k-m": "{format: gguf, type: Q4_K_M, imatrix: importance.gguf}"}
    path = write_manifest(folder, targets, "publish: {hub: folder:hub, sign: {key: key.pem}}")
    path.write_text(path.read_text().replace("calibration: {", "calibration: {text: file:text.txt, "))
    return path


def run_folder(folder: Path, path: Path) -> Store:
    """What a run of that manifest that did everything leaves."""
    store = Store(run=folder / "out" / "small")
    for place in (store.run / "model" / "q4-k-m", folder / "hub" / "model-q4-k-m", store.work):
        place.mkdir(parents=True)
    (store.run / "model" / "q4-k-m" / "model.gguf").write_bytes(b"GGUF")
    settled.note(store, settled.depends(manifests.load(path), "cpu", lambda source: settled._commit(source, print)))
    return store


def unchanged(store: Store, path: Path, device: str = "cpu") -> bool:
    return settled.unchanged(store, manifests.load(path), device, print)


def older_torch(name: str) -> str:
    return "2.0" if name == "torch" else "1"


CHANGES: dict[str, Callable[[Path], object]] = {
    "a byte of the manifest": lambda place: (place / "small.yaml").open("a").write("# more\n"),
    "a file of the model": lambda place: (place / "model" / "config.json").write_text("{}"),
    "a file more in the model": lambda place: (place / "model" / "more.json").write_text("{}"),
    "the text": lambda place: (place / "text.txt").write_text("other.txt"),
    "the imatrix file": lambda place: (place / "importance.gguf").write_text("other"),
    "the key": lambda place: os.utime(place / "key.pem", ns=(1, 1)),
    "an artifact's file is cut": lambda place: os.truncate(place / "out/small/model/q4-k-m/model.gguf", 3),
    "an artifact's file is written to": lambda place: os.utime(place / "out/small/model/q4-k-m/model.gguf", ns=(1, 1)),
    "an artifact is gone": lambda place: shutil.rmtree(place / "out/small/model"),
    "the published one is gone": lambda place: shutil.rmtree(place / "hub" / "model-q4-k-m"),
    "the state is gone": lambda place: shutil.rmtree(place / "out/small/.work"),
    "the notes are damaged": lambda place: (place / "out/small/.work/settled.json").write_text('{"wrote": [1]}'),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_noticed(name: str, tmp_path: Path) -> None:
    path = write_everything(tmp_path)
    store = run_folder(tmp_path, path)
    assert unchanged(store, path)
    CHANGES[name](tmp_path)
    assert not unchanged(store, path)


def test_other_code_versions_devices_and_hubs_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_everything(tmp_path)
    store = run_folder(tmp_path, path)
    assert not unchanged(store, path, "cuda") and not unchanged(store, path, "auto")
    with monkeypatch.context() as changed:
        changed.setattr(metadata, "version", older_torch)
        assert not unchanged(store, path)
    with monkeypatch.context() as changed:
        changed.setattr(settled, "CODE", (".py",))  # as if a YAML were gone
        assert not unchanged(store, path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not unchanged(store, path)


def test_what_is_noted_holds_nothing_of_a_key(tmp_path: Path) -> None:
    path = write_everything(tmp_path)
    store = run_folder(tmp_path, path)
    depends = json.loads(store.settled.read_text())["depends"]
    assert depends["key"] == [len("key.pem"), (tmp_path / "key.pem").stat().st_mtime_ns]
    assert {Path(name).name for name in depends["files"]} == {"text.txt", "importance.gguf"}
    assert depends["versions"].keys() > {"torch", "transformers", "ray", "numba", "python"}


def test_a_second_run_says_that_there_is_nothing_to_do_and_imports_nothing_that_computes(tmp_path: Path) -> None:
    write_model(tmp_path / "model", layers=1)
    path = write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    arguments = ["convert", str(path), "--out", str(tmp_path / "out"), "--executor", "inprocess"]

    def convert(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOOK, *arguments, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=PATIENCE_SECONDS, check=False)

    first = convert("--json")
    assert json.loads(first.stdout.splitlines()[-1]) | {"seconds": 0} == {
        "task": "run", "subject": "small", "state": "done", "title": "run", "fraction": 1.0, "seconds": 0
    }  # fmt: skip
    again = convert()
    assert NOTHING_TO_DO in again.stdout and "report.html" in again.stdout
    assert again.stderr.partition("slow:")[2] == "", "no torch, transformers, ray or numba"
    (tmp_path / "model" / "more.json").write_text("{}")
    newer = convert("--json")
    assert NOTHING_TO_DO not in newer.stdout and '"task": "quantize-' in newer.stdout
    assert "torch" in newer.stderr.partition("slow:")[2]


def test_damage_at_the_very_end_of_a_run_is_not_noted_as_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model", layers=1)
    path = write_manifest(tmp_path, {"int8": TARGETS["int8"]})
    run = Run(manifest=manifests.load(path), out=tmp_path / "out", executor="inprocess")
    artifact = run.store.run / "model" / "int8" / "config.json"
    write = jobs.convert.write_results

    def damaging(*given: Any) -> Any:
        rows = write(*given)
        os.truncate(artifact, 3)
        return rows

    monkeypatch.setattr(jobs.convert, "write_results", damaging)
    convert(run, Quiet())
    assert len(artifact.read_bytes()) == 3 and not unchanged(run.store, path)
    monkeypatch.undo()
    convert(run, Quiet())
    assert json.loads(artifact.read_bytes())["model_type"] == "qwen3"
    assert unchanged(run.store, path)
