"""A whole run from a hub to a hub over HTTP: the real client, real processes, a server that speaks the protocol."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from converter.calibration import digest
from converter.cli import NOTHING_TO_DO
from converter.manifest import load
from hub_server import WRITER, HubServer, hub_server
from jobs.planner import Work
from jobs.prepare import prepare
from jobs.store import Store
from jobs.texts import text_rows
from patience import PATIENCE_SECONDS
from small_run import ROOT, TARGETS, write_model

__all__ = ["hub_server"]  # a fixture

MORE = "source: hub:owner/small}, {source: hub:owner/missing}, {source: hub:owner/shut}]"
MANIFEST = """
name: hubs
models: [{{source: hub:owner/small}}]
targets:
  q8-0: {q8}
  int8: {int8}
calibration: {{sequences: 4, length: 64}}
evaluation: {{sequences: 2, length: 64}}
publish: {{hub: hf, repo: "owner/{{model}}-{{target}}"}}
"""


def environment(server: HubServer, token: str | None = WRITER) -> dict[str, str]:
    """What tells a process of the hub."""
    found = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    found |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(ROOT / "no-such-home")}
    return found | ({"HF_TOKEN": token} if token else {})


def hubmill(server: HubServer, *arguments: object, token: str | None = WRITER) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "converter.cli", *map(str, arguments)]
    settings = environment(server, token)
    return subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=ROOT, timeout=PATIENCE_SECONDS, check=False
    )


@pytest.fixture
def manifest(hub_server: HubServer, tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model")
    hub_server.add("owner/small", {path.name: path.read_bytes() for path in folder.iterdir()})
    path = tmp_path / "hubs.yaml"
    path.write_text(MANIFEST.format(q8=TARGETS["q8-0"], int8=TARGETS["int8"]))
    return path


def test_a_model_goes_from_hub_to_hub_once_and_follows_new_commits(
    hub_server: HubServer, manifest: Path, tmp_path: Path
) -> None:
    arguments = ("convert", manifest, "--out", tmp_path / "out", "--executor", "inprocess", "--json")
    for method, path in (("GET", "/api/models/"), ("GET", r"\.safetensors$"), ("POST", "/commit/main")):
        hub_server.fail(method, path, status=429, headers={"Retry-After": "1"}, skip=int("safetensors" in path))
    first = hubmill(hub_server, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "out" / "hubs"
    notes = [json.loads(line) for line in first.stdout.splitlines() if '"state": "note"' in line]
    waited = [note["task"].partition("-")[0] for note in notes if note["note"].endswith("goes on in 1 s")]
    assert waited == ["plan", "fetch", "publish"], "each wait that a hub asks for is told"
    assert (run / ".work" / "events.jsonl").read_text().count("goes on in 1 s") == 2, "and is in the log"
    for kind, target in (("models", "q8-0"), ("datasets", "int8")):
        folder = run / "small" / target
        ours = {path.name: path.read_bytes() for path in folder.iterdir()}
        theirs = hub_server.files(f"owner/small-{target}", kind)
        assert {name: theirs[name] for name in ours} == ours
    assert "base_model: owner/small" in (run / "small" / "q8-0" / "README.md").read_text().replace('"', "")
    commits = len(hub_server.requests("POST", "/commit/"))

    asked = len(hub_server.log)
    again = hubmill(hub_server, *arguments)
    assert again.returncode == 0
    assert [json.loads(line)["note"] for line in again.stdout.splitlines()] == [NOTHING_TO_DO]
    paths = [entry.path for entry in hub_server.log[asked:] if "agent-harnesses" not in entry.path]  # the client's own
    assert paths == ["/api/models/owner/small/revision/main"], "the hub is asked for the commit, and nothing else"
    (run / ".work" / "settled.json").unlink()
    planned = hubmill(hub_server, *arguments)
    assert planned.returncode == 0
    assert '"publish-' not in planned.stdout and '"fetch-' not in planned.stdout, "nothing is done twice"
    assert len(hub_server.requests("POST", "/commit/")) == commits

    newer = write_model(tmp_path / "newer", seed=5)
    commit = hub_server.add("owner/small", {path.name: path.read_bytes() for path in newer.iterdir()})
    third = hubmill(hub_server, *arguments)
    assert third.returncode == 0, third.stdout + third.stderr
    assert commit in (run / "manifest.lock.yaml").read_text()
    assert [folder.name for folder in (run / ".work" / "hub" / "owner--small").iterdir()] == [commit], "old ones go"
    assert len(hub_server.requests("POST", "/commit/")) == commits + 2


def test_a_run_that_is_killed_while_it_publishes_is_completed_and_not_doubled(
    hub_server: HubServer, manifest: Path, tmp_path: Path
) -> None:
    """Killed when its first commit has landed and is not answered, and then when its second one is on its way."""
    command = [sys.executable, "-m", "converter.cli", "convert", str(manifest), "--out", str(tmp_path / "out")]
    command += ["--executor", "inprocess", "--json"]
    for fault in ({"stall": PATIENCE_SECONDS}, {"stall": PATIENCE_SECONDS, "status": 503}):
        seen = len(hub_server.requests("POST", "/commit/"))
        hub_server.fail("POST", "/commit/main", **fault)  # type: ignore[arg-type]
        process = subprocess.Popen(command, env=environment(hub_server), cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + PATIENCE_SECONDS
            while len(hub_server.requests("POST", "/commit/")) == seen:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    last = hubmill(hub_server, *command[3:])
    assert last.returncode == 0, last.stdout + last.stderr
    for kind, target in (("models", "q8-0"), ("datasets", "int8")):
        place = hub_server.repos[kind, f"owner/small-{target}"]
        folder = tmp_path / "out" / "hubs" / "small" / target
        assert hub_server.files(f"owner/small-{target}", kind) == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }
        assert len(place.commits) == 2, "the one that made the repo, and ours"


def test_missing_rights_and_models_are_refused_before_any_work(
    hub_server: HubServer, manifest: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nobody = hubmill(hub_server, "convert", manifest, "--out", out, token=None)
    assert nobody.returncode == 3
    assert "HF_TOKEN" in nobody.stderr
    hub_server.add("owner/small-q8-0", {"model.safetensors": b"somebody's weights"})
    hub_server.add("owner/small-int8", {}, kind="datasets")
    hub_server.repos["datasets", "owner/small-int8"].writable = False
    hub_server.add("owner/shut", {"config.json": b"{}", "model.safetensors": b"x"}, gated=True)
    hub_server.repos["models", "owner/shut"].accepted = False
    manifest.write_text(manifest.read_text().replace("source: hub:owner/small}]", MORE))
    refused = hubmill(hub_server, "plan", manifest, "--out", out)
    assert refused.returncode == 3
    for what in ("owner/missing", "owner/shut is gated", "did not put there", "may not write to owner/small-int8"):
        assert what in refused.stderr, refused.stderr
    assert not (out / "hubs" / "comparison.json").exists()


def test_the_plan_reads_headers_only_and_tells_the_licence(
    hub_server: HubServer, manifest: Path, tmp_path: Path
) -> None:
    place = hub_server.repos["models", "owner/small"]
    place.commit(place.commits[place.head] | {"README.md": b"---\nlicense: apache-2.0\n---\n"})
    place.gated = True
    planned = hubmill(hub_server, "plan", manifest, "--out", tmp_path / "out", "--json")
    assert planned.returncode == 0, planned.stderr
    jobs = {job["job"]: job for job in json.loads(planned.stdout)["jobs"]}
    assert jobs["small/q8-0"]["exact"]
    assert {tensor["type"] for tensor in jobs["small/q8-0"]["tensors"]} == {"Q8_0", "F32"}
    assert all(entry.range for entry in hub_server.requests("GET", r"\.safetensors$"))
    (model,) = json.loads(planned.stdout)["models"]
    assert (model["commit"], model["licence"]) == (hub_server.repos["models", "owner/small"].head, "apache-2.0")
    assert "who loads an artifact accepts no terms" in model["notes"][0], "it is gated"


DATA_SETS = """
name: sets
models: [{{source: hub:owner/small}}]
targets:
  q4-k-m: {q4}
  int8: {int8}
calibration: {{text: "hub:org/pages#page", sequences: 4, length: 64}}
evaluation: {{text: hub:org/talks#messages, sequences: 2, length: 64}}
"""


def add_pages(server: HubServer, word: str) -> str:
    file = io.BytesIO()
    pq.write_table(pa.table({"page": [f"{word} {n} stands on this page" for n in range(500)]}), file)
    return server.add("org/pages", {"data/train-00000.parquet": file.getvalue()}, kind="datasets")


def add_talks(server: HubServer) -> str:
    talks = [[{"role": "user", "content": f"What is {n} and {n}?"}] for n in range(100)]
    lines = "\n".join(json.dumps({"messages": talk}) for talk in talks)
    return server.add("org/talks", {"train.jsonl": b"{}", "test.jsonl": lines.encode()}, kind="datasets")


@pytest.fixture
def data_sets(hub_server: HubServer, manifest: Path) -> Path:
    manifest.write_text(DATA_SETS.format(q4=TARGETS["q4-k-m"], int8=TARGETS["int8"]))
    return manifest


def test_text_from_data_sets_is_pinned_in_the_lock_and_followed(
    hub_server: HubServer, data_sets: Path, tmp_path: Path
) -> None:
    pages, talks = add_pages(hub_server, "Nothing"), add_talks(hub_server)
    arguments = ("convert", data_sets, "--out", tmp_path / "out", "--executor", "inprocess", "--json")
    first = hubmill(hub_server, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "out" / "sets"
    texts = {"calibration": f"hub:org/pages@{pages}#page", "evaluation": f"hub:org/talks@{talks}#messages"}
    for name, content in (
        ("lock", yaml.safe_load((run / "manifest.lock.yaml").read_text())),
        ("comparison", json.loads((run / "comparison.json").read_text())["texts"]),
    ):
        assert {part: content[part]["text"] for part in texts} == texts, name
    assert len(hub_server.requests("GET", r"/datasets/org/pages/resolve/")) == 1, "all tasks read the same file"

    newer = add_pages(hub_server, "Everything")
    assert newer != pages
    again = hubmill(hub_server, *arguments)
    done = {json.loads(line)["task"] for line in again.stdout.splitlines() if '"done"' in line}
    assert again.returncode == 0, again.stdout + again.stderr
    assert any("calibrate" in task for task in done) and not any("int8" in task for task in done)
    assert newer in (run / "manifest.lock.yaml").read_text()


def test_tasks_read_the_commit_that_was_planned(
    hub_server: HubServer, data_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = hub_server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    add_pages(hub_server, "Nothing")
    add_talks(hub_server)
    written, store = load(data_sets), Store(run=tmp_path / "run")
    prepared = prepare(written, written.jobs(), store, 1, "cpu")
    assert not prepared.problems
    add_pages(hub_server, "Everything")
    works = [task.work for task in prepared.plan.graph.tasks.values()]
    assert works
    for work in works:
        assert isinstance(work, Work)
        rows = text_rows(work.texts.calibration, work.model.snapshot.folder, "small", store.downloads)
        assert digest(rows) == work.texts.calibration_sha256
    assert prepare(written, written.jobs(), store, 1, "cpu").plan.graph.tasks.keys() != prepared.plan.graph.tasks.keys()


def test_a_data_set_that_is_missing_refuses_every_job_that_needs_it(
    hub_server: HubServer, data_sets: Path, tmp_path: Path
) -> None:
    add_pages(hub_server, "Nothing")
    planned = hubmill(hub_server, "plan", data_sets, "--out", tmp_path / "out")
    assert planned.returncode == 3, planned.stderr
    assert "shows no datasets/org/talks" in planned.stderr
    hub_server.add("org/talks", {"a.jsonl": b'{"message": "hi"}'}, kind="datasets")
    planned = hubmill(hub_server, "plan", data_sets, "--out", tmp_path / "out")
    assert planned.returncode == 3, planned.stderr
    assert "Did you mean #message?" in planned.stderr
