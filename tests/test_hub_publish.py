"""Publishing to hubs: the real client over HTTP to `hub_server`, which speaks the protocol and fails on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from converter.errors import PublishError
from converter.hub_calls import ANSWER_TIMEOUT, TIMEOUT, session
from converter.hub_publish import HuggingFaceHub
from converter.provenance import Conversion, statement
from converter.publish import Destination, FolderHub, Hub, Kind
from hub_server import FINE, READER, WRITER, HubServer, artifact, contents, hub_server

__all__ = ["hub_server"]  # a fixture


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits of seconds, which a real hub needs, would only make these tests slow."""
    monkeypatch.setattr("converter.hub_calls.WAITS", (0.01, 0.01, 0.01))


CARD = b"---\nquantized_by: hubmill\n---\n# card\n"


def to(repo: str, kind: Kind = "model", **settings: object) -> Destination:
    return Destination(hub="hf", repo=repo, kind=kind, **settings)  # type: ignore[arg-type]


def held(hub: Hub, repo: str, server: HubServer) -> dict[str, bytes]:
    if isinstance(hub, FolderHub):
        return contents(hub.root / repo)
    return server.files(repo)


@pytest.fixture(params=["folder", "http"])
def hub(request: pytest.FixtureRequest, hub_server: HubServer, tmp_path: Path) -> Hub:
    """Both hubs, for what is true of each."""
    if request.param == "folder":
        return FolderHub(root=tmp_path / "hub")
    return HuggingFaceHub(endpoint=hub_server.url, token=WRITER)


def test_hub_holds_exactly_what_was_published_last(hub: Hub, hub_server: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    files = artifact(folder, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9, sub__empty_dot_txt=b"")
    first = hub.publish(to("owner/model"), folder, files, "first")
    assert first.changed and len(first.commit) == 40
    assert held(hub, "owner/model", hub_server) == contents(folder)
    del files["sub/empty.txt"]
    (folder / "sub/empty.txt").unlink()
    files |= artifact(folder, model_dot_gguf=b"GGUF" * 10, new_dot_json=b"{}")
    second = hub.publish(to("owner/model"), folder, files, "second")
    assert second.changed and second.commit != first.commit
    assert held(hub, "owner/model", hub_server) == contents(folder)


def test_second_publish_of_the_same_is_a_no_op(hub: Hub, hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path / "artifact", README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    first = hub.publish(to("owner/model"), tmp_path / "artifact", files, "first")
    hub_server.log.clear()
    second = hub.publish(to("owner/model"), tmp_path / "artifact", files, "again")
    assert (second.commit, second.changed) == (first.commit, False)
    assert not hub_server.requests("POST", "/commit/") and not hub_server.requests("PUT", "")


def test_file_that_changed_since_it_was_measured_publishes_nothing(
    hub: Hub, hub_server: HubServer, tmp_path: Path
) -> None:
    files = artifact(tmp_path / "artifact", README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    first = hub.publish(to("owner/model"), tmp_path / "artifact", files, "first")
    before = held(hub, "owner/model", hub_server)
    (tmp_path / "artifact/README.md").write_bytes(b"# cord")
    files["model.gguf"] = "0" * 64
    with pytest.raises(PublishError, match="sha256 differs"):
        hub.publish(to("owner/model"), tmp_path / "artifact", files, "second")
    assert held(hub, "owner/model", hub_server) == before and first.changed


def test_parquet_goes_to_a_dataset_and_into_a_model_without_a_warning(
    hub_server: HubServer, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    files = artifact(tmp_path / "artifact", tensors_dot_parquet=b"PAR1" * 9)
    assert "/datasets/" in hub.publish(to("owner/d", kind="dataset"), tmp_path / "artifact", files, "first").url
    hub.publish(to("owner/m"), tmp_path / "artifact", files, "first")
    assert hub_server.files("owner/d", "datasets") == hub_server.files("owner/m") == contents(tmp_path / "artifact")
    assert not [warning for warning in recwarn if "data file" in str(warning.message)]


def test_large_file_in_parts_and_a_busy_store_arrive_in_one_commit(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.part_bytes = 1000
    data = bytes(range(256)) * 10
    files = artifact(tmp_path, a_dot_gguf=data, b_dot_gguf=b"small", README_dot_md=CARD)
    hub_server.fail("PUT", "/_lfs/", status=503)
    HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(to("owner/model"), tmp_path, files, "first")
    assert hub_server.files("owner/model")["a.gguf"] == data
    assert len(hub_server.requests("POST", "/commit/main")) == 1
    assert len([entry for entry in hub_server.requests("PUT", "/_lfs/.*/[0-9]+$") if entry.status == 200]) == 3
    assert {entry.token for entry in hub_server.requests("PUT", "")} == {None}, "the store has signed addresses"


def test_commit_by_somebody_else_in_between_is_not_overwritten(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.before_commit.append(lambda: hub_server.add("owner/model", {"README.md": b"theirs"}))
    with pytest.raises(PublishError, match=r"somebody else committed README\.md"):
        hub.publish(to("owner/model"), tmp_path, files, "ours")
    assert hub_server.files("owner/model") == {"README.md": b"theirs"}


def test_commit_whose_answer_was_lost_counts(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD)
    hub_server.fail("POST", "/commit/main", cut_after=3)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    assert hub.publish(to("owner/model"), tmp_path, files, "first").changed
    assert hub_server.files("owner/model") == {"README.md": CARD}


def test_file_that_the_hub_leaves_out_is_an_error(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub_server.ignored.add("model.gguf")
    with pytest.raises(PublishError, match=r"without model\.gguf"):
        HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(to("owner/model"), tmp_path, files, "m")


@pytest.mark.parametrize(
    ("status", "what"), [(403, r"\(403\)"), (500, r"\(500\)"), (429, r"\(429\)"), (413, r"\(413\)")]
)
def test_refused_commit_is_told(hub_server: HubServer, tmp_path: Path, status: int, what: str) -> None:
    files = artifact(tmp_path, README_dot_md=CARD)
    hub_server.fail("POST", "/commit/main", status=status, times=9)
    with pytest.raises(PublishError, match=what) as caught:
        HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(to("owner/model"), tmp_path, files, "m")
    assert WRITER not in str(caught.value)
    tries = len(hub_server.requests("POST", "/commit/main"))
    assert tries == (4 if status in (500, 429) else 1), "what cannot get better is not tried again"


# Faults of a hub


def commits(server: HubServer, repo: str = "owner/model", kind: str = "models") -> int:
    """How many commits there are on top of the one that made the repo."""
    return len(server.repos[kind, repo].commits) - 1


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong on the way, once or twice, and how often each request is seen in the end."""

    method: str
    path: str
    how: dict[str, Any]
    posts: int
    puts: int


FAULTS = {
    "commit asks to slow down": Fault(
        method="POST", path="/commit/main", how={"status": 429, "headers": {"Retry-After": "0"}}, posts=2, puts=1
    ),
    "commit fails twice": Fault(method="POST", path="/commit/main", how={"status": 503, "times": 2}, posts=3, puts=1),
    "commit is cut on its way": Fault(method="POST", path="/commit/main", how={"take": 10}, posts=2, puts=1),
    "commit lands and its answer is lost": Fault(
        method="POST", path="/commit/main", how={"cut_after": 3}, posts=1, puts=1
    ),
    "commit lands and is answered with an error": Fault(
        method="POST", path="/commit/main", how={"damage": True}, posts=1, puts=1
    ),
    "upload is cut half-way": Fault(method="PUT", path="/_lfs/", how={"take": 300_000}, posts=1, puts=2),
    "upload fails": Fault(method="PUT", path="/_lfs/", how={"status": 500}, posts=1, puts=2),
    "store is busy": Fault(method="POST", path="objects/batch", how={"status": 503}, posts=1, puts=1),
    "hub is busy before": Fault(method="POST", path="/preupload/", how={"status": 500}, posts=1, puts=1),
    "making the repo fails": Fault(method="POST", path="/repos/create", how={"status": 502}, posts=1, puts=1),
    "looking fails": Fault(method="GET", path="/api/models/", how={"status": 500}, posts=1, puts=1),
    "looking after the commit fails": Fault(
        method="GET", path="/api/models/", how={"status": 500, "skip": 1}, posts=1, puts=1
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_the_hub_costs_time_and_nothing_else(
    hub_server: HubServer, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commit in the end, whatever happened, and what is uploaded already is not uploaded again."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fault = FAULTS[name]
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=bytes(range(256)) * 4000)
    hub_server.fail(fault.method, fault.path, **fault.how)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    assert hub.publish(to("owner/model"), tmp_path, files, "first").changed
    assert hub_server.files("owner/model") == contents(tmp_path)
    assert commits(hub_server) == 1
    assert len(hub_server.requests("POST", "/commit/main")) == fault.posts
    assert len(hub_server.requests("PUT", "/_lfs/")) == fault.puts


def test_publish_that_was_cut_is_completed_and_not_doubled(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.fail("POST", "/commit/main", take=1, times=4)
    with pytest.raises(PublishError, match="was cut"):
        hub.publish(to("owner/model"), tmp_path, files, "first")
    assert commits(hub_server) == 0 and hub_server.objects, "the weights are there, and no reader sees them"
    hub_server.log.clear()
    assert hub.publish(to("owner/model"), tmp_path, files, "first").changed
    assert commits(hub_server) == 1 and not hub_server.requests("PUT", "/_lfs/")
    assert not hub.publish(to("owner/model"), tmp_path, files, "first").changed
    assert commits(hub_server) == 1


def test_commit_that_is_never_answered_is_given_up_and_found(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub.publish(to("owner/model"), tmp_path, files, "first")
    before, session().timeout = session().timeout, 0.5
    try:
        hub_server.fail("POST", "/commit/main", stall=3.0)
        files = artifact(tmp_path, README_dot_md=CARD + b"more")
        assert hub.publish(to("owner/model"), tmp_path, files, "second").changed
    finally:
        session().timeout = before
    assert commits(hub_server) == 2 and hub_server.files("owner/model") == contents(tmp_path)


def test_client_of_ours_has_limits_in_time() -> None:
    """huggingface_hub's own has none, so a hub that takes a commit and is silent would hold a run for ever."""
    timeout = session().timeout
    assert (timeout.connect, timeout.read, timeout.write) == (TIMEOUT, ANSWER_TIMEOUT, ANSWER_TIMEOUT)


@pytest.mark.parametrize("path", ["/commit/main", "/preupload/", "objects/batch"])
def test_hub_that_asks_for_more_than_an_hour_is_not_waited_for(
    hub_server: HubServer, tmp_path: Path, path: str
) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub_server.fail("POST", path, status=429, headers={"Retry-After": "86400"}, times=9)
    with pytest.raises(PublishError, match=r"asks to come back in 86400 s \(429\)"):
        HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(to("owner/model"), tmp_path, files, "m")
    assert len(hub_server.requests("POST", path)) == 1


def test_waits_are_told_and_signed_addresses_are_not(
    hub_server: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of ours and those of the client, whose own log quotes the address that it uploads to."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    waits: list[float] = []
    monkeypatch.setattr("converter.hub_calls.pause", lambda seconds, stop: waits.append(seconds))
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub_server.fail("PUT", "/_lfs/", status=503)
    hub_server.fail("POST", "/commit/main", status=429, headers={"RateLimit": '"commits";r=0;t=1800'})
    notes: list[str] = []
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER, tell=notes.append)
    hub.publish(to("owner/model"), tmp_path, files, "m")
    assert notes == ["the hub is busy: goes on in 1 s", "the hub is busy (429): goes on in 1800 s"]
    assert waits == [1800.0]
    written = capfd.readouterr()
    assert "_lfs" not in written.out + written.err + "".join(notes)


def by_xet(server: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An artifact whose weights go by hf_xet; the hub knows their sha256, as one that has the store's index does."""
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_DURATION", "1s")
    files = artifact(folder, README_dot_md=CARD, a_dot_gguf=bytes(range(256)) * 4000, b_dot_gguf=b"GGUF" * 9)
    server.objects |= {sha256: (folder / name).read_bytes() for name, sha256 in files.items()}
    return files


def test_weights_go_by_xet_in_one_commit(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real hf_xet, which takes a folder for a store; `upload_folder` would make several commits of it."""
    files = by_xet(hub_server, tmp_path / "artifact", monkeypatch)
    hub_server.store = f"local://{tmp_path / 'store'}"
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    assert hub.publish(to("owner/model"), tmp_path / "artifact", files, "m").changed
    assert commits(hub_server) == 1 and not hub_server.requests("PUT", "")
    assert sum(path.stat().st_size for path in (tmp_path / "store").rglob("*") if path.is_file()) > 0
    assert not hub.publish(to("owner/model"), tmp_path / "artifact", files, "m").changed


def test_xet_store_that_does_not_answer_is_told_without_its_token(
    hub_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    files = by_xet(hub_server, tmp_path, monkeypatch)
    hub_server.store = "http://127.0.0.1:9"
    with pytest.raises(PublishError, match=r"failed or was cut \(ConnectionError\). Check the network") as caught:
        HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(to("owner/model"), tmp_path, files, "m")
    written = capfd.readouterr()
    assert "xet_secret" not in repr(caught.value) + written.out + written.err
    assert commits(hub_server) == 0


# Others who commit


def test_commit_of_hidden_files_in_between_is_built_upon(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)

    def theirs() -> None:
        place = hub_server.repos["models", "owner/model"]
        place.commit(place.commits[place.head] | {".eval_results/x.yaml": b"[]"})

    hub_server.before_commit.append(theirs)
    assert hub.publish(to("owner/model"), tmp_path, files, "ours").changed
    assert hub_server.files("owner/model") == contents(tmp_path) | {".eval_results/x.yaml": b"[]"}
    assert [entry.status for entry in hub_server.requests("POST", "/commit/main")] == [412, 200]


def test_what_is_there_already_is_not_even_read(hub_server: HubServer, tmp_path: Path) -> None:
    """A second publish of fifty artifacts of 40 GB must not hash 2 TB to find out that nothing is to do."""
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub.publish(to("owner/model"), tmp_path, files, "m")
    (tmp_path / "model.gguf").unlink()
    assert not hub.publish(to("owner/model"), tmp_path, files, "m").changed


def test_two_who_publish_the_same_at_once_make_one_commit(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.before_commit.append(lambda: hub.publish(to("owner/model"), tmp_path, files, "the other"))
    assert hub.publish(to("owner/model"), tmp_path, files, "this").changed
    assert commits(hub_server) == 1


def test_file_that_somebody_adds_meanwhile_is_kept(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.before_commit.append(lambda: hub_server.add("owner/model", {"notes.md": b"theirs"}))
    with pytest.raises(PublishError, match=r"somebody else committed notes\.md"):
        hub.publish(to("owner/model"), tmp_path, files, "ours")
    assert hub_server.files("owner/model") == {"notes.md": b"theirs"}


def test_head_that_is_behind_is_asked_for_again(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD)
    hub_server.fail("POST", "/commit/main", status=412)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    assert hub.publish(to("owner/model"), tmp_path, files, "m").changed and commits(hub_server) == 1


# Branches, pull requests, collections


def test_branch_is_made_and_main_stays_as_it_is(hub_server: HubServer, tmp_path: Path) -> None:
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.add("owner/model", {"README.md": b"# all our quantizations"})
    for name in ("q4", "q8"):
        files = artifact(tmp_path / name, README_dot_md=CARD, model_dot_gguf=name.encode())
        assert hub.publish(to("owner/model", branch=f"gguf/{name}"), tmp_path / name, files, "m").changed
        assert not hub.publish(to("owner/model", branch=f"gguf/{name}"), tmp_path / name, files, "m").changed
        assert hub_server.files("owner/model", revision=f"gguf/{name}") == contents(tmp_path / name)
    assert hub_server.files("owner/model") == {"README.md": b"# all our quantizations"}
    assert commits(hub_server) == 2


def test_branch_that_was_made_before_a_cut_is_gone_on_with(hub_server: HubServer, tmp_path: Path) -> None:
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    hub_server.add("owner/model", {"config.json": b"{}"})
    files = artifact(tmp_path, README_dot_md=CARD)
    hub_server.fail("POST", "/commit/q4", status=403)
    with pytest.raises(PublishError, match=r"\(403\)"):
        hub.publish(to("owner/model", branch="q4"), tmp_path, files, "m")
    assert hub.publish(to("owner/model", branch="q4"), tmp_path, files, "m").changed
    assert hub_server.files("owner/model", revision="q4") == contents(tmp_path)


@pytest.mark.parametrize("fault", [{}, {"cut_after": 3}, {"take": 1}, {"status": 503}])
def test_pull_request_is_opened_once(hub_server: HubServer, tmp_path: Path, fault: dict[str, Any]) -> None:
    """Also when the answer that told its number was lost; what changes later goes into the one that is open."""
    hub, place = HuggingFaceHub(endpoint=hub_server.url, token=WRITER), to("owner/model", pull_request=True)
    hub_server.add("owner/model", {"README.md": b"# ours"})
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    if fault:
        hub_server.fail("POST", "/commit/main", **fault)
    first = hub.publish(place, tmp_path, files, "model as q4")
    assert first.changed and first.url == f"{hub_server.url}/owner/model/discussions/1"
    assert hub_server.files("owner/model", revision="refs/pr/1") == contents(tmp_path)
    assert not hub.publish(place, tmp_path, files, "model as q4").changed
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 10)
    assert hub.publish(place, tmp_path, files, "model as q4").url == first.url
    place_there = hub_server.repos["models", "owner/model"]
    assert [one["title"] for one in place_there.requests] == ["model as q4"]
    assert hub_server.files("owner/model") == {"README.md": b"# ours"}
    place_there.commit(place_there.commits[place_there.heads["refs/pr/1"]])
    place_there.requests[0]["status"] = "merged"
    assert not hub.publish(place, tmp_path, files, "model as q4").changed
    assert len(place_there.requests) == 1, "main holds it, so there is nothing to ask for"


def test_pull_request_that_its_owner_closed_is_not_opened_again(hub_server: HubServer, tmp_path: Path) -> None:
    hub, place = HuggingFaceHub(endpoint=hub_server.url, token=WRITER), to("owner/model", pull_request=True)
    files = artifact(tmp_path, README_dot_md=CARD)
    hub.publish(place, tmp_path, files, "m")
    requests = hub_server.repos["models", "owner/model"].requests
    requests[0]["status"] = "closed"
    again = hub.publish(place, tmp_path, files, "m")
    assert not again.changed and "closed" in again.note and len(requests) == 1
    files = artifact(tmp_path, README_dot_md=CARD + b"better")
    assert hub.publish(place, tmp_path, files, "m").changed and len(requests) == 2


def test_collection_is_made_once_and_extended(hub_server: HubServer, tmp_path: Path) -> None:
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    files = artifact(tmp_path, README_dot_md=CARD)
    for repo, kind in (("owner/a", "model"), ("owner/b", "dataset"), ("owner/a", "model")):
        hub.publish(to(repo, kind, collection="Our quants"), tmp_path, files, "m")  # type: ignore[arg-type]
    (collection,) = hub_server.collections.values()
    assert [(item["id"], item["type"]) for item in collection["items"]] == [
        ("owner/a", "model"),
        ("owner/b", "dataset"),
    ]
    hub.publish(to("owner/c", collection=collection["slug"]), tmp_path, files, "m")
    assert [item["id"] for item in collection["items"]] == ["owner/a", "owner/b", "owner/c"]


def test_name_without_an_owner_is_the_accounts_own(hub_server: HubServer, tmp_path: Path) -> None:
    files = artifact(tmp_path, README_dot_md=CARD)
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    assert hub.publish(to("model"), tmp_path, files, "m").repo == "owner/model"
    assert hub_server.files("owner/model") == contents(tmp_path)


# What is found out before any work


def problems(server: HubServer, *places: Destination, token: str | None = WRITER) -> list[str]:
    return [str(one) for one in HuggingFaceHub(endpoint=server.url, token=token).problems(places)]


def test_missing_wrong_or_reading_token_and_a_foreign_owner_are_found(hub_server: HubServer) -> None:
    assert problems(hub_server, to("team/model"), to("model")) == []
    refused: dict[str, tuple[str | None, str]] = {"there is no token": (None, "owner/m")}
    refused |= {"does not accept": ("hf_wrong", "owner/m"), "can only read": (READER, "owner/m")}
    refused |= {"may not make repos for guests": (WRITER, "guests/m"), "for stranger": (WRITER, "stranger/m")}
    for what, (token, repo) in refused.items():
        (found,) = problems(hub_server, to(repo), token=token)
        assert what in found and str(token) not in found
    assert WRITER not in repr(HuggingFaceHub(token=WRITER))


def test_problems_of_all_repos_are_told_at_once_and_nothing_is_written(hub_server: HubServer) -> None:
    hub_server.add("team/closed", {"README.md": CARD})
    hub_server.repos["models", "team/closed"].writable = False
    hub_server.add("owner/theirs", {"config.json": b"{}", "model.safetensors": b"x" * 9})
    places = [to("team/closed"), to("guests/a"), to("guests/b"), to("owner/theirs"), to("owner/new"), to("owner/é")]
    found = problems(hub_server, *places)
    assert len(found) == 4, "what lacks for an owner is told once"
    for what in ("may not write to team/closed", "repos for guests", "hubmill did not put there", "no name of a repo"):
        assert any(what in one for one in found), found
    assert not hub_server.requests("POST", "/create|/commit/|/branch/") and not hub_server.requests("PUT", "")


def test_pull_request_needs_no_right_to_write(hub_server: HubServer, tmp_path: Path) -> None:
    hub_server.add("stranger/model", {"README.md": CARD})
    hub_server.repos["models", "stranger/model"].writable = False
    assert problems(hub_server, to("stranger/model"))
    place = to("stranger/model", pull_request=True)
    assert problems(hub_server, place) == []
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    assert HuggingFaceHub(endpoint=hub_server.url, token=WRITER).publish(place, tmp_path, files, "m").changed


@pytest.mark.parametrize(
    ("given", "repo", "collection", "what"),
    [
        ({"owner": ["repo.content.read", "repo.write"]}, "owner/new", "", ""),
        ({"owner": ["repo.content.read"]}, "owner/new", "", "may not make repos for owner"),
        ({"team": ["repo.write"]}, "owner/new", "", "may not make repos for owner"),
        ({"owner/there": ["repo.write"]}, "owner/there", "", ""),
        ({"owner/other": ["repo.write"]}, "owner/there", "", "may not write to owner/there"),
        ({"owner": ["repo.write"]}, "owner/new", "Quants", "may not change or make a collection of owner"),
        ({"owner": ["repo.write", "collection.write"]}, "owner/new", "Quants", ""),
    ],
)
def test_fine_grained_token_is_read_closely(
    hub_server: HubServer, given: dict[str, list[str]], repo: str, collection: str, what: str
) -> None:
    hub_server.add("owner/there", {"README.md": CARD})
    hub_server.fine = given
    found = problems(hub_server, to(repo, collection=collection), token=FINE)
    assert what in found[0] if what else found == []


def test_repo_of_somebody_else_is_not_wiped_out(hub_server: HubServer, tmp_path: Path) -> None:
    """Neither when the plan looks nor when it appeared since; a card alone, or leave to replace, is another matter."""
    hub = HuggingFaceHub(endpoint=hub_server.url, token=WRITER)
    files = artifact(tmp_path, README_dot_md=CARD, model_dot_gguf=b"GGUF" * 9)
    theirs = {"README.md": b"# My model", "model.safetensors": b"x" * 99}
    hub_server.add("owner/model", theirs)
    assert "did not put there (model.safetensors)" in problems(hub_server, to("owner/model"))[0]
    for place in (to("owner/model"), to("owner/model", pull_request=True)):
        with pytest.raises(PublishError, match="did not put there"):
            hub.publish(place, tmp_path, files, "m")
    assert hub_server.files("owner/model") == theirs
    assert hub.publish(to("owner/model", replace=True), tmp_path, files, "m").changed
    hub_server.add("owner/empty", {"README.md": b"---\nlicense: mit\n---\n"})
    assert problems(hub_server, to("owner/empty")) == []
    assert hub.publish(to("owner/empty"), tmp_path, files, "m").changed


def test_artifact_of_another_source_is_not_replaced_unasked(hub: Hub, hub_server: HubServer, tmp_path: Path) -> None:
    def made_of(source: str) -> dict[str, str]:
        made = Conversion(
            source=source, parameters={"target": {"format": "gguf"}}, settings={}, dependencies=(), versions={}
        )
        files = artifact(tmp_path / "artifact", model_dot_gguf=source.encode())
        return files | artifact(tmp_path / "artifact", provenance_dot_json=statement(files, made).encode())

    first, second, repo = "hub:a/chat", "hub:b/chat", "team/chat-q4"
    hub.publish(to(repo, origin=first), tmp_path / "artifact", made_of(first), "m")
    assert hub.problems([to(repo, origin=first)]) == []
    (problem,) = hub.problems([to(repo, origin=second)])
    assert "holds an artifact of hub:a/chat, and this one is of hub:b/chat" in str(problem)
    files = made_of(second)
    with pytest.raises(PublishError, match="replace: true"):
        hub.publish(to(repo, origin=second), tmp_path / "artifact", files, "m")
    assert hub.publish(to(repo, origin=second, replace=True), tmp_path / "artifact", files, "m").changed
