"""A small hub on the loopback that speaks Hugging Face's protocol, so that the real client is tested over real HTTP.

It keeps repos in memory, writes down every request with the bytes it answered, and fails on demand: `fail` makes the
next requests that match answer with a status, or stops in the middle of a body and closes the connection. LFS uploads
are basic or, above `part_bytes`, multipart. Not there: xet, git, pages of listings.

    def test_something(hub_server):
        commit = hub_server.add("owner/model", {"config.json": b"{}"})
        HfApi(endpoint=hub_server.url, token=WRITER).model_info("owner/model")
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

WRITER, READER = "hf_writer_secret", "hf_reader_secret"
LFS_SUFFIXES = (".safetensors", ".gguf", ".parquet", ".bin")
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|datasets)/" + REPO


@dataclass(kw_only=True)
class Repo:
    """One repo with its main branch; a commit is the files it holds."""

    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    head: str = ""

    def commit(self, files: dict[str, bytes]) -> str:
        listing = json.dumps([self.head, len(self.commits), sorted(files)]).encode()
        self.head = hashlib.sha1(listing + b"".join(files[name] for name in sorted(files))).hexdigest()
        self.commits[self.head] = files
        return self.head


@dataclass(kw_only=True)
class Fault:
    """What befalls the next `times` requests that match; with `cut_after`, the body stops after so many bytes."""

    method: str
    pattern: str
    times: int
    status: int | None
    headers: dict[str, str]
    cut_after: int | None


@dataclass(frozen=True, kw_only=True)
class Logged:
    """One request and how it was answered; `sent` counts the bytes of the body."""

    method: str
    path: str
    range: str | None
    token: str | None
    status: int
    sent: int


class HubServer:
    """The state of the hub; `url` is its endpoint while it runs."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS content by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.part_bytes = 1 << 30
        self.ranges = True  # whether parts of a file can be asked for
        self.before_commit: list[Callable[[], object]] = []  # each runs once, before a commit is looked at
        self.ignored: set[str] = set()  # paths that .gitignore keeps out

    def add(self, repo: str, files: dict[str, bytes], *, kind: str = "models", gated: bool = False) -> str:
        """Commit files to a repo, which is made when it is not there, and return the commit."""
        place = self.repos.setdefault((kind, repo), Repo())
        place.gated = gated
        return place.commit({".gitattributes": ATTRIBUTES} | files)

    def files(self, repo: str, kind: str = "models") -> dict[str, bytes]:
        place = self.repos[kind, repo]
        return {name: data for name, data in place.commits[place.head].items() if name != ".gitattributes"}

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
        times: int = 1,
    ) -> None:
        """Let the next `times` requests whose path matches the pattern go wrong."""
        fault = Fault(
            method=method, pattern=pattern, times=times, status=status, headers=headers or {}, cut_after=cut_after
        )
        self.faults.append(fault)

    def requests(self, method: str, pattern: str) -> list[Logged]:
        return [entry for entry in self.log if entry.method == method and re.search(pattern, entry.path)]

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        fault = next(
            (f for f in self.faults if f.times and f.method == request.method and re.search(f.pattern, path)), None
        )
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.status is not None:
            await request.body()
            response = Response(b"", fault.status, fault.headers)
        else:
            response = await self.route(request)
        body = bytes(response.body)
        cut = fault.cut_after if fault is not None and fault.cut_after is not None else None
        sent = len(body) if cut is None else min(cut, len(body))
        authorization = request.headers.get("authorization")
        entry = Logged(
            method=request.method,
            path=path,
            range=request.headers.get("range"),
            token=authorization.removeprefix("Bearer ") if authorization else None,
            status=response.status_code,
            sent=0 if request.method == "HEAD" else sent,
        )
        self.log.append(entry)
        if cut is None:
            return response
        headers = dict(response.headers) | {"content-length": str(len(body))}
        return StreamingResponse(shortened(body, sent), response.status_code, headers)

    async def route(self, request: Request) -> Response:
        for method, pattern, handler in ROUTES:
            if request.method in method and (match := re.fullmatch(pattern, request.url.path)):
                return await handler(self, request, match)
        return refuse(404, "", "no such route")

    def token(self, request: Request) -> str | None:
        return request.headers.get("authorization", "").removeprefix("Bearer ") or None

    def find(self, request: Request, match: re.Match[str], kind: str = "") -> Repo | Response:
        """The repo that a request names, or the refusal that hides it."""
        place = self.repos.get((kind or match["kind"], match["repo"]))
        token = self.token(request)
        if token not in (None, WRITER, READER):
            return refuse(401, "", "Invalid credentials in Authorization header")
        if place is None or (place.private and token is None):
            return refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return place


async def shortened(body: bytes, sent: int) -> AsyncIterator[bytes]:
    yield body[:sent]
    raise ConnectionResetError("cut on demand")


def refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) and size > 0


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


async def whoami(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    token = hub.token(request)
    if token not in (WRITER, READER):
        return refuse(401, "", "Invalid credentials in Authorization header")
    role = "write" if token == WRITER else "read"
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}]
    return JSONResponse(
        {"type": "user", "name": "owner", "orgs": orgs, "auth": {"accessToken": {"role": role, "displayName": "t"}}}
    )


async def create(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    wanted = await request.json()
    if hub.token(request) != WRITER:
        return refuse(403 if hub.token(request) else 401, "", "You need write access")
    kind = wanted.get("type") or "model"
    repo = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo}"
    if (kind + "s", repo) in hub.repos:
        return JSONResponse({"error": "You already created this repo", "url": url}, 409)
    hub.add(repo, {}, kind=kind + "s")
    return JSONResponse({"url": url, "name": repo, "id": repo})


async def info(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match)
    if isinstance(place, Response):
        return place
    revision = match.groupdict().get("revision") or "main"
    commit = place.head if revision == "main" else revision
    if commit not in place.commits:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    siblings: list[dict[str, Any]] = []
    for name, data in sorted(place.commits[commit].items()):
        entry: dict[str, Any] = {"rfilename": name}
        if "blobs" in request.query_params:
            entry |= {"size": len(data), "blobId": blob_id(data)}
            if is_lfs(name, len(data)):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        siblings.append(entry)
    return JSONResponse(
        {
            "id": match["repo"],
            "sha": commit,
            "siblings": siblings,
            "private": place.private,
            "gated": "manual" if place.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
    )


async def resolve(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match, "datasets" if match["set"] else "models")
    if isinstance(place, Response):
        return place
    if place.gated and hub.token(request) != WRITER:
        return refuse(403 if hub.token(request) else 401, "GatedRepo", "Access to this model is restricted")
    commit = place.head if match["revision"] == "main" else match["revision"]
    if commit not in place.commits:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
    data = place.commits[commit].get(match["path"])
    if data is None:
        response = refuse(404, "EntryNotFound", "Entry not found")
        response.headers["X-Repo-Commit"] = commit
        return response
    lfs = is_lfs(match["path"], len(data))
    headers = {
        "X-Repo-Commit": commit,
        "ETag": f'"{hashlib.sha256(data).hexdigest() if lfs else blob_id(data)}"',
        "X-Linked-Size": str(len(data)),
        "Accept-Ranges": "bytes",
    }
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted is None or not hub.ranges:
        return Response(data, 200, headers)
    start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
    if start >= len(data):
        return Response(b"", 416, headers | {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Response(data[start : end + 1], 206, headers)


async def validate(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    return JSONResponse({"errors": [], "warnings": []})


async def preupload(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match)
    if isinstance(place, Response):
        return place
    if hub.token(request) != WRITER:
        return refuse(403, "", "You need write access")
    answers = []
    for file in (await request.json())["files"]:
        name, lfs = file["path"], is_lfs(file["path"], file["size"])
        data = place.commits[place.head].get(name)
        oid = None if data is None else hashlib.sha256(data).hexdigest() if lfs else blob_id(data)
        mode = "lfs" if lfs else "regular"
        answers.append({"path": name, "uploadMode": mode, "shouldIgnore": name in hub.ignored, "oid": oid})
    return JSONResponse({"files": answers})


async def batch(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    objects = []
    for wanted in (await request.json())["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in hub.objects:
            objects.append({"oid": oid, "size": size})
            continue
        upload: dict[str, Any] = {"href": f"{hub.url}/_lfs/{oid}"}
        if size > hub.part_bytes:
            count = -(-size // hub.part_bytes)
            urls = {f"{part:05d}": f"{hub.url}/_lfs/{oid}/{part}" for part in range(1, count + 1)}
            upload = {"href": f"{hub.url}/_lfs/{oid}/complete", "header": {"chunk_size": str(hub.part_bytes)} | urls}
        verify = {"href": f"{hub.url}/_lfs/{oid}/verify"}
        objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
    return JSONResponse({"transfer": "basic", "objects": objects})


async def put_object(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    data = await request.body()
    if hashlib.sha256(data).hexdigest() != match["oid"]:
        return refuse(400, "", "checksum differs")
    hub.objects[match["oid"]] = data
    return Response(b"")


async def put_part(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    hub.parts[match["oid"], int(match["part"])] = await request.body()
    return Response(b"", 200, {"ETag": f"part-{match['part']}"})


async def complete(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    numbers = sorted(part["partNumber"] for part in (await request.json())["parts"])
    data = b"".join(hub.parts.pop((match["oid"], number)) for number in numbers)
    if hashlib.sha256(data).hexdigest() != match["oid"]:
        return refuse(400, "", "checksum differs")
    hub.objects[match["oid"]] = data
    return JSONResponse({})


async def verify(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    known = match["oid"] in hub.objects
    return JSONResponse({}) if known else refuse(404, "", "no such object")


async def commit(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match)
    if isinstance(place, Response):
        return place
    if hub.token(request) != WRITER:
        return refuse(403, "", "You need write access")
    while hub.before_commit:
        hub.before_commit.pop()()
    files = dict(place.commits[place.head])
    for line in (await request.body()).splitlines():
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header" and value.get("parentCommit") not in (None, place.head):
            return refuse(412, "", "A commit has happened since")
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
    oid = place.commit(files)
    return JSONResponse({"success": True, "commitOid": oid, "commitUrl": f"{hub.url}/{match['repo']}/commit/{oid}"})


Handler = Callable[[HubServer, Request, "re.Match[str]"], Awaitable[Response]]
OID = r"/_lfs/(?P<oid>[0-9a-f]{64})"
ROUTES: list[tuple[tuple[str, ...], str, Handler]] = [
    (("GET",), r"/api/whoami-v2", whoami),
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate),
    (("GET",), API, info),
    (("GET",), API + r"/revision/(?P<revision>[^/]+)", info),
    (("POST",), API + r"/preupload/main", preupload),
    (("POST",), API + r"/commit/main", commit),
    (("POST",), r"/(datasets/)?" + REPO + r"\.git/info/lfs/objects/batch", batch),
    (("PUT",), OID, put_object),
    (("PUT",), OID + r"/(?P<part>\d+)", put_part),
    (("POST",), OID + r"/complete", complete),
    (("POST",), OID + r"/verify", verify),
    (("GET", "HEAD"), r"/(?P<set>datasets/)?" + REPO + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
]


def artifact(folder: Path, **contents: bytes) -> dict[str, str]:
    """Write files ("__" stands for "/", "_dot_" for ".") and give their checksums by path."""
    digests = {}
    for key, data in contents.items():
        name = key.replace("__", "/").replace("_dot_", ".")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    return digests


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A running hub of its own for one test; xet is off, because no server here speaks it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    hub = HubServer()
    methods = ["GET", "HEAD", "POST", "PUT"]
    app = Starlette(routes=[Route("/{path:path}", hub.answer, methods=methods)])
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level=60, timeout_graceful_shutdown=1, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the hub did not start"
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    yield hub
    server.should_exit = True
    thread.join(timeout=10)
