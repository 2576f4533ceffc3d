"""Tokens go from the environment into requests and nowhere else: not to disks, screens, arguments, nor Ray's state."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path

import pytest
from ray._raylet import GcsClientOptions, GlobalStateAccessor

from converter.errors import SourceError
from converter.hub import resolve
from hub_server import WRITER, HubServer, hub_server
from jobs.cluster import PREFIX, _worker_environment
from small_run import ROOT, TARGETS, write_model
from test_run_hub import environment

__all__ = ["hub_server"]  # a fixture

SECRETS = (WRITER.encode(), b"hunter2", b"Bearer hf_")
MANIFEST = """
name: hubs
models: [{{source: hub:owner/small}}]
targets: {{q8-0: {q8}, int8: {int8}}}
calibration: {{text: "hub:org/pages#page", sequences: 4, length: 64}}
evaluation: {{sequences: 2, length: 64}}
publish: {{hub: hf, repo: "owner/{{model}}-{{target}}", collection: "owner/Small ones"}}
"""


@pytest.fixture
def manifest(hub_server: HubServer, tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model")
    hub_server.add("owner/small", {path.name: path.read_bytes() for path in folder.iterdir()}, gated=True)
    lines = b"".join(b'{"page": "Nothing stands on page %d of this book."}\n' % n for n in range(400))
    hub_server.add("org/pages", {"train.jsonl": lines}, kind="datasets")
    path = tmp_path / "hubs.yaml"
    path.write_text(MANIFEST.format(q8=TARGETS["q8-0"], int8=TARGETS["int8"]))
    return path


def found_in(paths: Iterable[Path]) -> list[Path]:
    """The files that hold a secret."""
    held = []
    for path in paths:
        with contextlib.suppress(OSError):
            if path.is_file() and any(secret in path.read_bytes() for secret in SECRETS):
                held.append(path)
    return held


def run_and_look(server: HubServer, command: list[str], tmp_path: Path) -> set[bytes]:
    """Run hubmill with a home, a cache and a folder for temporary files of its own, and look everywhere meanwhile and
    afterwards; gives what Ray's state held."""
    settings = environment(server) | {"HUBMILL_KEY_PASSWORD": "hunter2"}
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        settings[name] = str(tmp_path / name)
    before, state = set(Path("/tmp").glob(f"{PREFIX}*")), set[bytes]()
    with (tmp_path / "said").open("wb") as file:
        process = subprocess.Popen(command, env=settings, cwd=ROOT, stdout=file, stderr=file)
        try:
            while process.poll() is None:
                assert not found_in(Path("/proc").glob("[0-9]*/cmdline"))
                for place in set(Path("/tmp").glob(f"{PREFIX}*")) - before:
                    assert not found_in(place.rglob("*"))
                    state |= ray_state(place)
                time.sleep(0.3)
        finally:
            process.kill()
    assert process.returncode == 0, (tmp_path / "said").read_text()
    assert not found_in(tmp_path.rglob("*"))
    assert b"small" in (tmp_path / "said").read_bytes()
    return state


def ray_state(session: Path) -> set[bytes]:
    """What the cluster of a session knows of jobs, tasks, workers, actors and nodes; empty until it is up."""
    lines = [
        path.read_bytes().decode(errors="replace") for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)
    ]
    address = next(
        (m[1] for line in lines if str(session) in line and (m := re.search(r"gcs-address=([\d.:]+)", line))), ""
    )
    if not address:
        return set()
    asked = GlobalStateAccessor(
        GcsClientOptions.create(address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=True)
    )
    if not asked.connect():
        return set()
    tables = [asked.get_job_table(), asked.get_task_events(), asked.get_worker_table(), asked.get_node_table()]
    entries = [entry for table in (*tables, asked.get_actor_table(None, None)) for entry in table]
    return {entry if isinstance(entry, bytes) else repr(entry).encode() for entry in entries}


def readable(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.read_bytes())
    return False


@pytest.mark.slow
def test_a_run_in_one_process_leaves_no_token(hub_server: HubServer, manifest: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "converter.cli",
        "convert",
        str(manifest),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    run_and_look(hub_server, [*command, "--executor", "inprocess"], tmp_path)
    assert any(request.token == WRITER for request in hub_server.requests("POST", "/commit/")), "it was used"


@pytest.mark.ray
def test_a_run_on_ray_leaves_no_token_in_its_state_either(
    hub_server: HubServer, manifest: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "converter.cli",
        "convert",
        str(manifest),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    state = run_and_look(hub_server, command, tmp_path)
    assert any(request.token == WRITER for request in hub_server.requests("POST", "/commit/")), "it was used"
    assert any(hub_server.url.encode() in entry for entry in state), "the job's environment was looked at"
    assert any(b"quantize" in entry or b"round" in entry for entry in state), "and its tasks"
    assert not [entry for entry in state if any(secret in entry for secret in SECRETS)]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_what_a_hub_answers_is_not_repeated(
    status: int,
    hub_server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An answer may quote the request's headers, or an address that is signed."""
    monkeypatch.setattr("converter.hub_calls.WAITS", ())
    echo = {"X-Error-Message": f"Bearer {WRITER}", "X-Error-Code": f"Bearer {WRITER}", "X-Request-Id": WRITER}
    hub_server.fail("GET", "/api/models/", status=status, headers=echo, times=9)
    with pytest.raises(SourceError) as caught:
        resolve("hub:owner/small", tmp_path, "test", endpoint=hub_server.url, token=WRITER)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert not any(secret in told.encode() for secret in SECRETS), told


def test_workers_are_not_sent_an_address_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    assert _worker_environment()["HF_ENDPOINT"] == "https://hub.example"
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hunter2@hub.example")
    assert "HF_ENDPOINT" not in _worker_environment()
    monkeypatch.setenv("HF_TOKEN", WRITER)
    assert WRITER not in str(_worker_environment())
