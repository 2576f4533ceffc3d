"""Reading models from a hub: real HTTP to `hub_server`, which speaks the protocol and fails on demand."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from safetensors.torch import save

from converter import hub
from converter.errors import SourceError
from converter.hub import fetch, resolve
from converter.hub_calls import TOGETHER
from hub_server import READER, HubServer, hub_server
from patience import PATIENCE_SECONDS

__all__ = ["hub_server"]  # a fixture
WEIGHTS = r"\.safetensors$"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds, which a real hub needs, would only make these tests slow."""
    monkeypatch.setattr("converter.hub_calls.WAITS", (0.01, 0.01, 0.01))


def model_files(tensors: int = 3, rows: int = 64) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer.{n}.weight": torch.randn(rows, 256, generator=generator) for n in range(tensors)}
    names = list(weights)
    first, second = save({name: weights[name] for name in names[:1]}), save({name: weights[name] for name in names[1:]})
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: shards[0] if name == names[0] else shards[1] for name in names}
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        shards[0]: first,
        shards[1]: second,
        "pytorch_model.bin": b"not to be fetched",
    }


def test_resolve_pins_the_commit_and_downloads_no_weight(hub_server: HubServer, tmp_path: Path) -> None:
    commit = hub_server.add("owner/model", model_files(rows=1024))
    hub_server.add("owner/model", model_files() | {"config.json": b'{"model_type": "later"}'})
    snapshot = resolve(f"hub:owner/model@{commit}", tmp_path, "test", endpoint=hub_server.url)
    assert (snapshot.commit, snapshot.repo, snapshot.source) == (commit, "owner/model", "hub:owner/model")
    assert snapshot.config == {"model_type": "llama"}
    assert {name: header.shape for name, header in snapshot.tensors.items()} == {
        f"layer.{n}.weight": (1024, 256) for n in range(3)
    }
    assert (snapshot.folder / "tokenizer.json").read_bytes() == b"{}"
    assert not list(snapshot.folder.rglob("*.safetensors"))
    requests = hub_server.requests("GET", WEIGHTS)
    assert len(requests) == 2 and all(entry.range == "bytes=0-99999" and entry.sent == 100_000 for entry in requests)
    assert all(f"/resolve/{commit}/" in entry.path for entry in hub_server.requests("GET", "/resolve/"))
    assert not hub_server.requests("GET", "pytorch_model")


def test_header_longer_than_the_first_read_comes_whole(hub_server: HubServer, tmp_path: Path) -> None:
    weights = {f"a.layer.with.quite.a.long.name.{n}.weight": torch.zeros(1) for n in range(1500)}
    hub_server.add("owner/model", {"model.safetensors": save(weights)})
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    assert set(snapshot.tensors) == set(weights)
    ranges = [entry.range for entry in hub_server.requests("GET", WEIGHTS)]
    assert len(ranges) == 2 and ranges[1] is not None and ranges[1].startswith("bytes=100000-")


def test_fetched_weights_are_the_hubs_and_a_second_fetch_asks_for_nothing(
    hub_server: HubServer, tmp_path: Path
) -> None:
    files = model_files()
    hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path / "driver", "test", endpoint=hub_server.url)
    received: list[int] = []
    fetched = fetch(snapshot, tmp_path / "worker", "test", endpoint=hub_server.url, report=received.append)
    for name, data in files.items():
        path = fetched.folder / name
        assert not path.exists() if name == "pytorch_model.bin" else path.read_bytes() == data
    assert fetched.read("layer.2.weight").shape == (64, 256)
    assert sum(received) == sum(len(data) for name, data in files.items() if name != "pytorch_model.bin")
    count = len(hub_server.log)
    assert fetch(fetched, tmp_path / "worker", "test", endpoint=hub_server.url) == fetched
    assert len(hub_server.log) == count


def test_killed_download_goes_on_where_it_stopped(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files(rows=1024))
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    hub_server.log.clear()
    second = "model-00002-of-00002.safetensors"
    # The first try is cut, and to each further one the hub is busy until the process gives up.
    hub_server.fail("GET", second, cut_after=1_200_000)
    hub_server.fail("GET", second, status=503, times=3)
    with pytest.raises(SourceError, match=r"503"):
        fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    part = snapshot.folder / ".parts" / f"{second}.part"
    there = part.stat().st_size
    assert 0 < there <= 1_200_000 and not (snapshot.folder / second).exists()
    hub_server.log.clear()
    fetched = fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    assert [entry.range for entry in hub_server.requests("GET", second)] == [f"bytes={there}-"]
    assert hashlib.sha256((fetched.folder / second).read_bytes()).hexdigest() in snapshot.checksums[second]


def test_interrupted_fetch_stops_at_once_and_goes_on_later(hub_server: HubServer, tmp_path: Path) -> None:
    files = model_files(tensors=2, rows=16384)  # two shards of 16 MiB, which come in pieces of one
    hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    received: list[int] = []

    def interrupt(count: int) -> None:
        received.append(count)
        if len(received) == 4:
            raise KeyboardInterrupt
        time.sleep(0.03)  # a line so slow that the other shard cannot end before it is stopped

    with pytest.raises(KeyboardInterrupt):
        fetch(snapshot, tmp_path, "test", endpoint=hub_server.url, report=interrupt)
    assert len(received) < 14
    rest: list[int] = []
    fetch(snapshot, tmp_path, "test", endpoint=hub_server.url, report=rest.append)
    assert sum(rest) < sum(len(data) for data in files.values()) - (2 << 20)


def test_damaged_remainder_is_fetched_anew(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files())
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    part = snapshot.folder / ".parts" / "model-00001-of-00002.safetensors.part"
    part.write_bytes(b"rubbish")
    assert fetch(snapshot, tmp_path, "test", endpoint=hub_server.url).read("layer.0.weight").shape == (64, 256)


def test_file_that_is_not_what_the_hub_states_is_refused(hub_server: HubServer, tmp_path: Path) -> None:
    files = model_files()
    commit = hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    name = "model-00001-of-00002.safetensors"
    hub_server.repos["models", "owner/model"].commits[commit][name] = files[name][:-1] + b"?"
    with pytest.raises(SourceError, match="another checksum than the hub states, twice"):
        fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    assert not (snapshot.folder / name).exists()


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tokenizer.json"])
def test_file_that_was_damaged_on_the_way_is_fetched_anew(hub_server: HubServer, tmp_path: Path, name: str) -> None:
    """By its sha256 where the hub keeps it in LFS, and by git's sha1 where it does not."""
    files = model_files()
    hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path / "plan", "test", endpoint=hub_server.url)
    hub_server.fail("GET", f"/resolve/.*{name}", damage=True)
    notes: list[str] = []
    fetched = fetch(snapshot, tmp_path / "work", "test", endpoint=hub_server.url, tell=notes.append)
    assert (fetched.folder / name).read_bytes() == files[name]
    assert notes == [f"{name} arrived with another checksum than the hub states: it is fetched anew"]


def test_hub_that_stands_still_is_asked_again_and_the_download_goes_on(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = model_files(rows=4096)
    hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    monkeypatch.setattr("converter.hub.TIMEOUT", 0.3)
    hub_server.log.clear()
    second = "model-00002-of-00002.safetensors"
    hub_server.fail("GET", second, cut_after=3_000_000, stall=1.5)
    fetched = fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    assert (fetched.folder / second).read_bytes() == files[second]
    first, again = [entry.range for entry in hub_server.requests("GET", second)]
    assert first is None and again is not None and int(again[len("bytes=") : -1]) >= 2 << 20


DOWNLOADER = """
import sys
from pathlib import Path
from converter.hub import fetch, resolve
snapshot = resolve("hub:owner/model", Path(sys.argv[2]), "test", endpoint=sys.argv[1])
fetch(snapshot, Path(sys.argv[2]), "test", endpoint=sys.argv[1])
"""


def test_download_whose_process_was_killed_goes_on_where_it_stopped(hub_server: HubServer, tmp_path: Path) -> None:
    files = model_files(rows=4096)
    hub_server.add("owner/model", files)
    second = "model-00002-of-00002.safetensors"
    commit = hub_server.repos["models", "owner/model"].head
    part = tmp_path / "owner--model" / commit / ".parts" / f"{second}.part"
    command = [sys.executable, "-c", DOWNLOADER, hub_server.url, str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    # The plan reads the file's header first, and then comes the download, which stops in the middle of the file.
    hub_server.fail("GET", second, skip=1, cut_after=3_000_000, stall=PATIENCE_SECONDS)
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not part.exists() or part.stat().st_size < 2 << 20:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    there = part.stat().st_size
    hub_server.log.clear()
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    fetched = fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    assert (fetched.folder / second).read_bytes() == files[second]
    assert f"bytes={there}-" in [entry.range for entry in hub_server.requests("GET", second)]


def test_token_is_not_sent_where_a_download_is_redirected_to(hub_server: HubServer, tmp_path: Path) -> None:
    files = model_files()
    hub_server.add("owner/model", files)
    hub_server.cdn = hub_server.url.replace("127.0.0.1", "localhost")
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url, token=READER)
    fetched = fetch(snapshot, tmp_path, "test", endpoint=hub_server.url, token=READER)
    name = "model-00001-of-00002.safetensors"
    assert (fetched.folder / name).read_bytes() == files[name]
    redirected = hub_server.requests("GET", "^/_cdn/")
    assert redirected and all(entry.token is None and "localhost" in entry.host for entry in redirected)
    assert all(entry.token == READER for entry in hub_server.log if entry not in redirected)


def test_signed_address_is_in_no_message(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files())
    hub_server.cdn = hub_server.url.replace("127.0.0.1", "localhost")
    hub_server.fail("GET", "^/_cdn/", status=500, times=99)
    with pytest.raises(SourceError, match=r"\(500\)") as caught:
        resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url, token=READER)
    assert "Signature" not in repr(caught.value) and caught.value.__cause__ is None


def test_no_more_than_a_few_files_are_downloaded_at_a_time(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_server.add("owner/model", model_files() | {f"text-{n}.txt": b"text" for n in range(20)})
    most, running, alone = 0, 0, Lock()
    ask = hub.Remote.stream

    @contextmanager
    def counted(*arguments: Any) -> Iterator[Any]:
        nonlocal most, running
        with alone:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        try:
            with ask(*arguments) as answer:
                yield answer
        finally:
            with alone:
                running -= 1

    monkeypatch.setattr(hub.Remote, "stream", counted)
    resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    assert most == TOGETHER


def test_cut_connection_and_busy_hub_are_waited_out(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files(rows=1024))
    hub_server.fail("GET", "/api/models/", status=503)
    hub_server.fail("GET", WEIGHTS, cut_after=10)
    hub_server.fail("GET", "tokenizer.json", status=429, headers={"Retry-After": "0"})
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    hub_server.fail("GET", WEIGHTS, cut_after=300_000, times=3)
    assert fetch(snapshot, tmp_path, "test", endpoint=hub_server.url).read("layer.1.weight").shape == (1024, 256)


def test_wait_is_the_one_that_the_hub_names(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("converter.hub_calls.pause", lambda seconds, stop: waits.append(seconds))
    hub_server.add("owner/model", model_files())
    hub_server.fail("GET", "/api/models/", status=429, headers={"RateLimit": '"api";r=0;t=55'})
    hub_server.fail("GET", "/api/models/", status=429, headers={"Retry-After": "7"})
    hub_server.fail("GET", "/api/models/", status=429, headers={"Retry-After": "soon"})
    resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    assert waits == [55.0, 7.0, 0.01]
    hub_server.fail("GET", "/api/models/", status=503, headers={"Retry-After": "301"})
    with pytest.raises(SourceError, match=r"asks to come back in 301 s \(503\)"):
        resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    assert len(waits) == 3, "too early a try would only count against the same limit"


@pytest.mark.parametrize(
    ("method", "pattern", "status", "headers", "what", "remedy"),
    [
        ("GET", "/api/models/", 401, {}, r"does not accept the token|shows no owner/model", "HF_TOKEN"),
        ("GET", "/api/models/", 403, {}, r"\(403\)", "access"),
        (
            "GET",
            "/api/models/",
            404,
            {"X-Error-Code": "RepoNotFound"},
            r"shows no owner/model \(404\)",
            "Check the name",
        ),
        ("GET", "/api/models/", 429, {}, r"slow down \(429\)", "five minutes"),
        ("GET", "/api/models/", 503, {}, r"\(503\)", "later"),
        ("GET", WEIGHTS, 404, {"X-Error-Code": "EntryNotFound"}, "is gone", "Run it again"),
        ("GET", WEIGHTS, 403, {"X-Error-Code": "GatedRepo"}, "gated", "Accept its terms"),
    ],
)
def test_refusal_says_what_to_do_and_keeps_the_token_secret(
    hub_server: HubServer,
    tmp_path: Path,
    method: str,
    pattern: str,
    status: int,
    headers: dict[str, str],
    what: str,
    remedy: str,
) -> None:
    hub_server.add("owner/model", model_files())
    hub_server.fail(method, pattern, status=status, headers=headers, times=99)
    with pytest.raises(SourceError) as caught:
        resolve("hub:owner/model", tmp_path, "model 3", endpoint=hub_server.url, token=READER)
    assert caught.value.where.startswith("model 3")
    assert re.search(what, caught.value.what) and remedy in caught.value.remedy
    assert READER not in repr(caught.value) and caught.value.__cause__ is None
    assert hub_server.log[0].token == READER


def test_gated_private_and_unknown_models_and_revisions_are_told_apart(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/gated", model_files(), gated=True)
    hub_server.add("owner/private", model_files())
    hub_server.repos["models", "owner/private"].private = True
    messages = {}
    for name in ("gated", "private", "none", "gated@v9"):
        with pytest.raises(SourceError) as caught:
            resolve(f"hub:owner/{name}", tmp_path, "test", endpoint=hub_server.url)
        messages[name] = str(caught.value)
    assert "gated" in messages["gated"] and f"{hub_server.url}/owner/gated" in messages["gated"]
    assert "no such revision" in messages["gated@v9"]
    assert "if it is private, set HF_TOKEN" in messages["private"] and "Check the name" in messages["none"]
    assert resolve("hub:owner/private", tmp_path, "test", endpoint=hub_server.url, token=READER).tensors


def test_unreachable_hub_and_cut_connection_are_source_errors(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files())
    hub_server.fail("GET", WEIGHTS, cut_after=5, times=99)
    with pytest.raises(SourceError, match=r"was cut \(RemoteProtocolError\)"):
        resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    with pytest.raises(SourceError, match="was cut"):
        resolve("hub:owner/model", tmp_path, "test", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil.json", "a/../../evil.json", "a\\..\\evil.json", "e\0.json"]
)
def test_file_names_that_leave_the_folder_are_refused(hub_server: HubServer, tmp_path: Path, name: str) -> None:
    hub_server.add("owner/model", model_files() | {name: b"{}"})
    with pytest.raises(SourceError, match="could lead out of the model's folder"):
        resolve("hub:owner/model", tmp_path / "cache", "test", endpoint=hub_server.url)
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("source", ["owner/model", "hub:", "s3:owner/model", "hub:owner/model/extra", "hub:a b"])
def test_source_that_is_none_is_refused(hub_server: HubServer, tmp_path: Path, source: str) -> None:
    with pytest.raises(SourceError):
        resolve(source, tmp_path, "test", endpoint=hub_server.url)


def test_hub_that_knows_no_ranges_still_serves(hub_server: HubServer, tmp_path: Path) -> None:
    files = model_files(rows=1024)
    hub_server.add("owner/model", files)
    hub_server.ranges = False
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    name = "model-00001-of-00002.safetensors"
    (snapshot.folder / ".parts" / f"{name}.part").write_bytes(files[name][:1000])
    hub_server.log.clear()
    assert (fetch(snapshot, tmp_path, "test", endpoint=hub_server.url).folder / name).read_bytes() == files[name]
    assert len(hub_server.requests("GET", name)) == 1


def test_file_that_ends_early_without_an_error_is_a_cut(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("owner/model", model_files())
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    hub_server.fail("GET", WEIGHTS, status=200, times=9)  # a proxy's empty page
    with pytest.raises(SourceError, match="was cut"):
        fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)


@pytest.mark.parametrize("status", [404, 500])
def test_password_in_the_address_of_a_hub_is_not_shown(hub_server: HubServer, tmp_path: Path, status: int) -> None:
    hub_server.fail("GET", "/api/", status=status, times=9)
    address = hub_server.url.replace("//", "//user:secret@")
    with pytest.raises(SourceError) as caught:
        resolve("hub:owner/model", tmp_path, "test", endpoint=address)
    assert "secret" not in repr(caught.value) and "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"a": b"a file", "a/config.json": b"below it"},
        {"x" * 300 + ".json": b"a name too long for a disk"},
        {"/".join(["deep"] * 2000) + "/a.json": b"a path too long"},
    ],
)
def test_listing_that_no_disk_can_hold_is_an_error_and_no_crash(
    hub_server: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    hub_server.add("owner/model", model_files() | files)
    with pytest.raises(SourceError, match="cannot be read or written"):
        resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)


def test_file_that_is_longer_than_the_hub_states_fills_no_disk(hub_server: HubServer, tmp_path: Path) -> None:
    """More than its listing states is not written, and what is written has another checksum."""
    files = model_files()
    commit = hub_server.add("owner/model", files)
    snapshot = resolve("hub:owner/model", tmp_path, "test", endpoint=hub_server.url)
    name = "model-00001-of-00002.safetensors"
    hub_server.repos["models", "owner/model"].commits[commit][name] = b"x" * (len(files[name]) + (8 << 20))
    with pytest.raises(SourceError, match="another checksum"):
        fetch(snapshot, tmp_path, "test", endpoint=hub_server.url)
    assert not list(snapshot.folder.rglob(f"*{name}*.part"))
