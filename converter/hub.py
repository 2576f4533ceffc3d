"""Models from a Hugging Face hub, over HTTP; with hub_publish.py the door of huggingface_hub.

Planning must not download weights, so `resolve` pins a revision to a commit, takes the small files, and reads only the
headers of the weights by HTTP range. `fetch` streams the weights with a ranged resume of its own: huggingface_hub 2
resumes a cut connection inside one process, but a killed process starts its file again, which for a 40 GB shard is an
hour. The price is plain HTTP, without the chunk cache of xet. Every file is checked against the hub's own checksum.

Messages never hold the text of a client's error: it may quote a signed URL or a header with the token.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TypeVar

import huggingface_hub.constants
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    WeakFileLock,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    httpx,
)

from converter.containers.gguf import source as gguf_source
from converter.containers.gguf.header import Head, HeadIncompleteError
from converter.errors import PublishError, SourceError
from converter.folder import check_path, matches
from converter.packed import Packed
from converter.publish import Kind
from converter.source import Header, Snapshot, header_length, is_gguf, open_folder, parse_header, survey, travels

FIRST_READ_BYTES = 100_000  # holds the whole header of nearly every shard, which saves a second request
GGUF_FIRST_READ_BYTES = 1 << 20  # a vocabulary of 128k tokens with its merges takes about 6 MB
CHUNK_BYTES = 1 << 20
WAITS = (1.0, 2.0, 4.0)  # seconds before each further try, unless the hub names its own
LONGEST_WAIT = 300.0  # the window of the public hub's rate limits
TIMEOUT = 30.0
TOGETHER = 4  # files in flight
LISTING = ".listing.json"  # beside the files of a commit
COMMIT = re.compile("[0-9a-f]{40}")
HIDDEN = re.compile(r"(^|/)\.(?!\.?(/|$))")  # .gitattributes, but not "..", which is refused and not left out
PASSING = frozenset({408, 429, 500, 502, 503, 504})
FAULTS = (
    HfHubHTTPError,
    httpx.HTTPError,
    OfflineModeIsEnabled,
    HFValidationError,
    LocalTokenNotFoundError,
    UnicodeDecodeError,  # what the client makes of a proxy's error page in Latin-1 (huggingface_hub 2)
)
Item = TypeVar("Item")
Result = TypeVar("Result")
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
        with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            yield (start if response.status_code == 206 else 0), response.iter_bytes(CHUNK_BYTES)


def resolve(source: str, cache: Path, where: str, *, endpoint: str | None = None, token: str | None = None) -> Snapshot:
    """The snapshot of "folder:path" or "hub:org/name[@revision]", without the weights of a hub.

    `cache` receives the small files of a hub's model, under its commit. `endpoint` and `token` default to what
    huggingface_hub takes from the environment (HF_ENDPOINT, HF_TOKEN). Raises SourceError and UnsupportedError.
    """
    scheme, _, name = source.partition(":")
    if scheme == "folder":
        return open_folder(Path(name), where)
    if scheme != "hub" or not name:
        raise SourceError(where, f"'{source}' is no source", "Write folder:path or hub:owner/name@revision")
    repo, _, revision = name.partition("@")
    where = f"{where}: {repo}"
    with explained(where, repo, endpoint):
        remote = look(repo, "model", revision or None, endpoint, token)
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
    )


def fetch(
    snapshot: Snapshot,
    cache: Path,
    where: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    report: Report | None = None,
) -> Snapshot:
    """Bring the weights of a snapshot into `cache` and return the snapshot that lies there.

    Files that are there are not asked for again, a file that was cut goes on where it stopped, and each is checked
    against the hub's checksum before it gets its name. `report` is called from several threads. A snapshot of a folder
    is returned as it is. Raises SourceError.
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
    )
    folder = remote.folder(cache)
    small = {path for path, size in snapshot.files.items() if travels(path, size)}
    where = f"{where}: {snapshot.repo}"
    with explained(where, snapshot.repo, endpoint):
        bring(remote, sorted(snapshot.weight_files | small), folder, where, report)
    return replace(snapshot, folder=folder)


def look(repo: str, kind: Kind, revision: str | None, endpoint: str | None, token: str | None) -> Remote:
    """List a repo at a revision (None: its main branch), hidden files left out."""
    api = HfApi(endpoint=endpoint, token=token)
    info = patiently(
        lambda: api.repo_info(repo, revision=revision, repo_type=kind, files_metadata=True, timeout=TIMEOUT)
    )
    files = [file for file in info.siblings or [] if not HIDDEN.search(file.rfilename)]
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
        endpoint=api.endpoint,
        token=token,
    )


def look_once(repo: str, kind: Kind, revision: str, cache: Path, endpoint: str | None, token: str | None) -> Remote:
    """List a repo as `look` does, but a commit only once: what it holds never changes, so the listing is kept."""
    api = HfApi(endpoint=endpoint, token=token)
    if COMMIT.fullmatch(revision):
        known = Remote(
            repo=repo, kind=kind, commit=revision, sizes={}, checksums={}, endpoint=api.endpoint, token=token
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
            data += read_part(remote, name, len(data), min(size, 2 * len(data)))
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

    return patiently(read)


def bring(remote: Remote, names: Iterable[str], folder: Path, where: str, report: Report | None) -> None:
    """Download files into a folder, several at a time; those that are there with the right size are skipped."""
    stop = Event()

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
            for resumed in [True, False] if part.exists() else [False]:
                receive(remote, name, part, stop, report)
                if checksum is None or matches(part, checksum):
                    part.replace(path)
                    return
                part.unlink()
                if not resumed:
                    what = f"{name} arrived with another checksum than the hub states"
                    raise SourceError(where, what, "Run it again; if it stays so, a proxy or the hub alters files")

    together(download, list(names), stop)


def receive(remote: Remote, name: str, part: Path, stop: Event, report: Report | None) -> None:
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
                    if stop.is_set():
                        raise InterruptedError(f"the download of {name} was stopped")
                    file.write(chunk[: size - file.tell()])
                    if report is not None:
                        report(len(chunk))
                    if file.tell() == size:
                        return

        while (before := file.tell()) < size:
            try:
                patiently(go_on, stop)
            except httpx.TransportError:
                if file.tell() <= before:
                    raise
            else:
                if file.tell() <= before:
                    raise httpx.RemoteProtocolError("the file ends before its stated size")
        file.flush()
        os.fsync(file.fileno())


def together(work: Callable[[Item], Result], items: Sequence[Item], stop: Event) -> list[Result]:
    """The results of `work` for each item, several at a time; an error or Ctrl-C sets `stop` and begins nothing new."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def patiently(call: Callable[[], Result], stop: Event | None = None) -> Result:
    """The result of a call that may be repeated; waits as long as the hub asks when it is busy or cuts the line."""
    for seconds in WAITS:
        try:
            return call()
        except (HfHubHTTPError, httpx.TransportError) as error:
            asked = None
            if isinstance(error, HfHubHTTPError):
                if error.response.status_code not in PASSING:
                    raise
                headers = error.response.headers
                asked = re.search(r"^(\d+)$", headers.get("Retry-After", "")) or re.search(
                    r"\br=0\b.*\bt=(\d+)", headers.get("RateLimit", "")
                )
            pause(min(float(asked[1]), LONGEST_WAIT) if asked else seconds, stop or Event())
    return call()


def pause(seconds: float, stop: Event) -> None:
    """Wait, but not when asked to stop; sleeping would hold up Ctrl-C for as long as a hub pleases."""
    if stop.wait(seconds):
        raise InterruptedError("stopped while waiting for a hub")


@contextmanager
def explained(
    where: str, repo: str, endpoint: str | None, kind: type[SourceError] | type[PublishError] = SourceError
) -> Iterator[None]:
    """Turn what a client raises into an error of ours; the original goes, for its text may hold a secret."""
    try:
        yield
    except FAULTS as error:
        raise kind(where, *explain(error, repo, endpoint or huggingface_hub.constants.ENDPOINT)) from None
    except OSError as error:
        raise kind(
            where, f"a file cannot be written: {error}", "Make room or mend the disk, then run it again"
        ) from error


def explain(error: Exception, repo: str, endpoint: str) -> tuple[str, str]:
    """What went wrong with a request to a hub, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    sign_in = "set HF_TOKEN to a token with access to it"
    if isinstance(error, HFValidationError):
        return f"'{repo}' is no name of a repo", "Write owner/name"
    if isinstance(error, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE forbids to ask {endpoint}", "Unset it, or use folder: or file: with a copy on this disk"
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token", "Set HF_TOKEN to a token with write access"
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated ({status})", f"Accept its terms at {endpoint}/{repo}, and {sign_in}"
    if isinstance(error, DisabledRepoError):
        return f"{repo} was disabled by {endpoint}", "Choose another"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision", f"Choose one of those at {endpoint}/{repo}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"a file of {repo} is gone ({status})", "Run it again: its repo was rewritten"
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"{endpoint} shows no {repo} ({status})", f"Check the name; if it is private, {sign_in}"
    if status == 401:
        return f"{endpoint} does not accept the token (401)", "Set HF_TOKEN to one that is valid"
    if status == 403:
        return f"the token may not do this with {repo} (403)", f"Ask the owner of {repo} for access, and {sign_in}"
    if status == 429:
        return f"{endpoint} asks to slow down (429)", "Run it again in five minutes; a token raises the limits"
    if status:
        return f"{endpoint} answers with an error ({status})", "Run it again later; what is done stays done"
    if isinstance(error, UnicodeDecodeError):
        return (
            f"{endpoint} answers with an error page that is not UTF-8",
            "Run it again later, or ask who runs the proxy",
        )
    what = f"the connection to {endpoint} failed or was cut ({type(error).__name__})"
    return what, "Check the network and run it again; it goes on where it stopped"
