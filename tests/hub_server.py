"""A small hub on the loopback that speaks Hugging Face's protocol, so that the real client is tested over real HTTP.

It keeps repos in memory, writes down every request with the bytes it answered, and fails on demand: `fail` makes the
next requests that match answer with a status, stop in the middle of a body, take a byte for another, stand still, or
lose the connection while the client still sends. LFS uploads are basic or, above `part_bytes`, multipart; with `cdn`
weights are served from another origin, by a signed address. Not there: git, pages of listings, and of xet all but the
address of its store, for which hf_xet takes a folder.

    def test_something(hub_server):
        commit = hub_server.add("owner/model", {"config.json": b"{}"})
        HfApi(endpoint=hub_server.url, token=WRITER).model_info("owner/model")
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from hub_routes import FINE, READER, ROUTES, WRITER, Repo, refuse

__all__ = ["FINE", "READER", "WRITER", "HubServer", "Repo", "artifact", "contents", "hub_server", "serving"]
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(kw_only=True)
class Fault:
    """What befalls the next `times` requests that match; see HubServer.fail."""

    method: str
    pattern: str
    times: int
    status: int | None
    headers: dict[str, str]
    cut_after: int | None
    take: int | None
    damage: bool
    stall: float
    skip: int


@dataclass(frozen=True, kw_only=True)
class Logged:
    """One request and how it was answered; `sent` counts the bytes of the body."""

    method: str
    path: str
    host: str
    range: str | None
    token: str | None
    status: int
    sent: int


class HubServer:
    """The state of the hub; `url` is its endpoint while it runs."""

    def __init__(self) -> None:
        self.url = ""
        self.repos: dict[tuple[str, str], Repo] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}  # LFS content by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.part_bytes = 1 << 30
        self.ranges = True  # whether parts of a file can be asked for
        self.store = ""  # where hf_xet finds the content-addressed store, when it is on
        self.cdn = ""  # another origin of this server, which serves weights by a signed address
        self.before_commit: list[Callable[[], object]] = []  # each runs once, before a commit is looked at
        self.ignored: set[str] = set()  # paths that .gitignore keeps out
        self.fine: dict[str, list[str]] = {}  # permissions of the fine-grained token by owner or repo

    def add(self, repo: str, files: dict[str, bytes], *, kind: str = "models", gated: bool = False) -> str:
        """Commit files to a repo, which is made when it is not there, and return the commit."""
        place = self.repos.setdefault((kind, repo), Repo())
        place.gated = gated
        return place.commit({".gitattributes": ATTRIBUTES} | files)

    def files(self, repo: str, kind: str = "models", revision: str = "main") -> dict[str, bytes]:
        place = self.repos[kind, repo]
        return {name: data for name, data in place.commits[place.named(revision)].items() if name != ".gitattributes"}

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        headers: dict[str, str] | None = None,
        cut_after: int | None = None,
        take: int | None = None,
        damage: bool = False,
        stall: float = 0.0,
        times: int = 1,
        skip: int = 0,
    ) -> None:
        """Let the next `times` requests whose path matches the pattern go wrong, after `skip` of them.

        status: answered in place of the work. cut_after: the work is done, and the answer stops after so many bytes.
        take: the connection is lost when so many bytes of the request have come. damage: a byte of the answer is
        another. stall: the work is done, and for so many seconds nothing comes, or nothing after `cut_after`.
        """
        fault = Fault(
            method=method,
            pattern=pattern,
            times=times,
            status=status,
            headers=headers or {},
            cut_after=cut_after,
            take=take,
            damage=damage,
            stall=stall,
            skip=skip,
        )
        self.faults.append(fault)

    def requests(self, method: str, pattern: str) -> list[Logged]:
        return [entry for entry in self.log if entry.method == method and re.search(pattern, entry.path)]

    async def answer(self, request: Request) -> Response:
        path = request.url.path
        fault = next(
            (f for f in self.faults if f.times and f.method == request.method and re.search(f.pattern, path)), None
        )
        if fault is not None and fault.skip:
            fault.skip, fault = fault.skip - 1, None
        if fault is not None:
            fault.times -= 1
        if fault is not None and fault.take is not None:
            return await self.lose(request, fault.take)
        if fault is not None and fault.status is not None:
            await request.body()
            response = Response(b"", fault.status, fault.headers)
        else:
            response = await self.route(request)
        body = bytes(response.body)
        if fault is not None and fault.damage:
            body = bytes([body[0] ^ 1]) + body[1:]
        cut = fault.cut_after if fault is not None and fault.cut_after is not None else None
        sent = len(body) if cut is None else min(cut, len(body))
        self.write_down(request, response.status_code, 0 if request.method == "HEAD" else sent)
        stall = fault.stall if fault is not None else 0.0
        if cut is None:
            await asyncio.sleep(stall)
            response.body = body
            return response
        headers = dict(response.headers) | {"content-length": str(len(body))}
        return StreamingResponse(shortened(body, sent, stall), response.status_code, headers)

    async def lose(self, request: Request, take: int) -> Response:
        """Lose the connection in the middle of a request, as a line does that breaks."""
        came = 0
        async for piece in request.stream():
            came += len(piece)
            if came >= take:
                break
        self.write_down(request, 0, 0)
        request.receive.__self__.transport.abort()  # type: ignore[attr-defined]
        return Response(b"")

    def write_down(self, request: Request, status: int, sent: int) -> None:
        authorization = request.headers.get("authorization")
        entry = Logged(
            method=request.method,
            path=request.url.path,
            host=request.headers.get("host", ""),
            range=request.headers.get("range"),
            token=authorization.removeprefix("Bearer ") if authorization else None,
            status=status,
            sent=sent,
        )
        self.log.append(entry)

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
        if token not in (None, WRITER, READER, FINE):
            return refuse(401, "", "Invalid credentials in Authorization header")
        if place is None or (place.private and token is None):
            return refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        return place

    def may_write(self, request: Request, place: Repo, repo: str) -> bool:
        """Whether the token may write; for a pull request it is enough that it may write anywhere."""
        token = self.token(request)
        if token == FINE:
            return any("repo.write" in self.fine.get(name, ()) for name in (repo, repo.partition("/")[0]))
        return token == WRITER and (place.writable or request.query_params.get("create_pr") == "1")


async def shortened(body: bytes, sent: int, stall: float) -> AsyncIterator[bytes]:
    yield body[:sent]
    await asyncio.sleep(stall)
    raise ConnectionResetError("cut on demand")


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
    """A running hub of its own for one test; xet is off, because no server here speaks all of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere/token")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving() as hub:
        yield hub


@contextmanager
def serving() -> Iterator[HubServer]:
    """A running hub."""
    hub = HubServer()
    methods = ["GET", "HEAD", "POST", "PUT"]
    app = Starlette(routes=[Route("/{path:path}", hub.answer, methods=methods)])
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_level=60, timeout_graceful_shutdown=1, lifespan="off", http="h11"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the hub did not start"
        time.sleep(0.01)
    hub.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield hub
    finally:
        server.should_exit = True
        thread.join(timeout=10)
