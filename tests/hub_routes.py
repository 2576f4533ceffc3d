"""How the hub server answers: the routes of Hugging Face's protocol that hubmill and its client ask for."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

if TYPE_CHECKING:
    from hub_server import HubServer

WRITER, READER = "hf_writer_secret", "hf_reader_secret"
FINE = "hf_fine_secret"  # fine-grained: may what `hub.fine` says
LFS_SUFFIXES = (".safetensors", ".gguf", ".parquet", ".bin")
REPO = r"(?P<repo>[^/]+/[^/]+)"
API = r"/api/(?P<kind>models|datasets)/" + REPO
NOW = "2026-11-28T12:00:00.000Z"


@dataclass(kw_only=True)
class Repo:
    """One repo with its branches; a commit is the files it holds."""

    gated: bool = False
    accepted: bool = True  # its terms, by the writer
    private: bool = False
    writable: bool = True  # by the writer's token
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=lambda: {"main": ""})
    requests: list[dict[str, Any]] = field(default_factory=list)  # pull requests, the first is number 1

    @property
    def head(self) -> str:
        return self.heads["main"]

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        listing = json.dumps([self.heads.get(branch, ""), len(self.commits), sorted(files)]).encode()
        head = hashlib.sha1(listing + b"".join(files[name] for name in sorted(files))).hexdigest()
        self.heads[branch] = head
        self.commits[head] = files
        return head

    def named(self, revision: str) -> str:
        """The commit of a branch, a pull request or itself; "" when there is none."""
        return self.heads.get(revision) or (revision if revision in self.commits else "")


def refuse(status: int, code: str, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"X-Error-Code": code, "X-Error-Message": message})


def is_lfs(path: str, size: int) -> bool:
    return path.endswith(LFS_SUFFIXES) and size > 0


@lru_cache(256)  # a listing names every file's
def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(256)
def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


async def whoami(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    token = hub.token(request)
    if token not in (WRITER, READER, FINE):
        return refuse(401, "", "Invalid credentials in Authorization header")
    access: dict[str, Any] = {"role": {WRITER: "write", READER: "read"}.get(token, "fineGrained"), "displayName": "t"}
    if token == FINE:
        scoped = [
            {"entity": {"_id": "1", "type": "model" if "/" in name else "user", "name": name}, "permissions": given}
            for name, given in hub.fine.items()
        ]
        access["fineGrained"] = {"canReadGatedRepos": True, "global": ["discussion.write"], "scoped": scoped}
    orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "guests", "roleInOrg": "read"}]
    return JSONResponse(
        {"type": "user", "name": "owner", "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}
    )


async def create(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    wanted = await request.json()
    if hub.token(request) not in (WRITER, FINE):
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
    commit = place.named(revision)
    if not commit:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    siblings: list[dict[str, Any]] = []
    for name, data in sorted(place.commits[commit].items()):
        entry: dict[str, Any] = {"rfilename": name}
        if "blobs" in request.query_params:
            entry |= {"size": len(data), "blobId": blob_id(data)}
            if is_lfs(name, len(data)):
                entry["lfs"] = {"sha256": sha256_of(data), "size": len(data), "pointerSize": 130}
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
    signed = request.query_params.get("X-Amz-Signature") == "signed"
    if place.gated and not (hub.token(request) == WRITER and place.accepted) and not signed:
        return refuse(403 if hub.token(request) else 401, "GatedRepo", "Access to this model is restricted")
    commit = place.named(match["revision"])
    if not commit:
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
    data = place.commits[commit].get(match["path"])
    if data is None:
        response = refuse(404, "EntryNotFound", "Entry not found")
        response.headers["X-Repo-Commit"] = commit
        return response
    lfs = is_lfs(match["path"], len(data))
    headers = {
        "X-Repo-Commit": commit,
        "ETag": f'"{sha256_of(data) if lfs else blob_id(data)}"',
        "X-Linked-Size": str(len(data)),
        "Accept-Ranges": "bytes",
    }
    if lfs and hub.cdn and not request.url.path.startswith("/_cdn/"):
        location = f"{hub.cdn}/_cdn{request.url.path}?X-Amz-Signature=signed"
        return Response(b"", 302, headers | {"Location": location})
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
    if not place.named(match["revision"]):
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {match['revision']}")
    if not hub.may_write(request, place, match["repo"]) and not match["revision"].startswith("refs/pr/"):
        return refuse(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
    answers = []
    for file in (await request.json())["files"]:
        name, lfs = file["path"], is_lfs(file["path"], file["size"])
        data = place.commits[place.named(match["revision"])].get(name)
        oid = None if data is None else sha256_of(data) if lfs else blob_id(data)
        mode = "lfs" if lfs else "regular"
        answers.append({"path": name, "uploadMode": mode, "shouldIgnore": name in hub.ignored, "oid": oid})
    return JSONResponse({"files": answers})


async def xet_token(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    expiry = 4_000_000_000
    headers = {"X-Xet-Cas-Url": hub.store, "X-Xet-Access-Token": "xet_secret", "X-Xet-Token-Expiration": str(expiry)}
    return JSONResponse({"casUrl": hub.store, "accessToken": "xet_secret", "exp": expiry}, headers=headers)


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
    if sha256_of(data) != match["oid"]:
        return refuse(400, "", "checksum differs")
    hub.objects[match["oid"]] = data
    return Response(b"")


async def put_part(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    hub.parts[match["oid"], int(match["part"])] = await request.body()
    return Response(b"", 200, {"ETag": f"part-{match['part']}"})


async def complete(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    numbers = sorted(part["partNumber"] for part in (await request.json())["parts"])
    data = b"".join(hub.parts.pop((match["oid"], number)) for number in numbers)
    if sha256_of(data) != match["oid"]:
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
    revision = match["revision"]
    if not place.named(revision):
        return refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if not hub.may_write(request, place, match["repo"]) and not revision.startswith("refs/pr/"):
        return refuse(403, "", "You need write access")
    lines = (await request.body()).splitlines()
    if hub.before_commit:
        await asyncio.to_thread(hub.before_commit.pop(0))  # it may ask this hub for something itself
    files = dict(place.commits[place.named(revision)])
    summary = ""
    for line in lines:
        entry = json.loads(line)
        value = entry["value"]
        if entry["key"] == "header":
            summary = value["summary"]
            if value.get("parentCommit") not in (None, place.named(revision)):
                return refuse(412, "", "A commit has happened since")
        if entry["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif entry["key"] == "lfsFile":
            files[value["path"]] = hub.objects[value["oid"]]
        elif entry["key"] == "deletedFile":
            del files[value["path"]]
    url = f"{hub.url}/{'' if match['kind'] == 'models' else 'datasets/'}{match['repo']}"
    answer: dict[str, Any] = {"success": True}
    if request.query_params.get("create_pr") == "1":
        number = len(place.requests) + 1
        revision = f"refs/pr/{number}"
        place.requests.append({"num": number, "title": summary, "status": "open", "author": "owner"})
        answer["pullRequestUrl"] = f"{url}/discussions/{number}"
    oid = place.commit(files, revision)
    return JSONResponse(answer | {"commitOid": oid, "commitUrl": f"{url}/commit/{oid}"})


async def branch(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match)
    if isinstance(place, Response):
        return place
    if not hub.may_write(request, place, match["repo"]):
        return refuse(403, "", "You need write access")
    if match["branch"] in place.heads:
        return refuse(409, "", "Reference already exists")
    place.heads[match["branch"]] = place.head
    return JSONResponse({})


async def discussions(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    place = hub.find(request, match)
    if isinstance(place, Response):
        return place
    author = request.query_params.get("author")
    found = [
        one
        | {
            "author": {"name": one["author"]},
            "createdAt": NOW,
            "isPullRequest": True,
            "repo": {"name": match["repo"], "type": match["kind"].removesuffix("s")},
        }
        for one in place.requests
        if author in (None, one["author"])
    ]
    return JSONResponse({"count": len(found), "start": 0, "discussions": found})


async def make_collection(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    wanted = await request.json()
    may = hub.token(request) == WRITER or "collection.write" in hub.fine.get(wanted["namespace"], ())
    if not may or wanted["namespace"] not in ("owner", "team"):
        return refuse(403, "", "You need write access")
    title = re.sub("[^a-z0-9]+", "-", wanted["title"].lower())
    slug = f"{wanted['namespace']}/{title}-{hashlib.sha1(wanted['title'].encode()).hexdigest()[:24]}"
    if slug in hub.collections:
        return JSONResponse({"error": "exists", "slug": slug}, 409)
    hub.collections[slug] = {
        "slug": slug,
        "title": wanted["title"],
        "owner": {"name": wanted["namespace"]},
        "items": [],
        "lastUpdated": NOW,
        "position": 0,
        "private": wanted["private"],
        "theme": "blue",
        "upvotes": 0,
    }
    return JSONResponse(hub.collections[slug])


async def get_collection(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    found = hub.collections.get(match["slug"])
    return JSONResponse(found) if found else refuse(404, "", "Collection not found")


async def add_item(hub: HubServer, request: Request, match: re.Match[str]) -> Response:
    item = (await request.json())["item"]
    items = hub.collections[match["slug"]]["items"]
    if any((one["id"], one["type"]) == (item["id"], item["type"]) for one in items):
        return refuse(409, "", "Item already in collection")
    items.append(item | {"_id": f"{len(items):024x}", "position": len(items)})
    return JSONResponse(hub.collections[match["slug"]])


Handler = Callable[["HubServer", Request, "re.Match[str]"], Awaitable[Response]]
OID = r"/_lfs/(?P<oid>[0-9a-f]{64})"
RESOLVE = r"(?:/_cdn)?/(?P<set>datasets/)?" + REPO + r"/resolve/(?P<revision>refs/pr/\d+|[0-9a-z-]+)/(?P<path>.+)"
ROUTES: list[tuple[tuple[str, ...], str, Handler]] = [
    (("GET",), r"/api/whoami-v2", whoami),
    (("POST",), r"/api/repos/create", create),
    (("POST",), r"/api/validate-yaml", validate),
    (("GET",), API, info),
    (("GET",), API + r"/revision/(?P<revision>.+)", info),
    (("POST",), API + r"/preupload/(?P<revision>.+)", preupload),
    (("POST",), API + r"/commit/(?P<revision>.+)", commit),
    (("GET",), API + r"/xet-write-token/(?P<revision>.+)", xet_token),
    (("POST",), API + r"/branch/(?P<branch>.+)", branch),
    (("GET",), API + r"/discussions", discussions),
    (("POST",), r"/api/collections", make_collection),
    (("GET",), r"/api/collections/(?P<slug>[^/]+/[^/]+)", get_collection),
    (("POST",), r"/api/collections/(?P<slug>[^/]+/[^/]+)/items", add_item),
    (("POST",), r"/(datasets/)?" + REPO + r"\.git/info/lfs/objects/batch", batch),
    (("PUT",), OID, put_object),
    (("PUT",), OID + r"/(?P<part>\d+)", put_part),
    (("POST",), OID + r"/complete", complete),
    (("POST",), OID + r"/verify", verify),
    (("GET", "HEAD"), RESOLVE, resolve),
]
