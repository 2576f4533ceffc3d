"""Models from a Hugging Face hub, over HTTP; a door of huggingface_hub.

Planning must not download weights, so `resolve` pins a revision to a commit, takes the small files, and reads only the
headers of the weights by HTTP range. `fetch` streams the weights with a ranged resume of its own: huggingface_hub 2
resumes a cut connection inside one process, but a killed process starts its file again, which for a 40 GB shard is an
hour. The price is plain HTTP, without the chunk cache of xet. Every file is checked against the hub's own checksum.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

import huggingface_hub.constants
from huggingface_hub import hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status, httpx

from converter.containers.gguf import source as gguf_source
from converter.containers.gguf.header import HEAD_LIMIT_BYTES, Head, HeadIncompleteError
from converter.errors import SourceError
from converter.folder import check_path, matches
from converter.hub_calls import COMMIT, TIMEOUT, Patience, Tell, api, explained, hush, patiently, session, together
from converter.marks import quoted
from converter.packed import Packed
from converter.publish import Kind
from converter.source import Header, Snapshot, header_length, is_gguf, open_folder, parse_header, survey, travels

FIRST_READ_BYTES = 100_000  # holds the whole header of nearly every shard, which saves a second request
GGUF_FIRST_READ_BYTES = 1 << 20  # a vocabulary of 128k tokens with its merges takes about 6 MB
CHUNK_BYTES = 1 << 20
LISTING = ".listing.json"  # beside the files of a commit
HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|$))")  # .gitattributes, but not "..", which is refused and not left out
Report = Callable[[int], None]  # told the number of bytes that just arrived


@dataclass(frozen=True, kw_only=True)
class Remote:
    """One repo at one commit, as its hub lists it; checksums are "sha256:..." or "git:..."."""

    repo: str
    kind: Kind
    commit: str
    sizes: Mapping[str, int]
    checksums: Mapping[str, str]
    endpoint: str
    token: str | None = field(default=None, repr=False)
    gated: bool = False
    tell: Tell = field(default=hush, repr=False, compare=False)  # hears of waits

    def folder(self, cache: Path) -> Path:
        """Where this commit lies in a cache."""
        return cache / self.repo.replace("/", "--") / self.commit

    @contextmanager
    def stream(self, name: str, start: int, end: int | None = None) -> Iterator[tuple[int, Iterator[bytes]]]:
        """The bytes [start, end) of a file, and where they really begin: 0 from a hub that ignores ranges."""
        url = hf_hub_url(self.repo, name, repo_type=self.kind, revision=self.commit, endpoint=self.endpoint)
        headers = dict(build_hf_headers(token=self.token))
        headers["Accept-Encoding"] = "identity"  # lengths and ranges count bytes of the file
        if start or end is not None:
            headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        with session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            yield (start if response.status_code == 206 else 0), response.iter_bytes(CHUNK_BYTES)


def resolve(
    source: str,
    cache: Path,
    where: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    tell: Tell = hush,
) -> Snapshot:
    """The snapshot of "folder:path" or "hub:org/name[@revision]", without the weights of a hub.

    `cache` receives the small files of a hub's model, under its commit. `endpoint` and `token` default to what
    huggingface_hub takes from the environment (HF_ENDPOINT, HF_TOKEN); `tell` hears of waits, from several threads.
    Raises SourceError and UnsupportedError.
    """
    scheme, _, name = source.partition(":")
    if scheme == "folder":
        return open_folder(Path(name), where)
    if scheme != "hub" or not name:
        raise SourceError(where, f"'{source}' is no source", "Write folder:path or hub:owner/name@revision")
    repo, _, revision = name.partition("@")
    where = f"{where}: {repo}"
    with explained(where, repo, endpoint):
        remote = replace(look(repo, "model", revision or None, endpoint, token, Patience(tell=tell)), tell=tell)
        for path in remote.sizes:
            check_path(path, where)
        folder = remote.folder(cache)
        bring(remote, [path for path, size in remote.sizes.items() if travels(path, size)], folder, where, None)

        def read_headers(names: list[str]) -> list[tuple[Header, ...]]:
            return together(lambda name: read_header(remote, name, where), names, Event())

        def read_bytes(headers: Sequence[Header]) -> list[bytes]:
            return together(lambda h: read_part(remote, h.file, h.start, h.end), headers, Event())

        gguf: tuple[str, ...] = ()
        packed: Mapping[str, Packed] = {}
        if is_gguf(remote.sizes):
            model = gguf_source.survey(remote.sizes, lambda name: bring_head(remote, name, folder), where)
            gguf, config, tensors = model.files, gguf_source.config_of(model), gguf_source.headers_of(model)
        else:
            config, tensors, packed = survey(
                remote.sizes, lambda path: (folder / path).read_bytes(), read_headers, read_bytes, where
            )
    return Snapshot(
        source=f"hub:{repo}",
        repo=repo,
        commit=remote.commit,
        config=config,
        tensors=tensors,
        packed=packed,
        files=remote.sizes,
        checksums=remote.checksums,
        folder=folder,
        gguf=gguf,
        gated=remote.gated,
    )


def fetch(
    snapshot: Snapshot,
    cache: Path,
    where: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    report: Report | None = None,
    tell: Tell = hush,
) -> Snapshot:
    """Bring the weights of a snapshot into `cache` and return the snapshot that lies there.

    Files that are there are not asked for again, a file that was cut goes on where it stopped, and each is checked
    against the hub's checksum before it gets its name. `report` and `tell` are called from several threads. A snapshot
    of a folder is returned as it is. Raises SourceError.
    """
    if not snapshot.source.startswith("hub:"):
        return snapshot
    remote = Remote(
        repo=snapshot.repo,
        kind="model",
        commit=snapshot.commit,
        sizes=snapshot.files,
        checksums=snapshot.checksums,
        endpoint=endpoint or huggingface_hub.constants.ENDPOINT,
        token=token,
        tell=tell,
    )
    folder = remote.folder(cache)
    small = {path for path, size in snapshot.files.items() if travels(path, size)}
    where = f"{where}: {snapshot.repo}"
    with explained(where, snapshot.repo, endpoint):
        bring(remote, sorted(snapshot.weight_files | small), folder, where, report)
    return replace(snapshot, folder=folder)


def look(
    repo: str,
    kind: Kind,
    revision: str | None,
    endpoint: str | None,
    token: str | None,
    patience: Patience | None = None,
) -> Remote:
    """List a repo at a revision (None: its main branch), hidden files left out."""
    client = api(endpoint, token)
    info = patiently(
        lambda: client.repo_info(repo, revision=revision, repo_type=kind, files_metadata=True, timeout=TIMEOUT),
        patience,
    )
    files = [file for file in info.siblings or [] if not HIDDEN.search(file.rfilename)]
    if not COMMIT.fullmatch(str(info.sha)):  # which becomes the name of a folder
        what = f"{client.endpoint} calls the commit {quoted(str(info.sha))}, and commits have 40 hex digits"
        raise SourceError(repo, what, "Ask who runs that hub")
    return Remote(
        repo=repo,
        kind=kind,
        commit=str(info.sha),
        sizes={file.rfilename: int(file.size or 0) for file in sorted(files, key=lambda file: str(file.rfilename))},
        checksums={
            file.rfilename: f"sha256:{file.lfs.sha256}" if file.lfs else f"git:{file.blob_id}"
            for file in files
            if file.lfs or file.blob_id
        },
        endpoint=client.endpoint,
        token=token,
        gated=bool(info.gated),
    )


def find(name: str, revision: str | None, where: str) -> Remote:
    """The repo called owner/name or datasets/owner/name, a model's or else a data set's. Raises SourceError."""
    repo = name.removeprefix("datasets/")
    with explained(where, repo, None):
        if repo == name:
            with suppress(RepositoryNotFoundError):
                return look(repo, "model", revision, None, None)
        return look(repo, "dataset", revision, None, None)


def bring_files(remote: Remote, names: Sequence[str], folder: Path, where: str, report: Report | None = None) -> None:
    """Download files of a repo into a folder, checked against the hub's checksums. Raises SourceError."""
    for name in names:
        check_path(name, where)
    with explained(where, remote.repo, remote.endpoint):
        bring(remote, names, folder, where, report)


def look_once(repo: str, kind: Kind, revision: str, cache: Path, endpoint: str | None, token: str | None) -> Remote:
    """List a repo as `look` does, but a commit only once: what it holds never changes, so the listing is kept."""
    client = api(endpoint, token)
    if COMMIT.fullmatch(revision):
        known = Remote(
            repo=repo, kind=kind, commit=revision, sizes={}, checksums={}, endpoint=client.endpoint, token=token
        )
        with suppress(OSError, ValueError, KeyError, TypeError):
            listing = json.loads((known.folder(cache) / LISTING).read_text("utf-8"))
            return replace(known, sizes=listing["sizes"], checksums=listing["checksums"])
    remote = look(repo, kind, revision, endpoint, token)
    path = remote.folder(cache) / LISTING
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{LISTING}.{uuid.uuid4().hex[:8]}")
    part.write_text(json.dumps({"sizes": dict(remote.sizes), "checksums": dict(remote.checksums)}), "utf-8")
    part.replace(path)
    return remote


def read_header(remote: Remote, name: str, where: str) -> tuple[Header, ...]:
    """The tensors of one safetensors file on a hub, from its first bytes only."""
    size = remote.sizes[name]
    first = read_part(remote, name, 0, min(size, FIRST_READ_BYTES))
    end = 8 + header_length(first[:8], size, name, where)
    if end > len(first):
        first += read_part(remote, name, len(first), end)
    return parse_header(first[8:end], size, name, where)


def bring_head(remote: Remote, name: str, folder: Path) -> Head:
    """The head of one GGUF file on a hub, kept beside the small files; how long it is, only reading it tells."""
    size, path = remote.sizes[name], gguf_source.head_file(folder, name)
    data = path.read_bytes() if path.is_file() else read_part(remote, name, 0, min(size, GGUF_FIRST_READ_BYTES))
    while True:
        try:
            head = gguf_source.parse_head(data, size, name)
        except HeadIncompleteError:
            data += read_part(remote, name, len(data), min(size, HEAD_LIMIT_BYTES, 2 * len(data)))
        else:
            break
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}")
        part.write_bytes(data[: head.data_start])
        part.replace(path)
    return head


def read_part(remote: Remote, name: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file on a hub; tries again when the line is cut or the hub is busy."""

    def read() -> bytes:
        data = bytearray()
        with remote.stream(name, start, end) as (begin, chunks):
            for chunk in chunks:
                data += chunk
                if len(data) >= end - begin:
                    break
        return bytes(data[start - begin : end - begin])

    return patiently(read, Patience(tell=remote.tell))


def bring(remote: Remote, names: Iterable[str], folder: Path, where: str, report: Report | None) -> None:
    """Download files into a folder, several at a time; those that are there with the right size are skipped."""
    patience = Patience(tell=remote.tell)

    def download(name: str) -> None:
        path, part = folder / name, folder / ".parts" / f"{name}.part"
        if path.is_file() and path.stat().st_size == remote.sizes[name]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(f"{part}.lock"):  # of two processes that want a file, one downloads and one waits
            if path.is_file() and path.stat().st_size == remote.sizes[name]:
                return
            checksum = remote.checksums.get(name)
            for again in (True, False):  # what was damaged on the way, or an old part, is fetched anew, once
                receive(remote, name, part, patience, report)
                if checksum is None or matches(part, checksum):
                    part.replace(path)
                    return
                part.unlink()
                if again:
                    remote.tell(f"{name} arrived with another checksum than the hub states: it is fetched anew")
            what = f"{name} arrived with another checksum than the hub states, twice"
            raise SourceError(where, what, "Run it again; if it stays so, a proxy or the hub alters files")

    together(download, list(names), patience.stop)


def receive(remote: Remote, name: str, part: Path, patience: Patience, report: Report | None) -> None:
    """Append to a part until it is as long as the file; tries again while anything arrives."""
    size = remote.sizes[name]
    with part.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)

        def go_on() -> None:
            with remote.stream(name, file.tell()) as (begin, chunks):
                file.seek(begin)
                file.truncate()
                for chunk in chunks:
                    if patience.stop.is_set():
                        raise InterruptedError(f"the download of {name} was stopped")
                    file.write(chunk[: size - file.tell()])
                    if report is not None:
                        report(len(chunk))
                    if file.tell() == size:
                        return

        while (before := file.tell()) < size:
            try:
                patiently(go_on, patience)
            except httpx.TransportError:
                if file.tell() <= before:
                    raise
            else:
                if file.tell() <= before:
                    raise httpx.RemoteProtocolError("the file ends before its stated size")
        file.flush()
        os.fsync(file.fileno())
